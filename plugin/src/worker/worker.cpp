#include "worker/worker.h"

#include "base/status.h"
#include "engine_guard.h"
#include "worker/graph_check.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <unistd.h>
#include <utility>
#include <vector>

static llama_flash_worker & self(void * context) {
    return *(llama_flash_worker *) context;
}

llama_flash_worker::llama_flash_worker(llama_flash_session & session, std::vector<int> files, uint64_t limit, uint64_t weights) : weights(session, std::move(files)), session(session), limit(limit), most(limit + weights) {
    session.ref();
    host.context      = this;
    host.max_message  = LEAST_MESSAGE;
    host.alloc_buffer = alloc_buffer;
    host.free_buffer  = free_buffer;
    host.bind         = bind;
    host.place        = place;
    host.check        = check;
    host.computed     = computed;
}

llama_flash_worker::~llama_flash_worker() {
    session.unref();
}

bool llama_flash_worker::start(int n_threads, llama_flash_error * err) {
    backend.reset(ggml_backend_cpu_init());
    if (!backend) {
        flash_fail(err, LLAMA_FLASH_E_MEMORY, "the engine cannot compute here%s", limits_of(ENOMEM).c_str());
        return false;
    }
    ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
    ggml_backend_cpu_set_abort_callback(backend.get(), llama_flash_abort, &session);
    return true;
}

void llama_flash_worker::serve(int fd) {
    const std::string failed = flash_guarded_call([&] { ggml_backend_rpc_serve(fd, backend.get(), &host); });
    if (!failed.empty()) {
        remember("the client sent what the engine cannot take: " + failed);
    }
}

void llama_flash_worker::remember(const std::string & what) {
    std::lock_guard<std::mutex> lock(mutex);
    if (refusal.empty()) {
        refusal = what;
    }
}

std::string llama_flash_worker::take_refusal() {
    std::lock_guard<std::mutex> lock(mutex);
    return std::exchange(refusal, "");
}

llama_flash_worker_memory llama_flash_worker::memory() const {
    std::lock_guard<std::mutex> lock(mutex);
    return now;
}

// A buffer of weights is addresses, for the most part: what is bound in it and stays there is counted by the weights themselves.
void llama_flash_worker::note_memory() {
    uint64_t others  = 0;
    uint64_t largest = 0;
    for (const auto & [buffer, bytes] : buffers) {
        if (!weights.holds(buffer)) {
            others += bytes;
            largest = std::max(largest, bytes);
        }
    }
    host.max_message = std::max<uint64_t>(LEAST_MESSAGE, std::min(limit, largest + (1u << 16)));
    std::lock_guard<std::mutex> lock(mutex);
    now.resident = weights.resident_bytes();
    now.buffers  = others;
}

ggml_backend_buffer_t llama_flash_worker::alloc_buffer(void * context, size_t size) {
    llama_flash_worker & w = self(context);
    if (size > w.most - w.allocated) {
        w.remember("the client asks for a buffer of " + std::to_string(size) + " bytes, more than this worker's budget has for it");
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        w.buffers[buffer] = size;
        w.allocated += size;
        w.note_memory();
    }
    return buffer;
}

void llama_flash_worker::free_buffer(void * context, ggml_backend_buffer_t buffer) {
    llama_flash_worker & w = self(context);
    w.weights.drop(buffer);
    if (const auto it = w.buffers.find(buffer); it != w.buffers.end()) {
        w.allocated -= it->second;
        w.buffers.erase(it);
    }
    w.note_memory();
}

bool llama_flash_worker::bind(void * context, ggml_tensor * tensor, uint64_t file, uint64_t offset) {
    llama_flash_worker & w = self(context);
    std::string          reason;
    const bool           done = w.weights.bind(*tensor, file, offset, reason);
    if (!done) {
        w.remember(std::string("tensor ") + tensor->name + ": this worker's file " + reason);
    }
    w.note_memory();
    return done;
}

bool llama_flash_worker::place(void * context, ggml_tensor * tensor) {
    llama_flash_worker & w = self(context);
    std::string          reason;
    if (!tensor_is_sound(*tensor, reason)) {
        w.remember(reason);
        return false;
    }
    if (!w.weights.place(*tensor)) {
        w.remember(std::string("tensor '") + tensor->name + "' lies in the memory of a weight");
        return false;
    }
    return true;
}

bool llama_flash_worker::check(void * context, const ggml_cgraph * graph) {
    std::string reason;
    if (graph_is_sound(*graph, reason)) {
        return true;
    }
    self(context).remember(reason);
    return false;
}

void llama_flash_worker::computed(void * context, ggml_status status) {
    llama_flash_worker & w = self(context);
    if (status != GGML_STATUS_SUCCESS && !w.session.failed()) { // else the session says why
        w.remember(std::string("a graph could not be computed: ") + ggml_status_to_string(status));
    }
}
