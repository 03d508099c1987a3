// CPU_FLASH: the buffer type of flash tensors, an extra buffer type of the CPU backend.
#pragma once

#include "session.h"

#include "ggml-backend.h"

ggml_backend_buffer_type_t ggml_backend_flash_buffer_type();

// Adds the buffer type to the CPU backend and the binding hook to the loader, once.
void flash_register();

// The session that buffers allocated by this thread belong to; nullptr: none.
void flash_set_binding_session(llama_flash_session * session);

// What is asked about a weight that is not in this process' memory: true, it is dealt with.
void flash_set_remote_bind(bool (*bind)(const ggml_tensor * tensor, int fd, size_t offset));
