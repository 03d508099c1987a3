// Asserts of the engine as errors, while a model is loaded: llama_flash_load_model and llama_flash_new_context.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

struct ggml_cgraph;
struct llama_context;

// From now on an assert on a thread that loads a model throws; elsewhere it ends the process as it did. Once per process.
void flash_guard_engine();

// llama_graph_build (llama-ext.h); nullptr: the engine asserts that there is no such graph
ggml_cgraph * flash_guarded_graph(llama_context * ctx, uint32_t n_tokens, bool encoder, bool embd);

// Calls f. What the engine would end the process for on this thread, outside of kernels, is what this returns; "": nothing.
std::string flash_guarded_call(const std::function<void()> & f);
