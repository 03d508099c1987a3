#include "device_memory.h"

#include <cstddef>

// of the engine's loader (load_all_data in llama-model-loader.cpp)
static constexpr uint64_t STAGING_BUFFERS = 4;
static constexpr uint64_t STAGING_BYTES   = (64u << 20) + 2 * 4096u; // of each, where files are read past the page cache

bool is_device_memory(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    return device && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_GPU && !ggml_backend_buft_is_host(type);
}

uint64_t load_staging() {
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t     device = ggml_backend_dev_get(i);
        ggml_backend_dev_props props  = {};
        ggml_backend_dev_get_props(device, &props);
        if (ggml_backend_dev_host_buffer_type(device) && props.caps.async && props.caps.host_buffer && props.caps.events) {
            return STAGING_BUFFERS * STAGING_BYTES; // for one device of a load, whichever it is
        }
    }
    return 0;
}
