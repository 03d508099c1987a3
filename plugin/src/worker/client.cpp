// A client's side: weights that lie at a worker are named to it while the model is loaded, and not sent.
#include "base/status.h"
#include "buffer_type.h"
#include "llama_flash.h"

#include "ggml-backend-impl.h"
#include "ggml-rpc.h"
#include "ggml.h"

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <sys/stat.h>
#include <utility>
#include <vector>

// of the load under way on this thread
struct remote_load {
    std::vector<std::pair<dev_t, ino_t>> files;   // the shards, in order
    std::string                          refused; // the first tensor that a worker does not have, "" if none
    std::string                          worker;  // which one
};

static thread_local std::unique_ptr<remote_load> current;

// Whether the tensor lies at a worker. Then this has told it where the weight is in the file, or noted that it does not have it.
static bool bind_remote(const ggml_tensor * tensor, int fd, size_t offset) {
    if (!current || !ggml_backend_buffer_is_rpc(tensor->buffer)) {
        return false;
    }
    struct stat st;
    uint64_t    file = current->files.size(); // which no worker has
    for (size_t i = 0; fstat(fd, &st) == 0 && i < current->files.size(); i++) {
        if (current->files[i] == std::make_pair(st.st_dev, st.st_ino)) {
            file = i;
        }
    }
    // after the first one, the load has failed: nothing more is read
    if (current->refused.empty() && !ggml_backend_rpc_bind_tensor(tensor, file, offset)) {
        current->refused = tensor->name;
        current->worker  = ggml_backend_buft_name(tensor->buffer->buft);
    }
    return true;
}

int32_t llama_flash_remote_connect(const char * endpoint, int32_t fd, void ** device, llama_flash_error * err) {
    return guarded(err, [&]() -> int32_t {
        if (!ggml_backend_rpc_connect(endpoint, fd)) {
            return flash_fail(err, LLAMA_FLASH_E_READ, "%s: the worker has not taken the connection for data", endpoint);
        }
        ggml_backend_reg_t reg = ggml_backend_rpc_add_server(endpoint);
        if (!reg) {
            return flash_fail(err, LLAMA_FLASH_E_READ, "%s: the worker was lost before the load", endpoint);
        }
        *device = ggml_backend_reg_dev_get(reg, 0);
        return LLAMA_FLASH_OK;
    });
}

bool llama_flash_remote_settle(const char * endpoint) {
    return ggml_backend_rpc_settle(endpoint);
}

int32_t llama_flash_remote_bind_begin(const char * const * files, uint32_t n, llama_flash_error * err) {
    return guarded(err, [&]() -> int32_t {
        auto load = std::make_unique<remote_load>();
        for (uint32_t i = 0; i < n; i++) {
            struct stat st;
            if (stat(files[i], &st) != 0) {
                return flash_fail(err, LLAMA_FLASH_E_READ, "cannot open %s: %s", files[i], why_failed(errno).c_str());
            }
            load->files.emplace_back(st.st_dev, st.st_ino);
        }
        current = std::move(load);
        flash_set_remote_bind(bind_remote);
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_remote_bind_end(llama_flash_error * err) {
    const auto load = std::move(current);
    if (!load || load->refused.empty()) {
        return LLAMA_FLASH_OK;
    }
    flash_fail(err, LLAMA_FLASH_E_FORMAT, "%s does not have tensor %s", load->worker.c_str(), load->refused.c_str());
    if (err) {
        snprintf(err->tensor, sizeof(err->tensor), "%s", load->refused.c_str());
    }
    return LLAMA_FLASH_E_FORMAT;
}
