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

llama_flash_worker::llama_flash_worker(llama_flash_session & session, std::vector<int> files, uint64_t limit, uint64_t weights) : weights(session, std::move(files), limit), buffers(limit, limit + weights), session(session), limit(limit) {
    session.ref();
    buffers.refuse    = [this](const std::string & why) { remember(why); };
    buffers.many      = [] {};
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

bool llama_flash_worker::start(int threads, llama_flash_error * err) {
    n_threads = threads;
    backend.reset(ggml_backend_cpu_init());
    if (!backend) {
        flash_fail(err, LLAMA_FLASH_E_MEMORY, "the engine cannot compute here%s", limits_of(ENOMEM).c_str());
        return false;
    }
    ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
    ggml_backend_cpu_set_abort_callback(backend.get(), abort, this);
    return true;
}

void llama_flash_worker::serve(int fd) {
    client_buffers::serve(&buffers);
    const std::string failed = flash_guarded_call([&] { ggml_backend_rpc_serve(fd, backend.get(), &host); });
    client_buffers::serve(nullptr);
    if (!failed.empty()) {
        remember("the client sent what the engine cannot take: " + failed);
    }
}

void llama_flash_worker::on_many(void (*many)(void * data), void * data) {
    buffers.many = [many, data] { many(data); };
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
    host.max_message = std::max<uint64_t>(LEAST_MESSAGE, std::min(limit, buffers.largest() + (1u << 16)));
    buffers.resident = weights.resident_bytes();
    std::lock_guard<std::mutex> lock(mutex);
    now.resident = weights.resident_bytes();
    now.buffers  = buffers.bytes();
}

bool llama_flash_worker::has_flash_memory() const {
    const session_lock lock(session);
    return lock && session.memory.total > 0;
}

ggml_backend_buffer_t llama_flash_worker::alloc_buffer(void * context, size_t size) {
    llama_flash_worker &  w      = self(context);
    ggml_backend_buffer_t buffer = w.buffers.allocate(size, w.has_flash_memory());
    w.note_memory();
    return buffer;
}

void llama_flash_worker::free_buffer(void * context, ggml_backend_buffer_t buffer) {
    llama_flash_worker & w = self(context);
    w.weights.drop(buffer);
    w.buffers.forget(buffer);
    w.note_memory();
}

bool llama_flash_worker::bind(void * context, ggml_tensor * tensor, uint64_t file, uint64_t offset) {
    llama_flash_worker & w      = self(context);
    std::string          reason = "got no place for it beside what the client has written";
    const bool           done   = w.buffers.may_bind(tensor->buffer) && w.weights.bind(*tensor, file, offset, w.buffers.written_bytes(), reason);
    if (done) {
        w.buffers.give_to_weights(tensor->buffer);
    } else {
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
    llama_flash_worker & w = self(context);
    std::string          reason;
    if (!graph_is_sound(*graph, reason)) {
        w.remember(reason);
        return false;
    }
    return w.has_work_for(*graph) && w.buffers.may_compute(*graph);
}

// What kernels take beside the client's buffers: of a graph that is what it looks like, no more than its tensors do. Strides of zero make
// tensors that are larger than their memory.
bool llama_flash_worker::has_work_for(const ggml_cgraph & graph) {
    const ggml_cplan plan = ggml_graph_plan(const_cast<ggml_cgraph *>(&graph), n_threads, nullptr);
    if (plan.work_size > buffers.largest() + LEAST_MESSAGE) {
        remember("a graph needs " + std::to_string(plan.work_size) + " bytes to work with, more than its tensors take");
        return false;
    }
    const session_lock lock(session);
    for (int i = 0; lock && i < graph.n_nodes; i++) {
        const ggml_tensor & node = *graph.nodes[i];
        ffn_part            part;
        if (node.src[0] && worker_weights::is_elsewhere(*node.src[0]) && session.find_part(node.src[0]->data, part)) {
            const int64_t tokens = node.op == GGML_OP_MUL_MAT_ID ? node.src[2]->ne[1] : ggml_nrows(node.src[1]);
            if (tokens > (int64_t) session.needs.n_ubatch) {
                remember(std::string("tensor ") + node.src[0]->name + " is multiplied with " + std::to_string(tokens) +
                         " tokens at once, more than the client's context has");
                return false;
            }
        }
    }
    return true;
}

bool llama_flash_worker::abort(void * context) {
    llama_flash_worker & w = self(context);
    if (!w.computing) {
        w.computing = true;
        w.buffers.begin_graph();
    }
    return llama_flash_abort(&w.session);
}

void llama_flash_worker::computed(void * context, ggml_status status) {
    llama_flash_worker & w = self(context);
    w.computing            = false;
    if (status != GGML_STATUS_SUCCESS && !w.session.failed()) { // else the session says why
        w.remember(std::string("a graph could not be computed: ") + ggml_status_to_string(status));
    }
}
