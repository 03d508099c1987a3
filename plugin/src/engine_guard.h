// Asserts of the engine as errors, while a model is loaded: llama_flash_load_model and llama_flash_new_context.
#pragma once

// From now on an assert on a thread that loads a model throws; elsewhere it ends the process as it did. Once per process.
void flash_guard_engine();
