// One client's connection to a worker: what the engine's RPC server asks of its host.
#pragma once

#include "session.h"
#include "worker/weights.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

struct backend_free {
    void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
};

// serve() runs in one thread; everything else may be called from another one meanwhile.
struct llama_flash_worker {
    // limit: bytes of memory, for buffers and messages; weights: bytes of all weights of the files
    llama_flash_worker(llama_flash_session & session, std::vector<int> files, uint64_t limit, uint64_t weights);
    ~llama_flash_worker();

    bool start(int n_threads, llama_flash_error * err); // before serve()
    void serve(int fd);
    void remember(const std::string & what); // the first one is told

    std::string               take_refusal();
    llama_flash_worker_memory memory() const;

    worker_weights weights; // of serve()'s thread, but for add()

  private:
    static ggml_backend_buffer_t alloc_buffer(void * context, size_t size);
    static void                  free_buffer(void * context, ggml_backend_buffer_t buffer);
    static bool                  bind(void * context, ggml_tensor * tensor, uint64_t file, uint64_t offset);
    static bool                  place(void * context, ggml_tensor * tensor);
    static bool                  check(void * context, const ggml_cgraph * graph);
    static void                  computed(void * context, ggml_status status);

    void note_memory();

    static constexpr size_t LEAST_MESSAGE = 16u << 20; // bytes that a message may have in any case

    llama_flash_session &                               session;
    const uint64_t                                      limit;
    const uint64_t                                      most; // bytes of all buffers, addresses included
    std::unique_ptr<struct ggml_backend, backend_free>  backend;
    ggml_backend_rpc_host                               host = {};
    std::unordered_map<ggml_backend_buffer_t, uint64_t> buffers; // bytes
    uint64_t                                            allocated = 0;

    mutable std::mutex        mutex; // of what follows
    std::string               refusal;
    llama_flash_worker_memory now = {};
};
