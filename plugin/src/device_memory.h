// What lies on a device, and what a load puts in between: a GPU, or an RPC server in its place.
#pragma once

#include "ggml-backend.h"

#include <cstdint>

// Whether buffers of this type are in a device's own memory, which no op of the CPU reads. Pinned memory of the host is not.
bool is_device_memory(ggml_backend_buffer_type_t type);

// see llama_flash_load_staging
uint64_t load_staging();
