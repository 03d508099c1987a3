#include "session.h"

#include "base/clock.h"

#include <pthread.h>

// life

static std::atomic<uint64_t> n_forks{ 0 };

[[maybe_unused]] static const int watching_forks = pthread_atfork(nullptr, nullptr, [] { n_forks++; });

bool llama_flash_session::forked() const {
    return n_forks.load(std::memory_order_relaxed) != process;
}

session_lock::session_lock(const llama_flash_session & session) {
    if (!session.forked()) {
        lock = std::unique_lock<std::mutex>(session.mutex);
    }
}

llama_flash_session * llama_flash_session::create(const llama_flash_params & params, llama_flash_error * err) {
    auto * s  = new llama_flash_session();
    s->params = params;
    if (params.few_tokens > 0) {
        s->table.few_tokens = params.few_tokens;
    }
    s->process = n_forks;
    if (!s->reads.open(params, err)) {
        delete s;
        return nullptr;
    }
    return s;
}

void llama_flash_session::unref() {
    if (--refs > 0) {
        return;
    }
    if (!forked()) {
        delete this;
    } else if (bound) {
        // Nothing else is freed: reads under way and their threads are the parent's, the memory that they read to is not mapped here, and a
        // thread of the parent may have been changing anything else.
        for (auto & f : files) {
            f->close();
        }
    }
}

// errors

int32_t llama_flash_session::take_error(llama_flash_error * err) {
    if (!failed()) {
        if (err) {
            *err = {};
        }
        return LLAMA_FLASH_OK;
    }
    reads.drain(); // what is under way belongs to the call that failed: its errors must not meet the next one
    neurons.drop_reads();
    for (auto & b : bundles) {
        b.forget_evaluation();
    }
    neurons.release();
    if (reads.file_changed()) {
        // what was read since the change cannot be told from what was read before: all is read again, if the file is itself again
        neurons.drop_kept();
        panels.drop_ring();
        experts.drop_kept();
    }
    if (err) {
        *err = reads.error();
    }
    reads.forget_error();
    return reads.error().code;
}

void llama_flash_session::fail_unbound(const ggml_tensor * weight) {
    if (const session_lock lock(*this); lock) {
        reads.fail_op(LLAMA_FLASH_E_INTERNAL, weight->name, "the graph uses a part of it: it must not stay on flash");
    }
}

// ops

void llama_flash_session::begin_op(const std::string & tensor) {
    op_lock     = session_lock(*this);
    op_begin_ns = flash_now_ns();
    stamp++;
    notes.stats.ops++;
    reads.look_again();
    if (memory.total == 0) {
        reads.fail_op(LLAMA_FLASH_E_INVALID, tensor, "the session has no memory: call llama_flash_session_set_memory before decoding");
    } else if (resizing.active && !failed()) {
        resize_step(op_begin_ns + RESIZE_NS);
    }
    resizing.last_op_ns = op_begin_ns;
}

void llama_flash_session::end_op() {
    spent_ns += (uint64_t) (flash_now_ns() - op_begin_ns);
    const session_lock ended = std::move(op_lock);
}

llama_flash_stats llama_flash_session::statistics() const {
    llama_flash_stats s = notes.stats;
    reads.tell(s);
    s.op_ns             = spent_ns;
    s.slots_used        = experts.used();
    s.neuron_slots_used = neurons.used();
    s.resident_bytes    = memory.pinned + memory.resident + memory.bookkeeping + experts.stream().touched() + panels.stream().touched() +
                          neurons.touched() + neurons.bytes_used() + experts.bytes_used(memory);
    return s;
}
