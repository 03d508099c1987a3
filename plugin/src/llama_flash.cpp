// The C interface: argument checks, and no exception beyond this file.
#include "llama_flash.h"

#include "buffer_type.h"
#include "session.h"
#include "status.h"

#include "llama-ext.h"

#include <algorithm>
#include <iterator>

uint32_t llama_flash_api_version(void) {
    return LLAMA_FLASH_API_VERSION;
}

const char * llama_flash_build_info(void) {
#ifdef LLAMA_FLASH_HAVE_URING
    return "llama-flash 0.1.0, io_uring and pread";
#else
    return "llama-flash 0.1.0, pread";
#endif
}

int32_t llama_flash_register(void) {
    return guarded(nullptr, [] {
        flash_register();
        return LLAMA_FLASH_OK;
    });
}

void * llama_flash_buffer_type(void) {
    return ggml_backend_flash_buffer_type();
}

llama_flash_session * llama_flash_session_new(const llama_flash_params * params, llama_flash_error * err) {
    llama_flash_session * session = nullptr;
    guarded(err, [&] {
        session = llama_flash_session::create(params ? *params : llama_flash_params{}, err);
        return LLAMA_FLASH_OK;
    });
    return session;
}

void llama_flash_session_free(llama_flash_session * session) {
    if (session) {
        session->unref();
    }
}

int32_t llama_flash_session_add_bundle(llama_flash_session * session, const llama_flash_bundle * bundle, llama_flash_error * err) {
    if (!session || !bundle) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_bundle: no session or no bundle");
    }
    return guarded(err, [&] { return session->add_bundle(*bundle, err); });
}

int32_t llama_flash_session_add_rows(llama_flash_session * session, const char * name, bool only, llama_flash_error * err) {
    if (!session || !name) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_rows: no session or no name");
    }
    return guarded(err, [&] { return session->add_rows(name, only, err); });
}

int32_t llama_flash_session_set_neurons(llama_flash_session * session, const llama_flash_neuron_params * params, llama_flash_error * err) {
    if (!session || !params) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_neurons: no session or no parameters");
    }
    return guarded(err, [&] { return session->set_neurons(*params, err); });
}

int32_t llama_flash_session_bind_begin(llama_flash_session * session, llama_flash_error * err) {
    if (!session || session->bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "bind_begin: no session, or one that already has a model");
    }
    flash_set_binding_session(session);
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session_bind_end(llama_flash_session * session, llama_flash_error * err) {
    flash_set_binding_session(nullptr);
    if (!session) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "bind_end: no session");
    }
    return guarded(err, [&] { return session->end_binding(err); });
}

int32_t llama_flash_session_requirements(const llama_flash_session * session, llama_flash_requirements * out) {
    if (!session || !out || !session->bound) {
        return LLAMA_FLASH_E_INVALID;
    }
    *out = session->requirements();
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session_set_memory(llama_flash_session * session, uint64_t bytes, llama_flash_error * err) {
    if (!session) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_memory: no session");
    }
    return guarded(err, [&] { return session->set_memory(bytes, err); });
}

int32_t llama_flash_session_resize(llama_flash_session * session, uint64_t bytes, bool urgent, llama_flash_resize * out, llama_flash_error * err) {
    if (!session || !out) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "resize: no session or nowhere to tell how far it has come");
    }
    return guarded(err, [&] { return session->resize(bytes, urgent, *out, err); });
}

uint64_t llama_flash_session_hot(const llama_flash_session * session, uint64_t * ids, uint64_t capacity) {
    uint64_t n = 0;
    if (session) {
        guarded(nullptr, [&] {
            n = session->hot(ids, ids ? capacity : 0);
            return LLAMA_FLASH_OK;
        });
    }
    return n;
}

int32_t llama_flash_session_warm(llama_flash_session * session, const uint64_t * ids, uint64_t n, uint64_t * done, llama_flash_error * err) {
    if (!session || !ids || !done) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "warm: no session, no records or nowhere to tell how far it has come");
    }
    return guarded(err, [&] { return session->warm(ids, n, *done, err); });
}

uint64_t llama_flash_session_tensors(const llama_flash_session * session, llama_flash_tensor * out, uint64_t capacity) {
    return session ? session->describe_tensors(out, out ? capacity : 0) : 0;
}

int32_t llama_flash_session_residency(const llama_flash_session * session, uint8_t * place, uint32_t * age, uint64_t n_records, llama_flash_error * err) {
    if (!session) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "residency: no session");
    }
    return guarded(err, [&] { return session->residency(place, age, n_records, err); });
}

int32_t llama_flash_session_reuse(const llama_flash_session * session, uint64_t * counts, llama_flash_error * err) {
    if (!session || !counts || session->forked()) { // in a child the mutex may be another thread's, that there is only in the parent
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "reuse: no session, nowhere to tell it, or a child of the process that loaded the model");
    }
    std::lock_guard<std::mutex> lock(session->mutex);
    std::copy(std::begin(session->reuse), std::end(session->reuse), counts);
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session_memory(const llama_flash_session * session, llama_flash_memory * out) {
    if (!session || !out) {
        return LLAMA_FLASH_E_INVALID;
    }
    std::lock_guard<std::mutex> lock(session->mutex);
    *out = session->memory;
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session_trace(llama_flash_session * session, uint64_t capacity, llama_flash_error * err) {
    if (!session || session->forked()) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "trace: no session, or a child of the process that loaded the model");
    }
    return guarded(err, [&] {
        std::lock_guard<std::mutex> lock(session->mutex);
        session->trace.start(capacity);
        return LLAMA_FLASH_OK;
    });
}

uint64_t llama_flash_session_trace_take(llama_flash_session * session, llama_flash_trace_entry * entries, uint64_t capacity, uint64_t * lost) {
    if (!session || !entries || !lost || session->forked()) {
        return 0;
    }
    std::lock_guard<std::mutex> lock(session->mutex);
    return session->trace.take(entries, capacity, *lost);
}

int32_t llama_flash_session_trace_tensor(const llama_flash_session * session, uint32_t index, llama_flash_trace_tensor * out) {
    if (!session || !out || session->forked()) {
        return LLAMA_FLASH_E_INVALID;
    }
    std::lock_guard<std::mutex> lock(session->mutex);
    return session->trace_tensor(index, *out) ? LLAMA_FLASH_OK : LLAMA_FLASH_E_INVALID;
}

bool llama_flash_abort(void * data) {
    return data && ((const llama_flash_session *) data)->failed();
}

int32_t llama_flash_session_take_error(llama_flash_session * session, llama_flash_error * err) {
    if (!session) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "take_error: no session");
    }
    return guarded(err, [&] { return session->take_error(err); });
}

int32_t llama_flash_session_stats(const llama_flash_session * session, llama_flash_stats * out) {
    if (!session || !out) {
        return LLAMA_FLASH_E_INVALID;
    }
    std::unique_lock<std::mutex> lock(session->mutex, std::defer_lock);
    if (!session->forked()) { // else it may be another thread's, that there is only in the parent
        lock.lock();
    }
    *out                = session->stats;
    out->slots_used     = session->cache.used();
    out->resident_bytes = session->memory.pinned + session->expert_ring.touched() + session->panel_ring.touched() + session->memory.bookkeeping;
    out->neuron_slots_used = session->neurons.used();
    out->resident_bytes += session->slots_touched() + session->memory.resident + session->neurons.touched();
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_get_context_memory(const llama_context * ctx, llama_flash_context_memory * out) {
    if (!ctx || !out) {
        return LLAMA_FLASH_E_INVALID;
    }
    *out = {};
    return guarded(nullptr, [&] {
        for (const auto & entry : llama_get_memory_breakdown(ctx)) {
            const bool flash = entry.first == ggml_backend_flash_buffer_type();
            out->model += flash ? 0 : entry.second.model;
            out->context += entry.second.context;
            out->compute += entry.second.compute;
        }
        return LLAMA_FLASH_OK;
    });
}
