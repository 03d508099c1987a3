// One client's connection to a worker: what the engine's RPC server asks of its host.
#pragma once

#include "session.h"
#include "worker/buffers.h"
#include "worker/weights.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

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

    void                      on_many(void (*many)(void * data), void * data); // before serve()
    std::string               take_refusal();
    llama_flash_worker_memory memory() const;

    worker_weights weights; // of serve()'s thread, but for add()
    client_buffers buffers; // of serve()'s thread, but for expect()

  private:
    static ggml_backend_buffer_t alloc_buffer(void * context, size_t size);
    static void                  free_buffer(void * context, ggml_backend_buffer_t buffer);
    static bool                  bind(void * context, ggml_tensor * tensor, uint64_t file, uint64_t offset);
    static bool                  place(void * context, ggml_tensor * tensor);
    static bool                  check(void * context, const ggml_cgraph * graph);
    static void                  computed(void * context, ggml_status status);
    static bool                  abort(void * context); // asked before a graph, and within

    void note_memory();
    bool has_flash_memory() const;
    bool has_work_for(const ggml_cgraph & graph);

    static constexpr size_t LEAST_MESSAGE = 16u << 20; // bytes that a message may have in any case

    llama_flash_session &                              session;
    const uint64_t                                     limit;
    std::unique_ptr<struct ggml_backend, backend_free> backend;
    ggml_backend_rpc_host                              host      = {};
    bool                                               computing = false; // a graph
    int                                                n_threads = 1;

    mutable std::mutex        mutex; // of what follows
    std::string               refusal;
    llama_flash_worker_memory now = {};
};
