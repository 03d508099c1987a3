// The C interface: argument checks, and no exception beyond this file.
#include "llama_flash.h"

#include "base/status.h"
#include "buffer_type.h"
#include "device_memory.h"
#include "observe/residency.h"
#include "session.h"
#include "store/warm.h"

#include "llama-ext.h"

#include <algorithm>
#include <cstdio>
#include <iterator>

uint32_t llama_flash_api_version(void) {
    return LLAMA_FLASH_API_VERSION;
}

const char * llama_flash_build_info(void) {
#ifdef LLAMA_FLASH_HAVE_URING
    return "llama-flash " LLAMA_FLASH_VERSION ", io_uring and pread";
#else
    return "llama-flash " LLAMA_FLASH_VERSION ", pread";
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
    if (!bundle) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_bundle: no bundle");
    }
    return with_session(session, "add_bundle", err, [&] { return session->add_bundle(*bundle, err); });
}

int32_t llama_flash_session_add_rows(llama_flash_session * session, const char * name, bool only, llama_flash_error * err) {
    if (!name) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_rows: no name");
    }
    return with_session(session, "add_rows", err, [&] { return session->add_rows(name, only, err); });
}

int32_t llama_flash_session_add_router(llama_flash_session * session, const char * experts, const float * weight, const float * norm, uint32_t n_embd,
                                       uint32_t n_expert, llama_flash_error * err) {
    if (!experts || !weight || n_embd == 0 || n_expert == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "add_router: no name or no weights");
    }
    return with_session(session, "add_router", err, [&] { return session->add_router(experts, router_values(weight, norm, n_embd, n_expert), err); });
}

int32_t llama_flash_session_set_neurons(llama_flash_session * session, const llama_flash_neuron_params * params, llama_flash_error * err) {
    if (!params) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_neurons: no parameters");
    }
    return with_session(session, "set_neurons", err, [&] { return session->set_neurons(*params, err); });
}

int32_t llama_flash_session_bind_begin(llama_flash_session * session, llama_flash_error * err) {
    return with_session(session, "bind_begin", err, [&]() -> int32_t {
        if (session->bound) {
            return flash_fail(err, LLAMA_FLASH_E_INVALID, "bind_begin: the session already has a model");
        }
        flash_set_binding_session(session);
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_session_bind_end(llama_flash_session * session, llama_flash_error * err) {
    flash_set_binding_session(nullptr);
    return with_session(session, "bind_end", err, [&] { return session->end_binding(err); });
}

int32_t llama_flash_session_requirements(const llama_flash_session * session, llama_flash_requirements * out) {
    if (!out) {
        return LLAMA_FLASH_E_INVALID;
    }
    *out = {};
    return with_session(session, "requirements", nullptr, [&]() -> int32_t {
        if (!session->bound) {
            return LLAMA_FLASH_E_INVALID;
        }
        *out = session->requirements();
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_session_divide(const llama_flash_session * session, uint64_t bytes, llama_flash_memory * out, llama_flash_error * err) {
    if (!out) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "divide: nowhere to tell it");
    }
    *out = {};
    return with_session(session, "divide", err, [&] { return session->divided(bytes, *out, err); });
}

int32_t llama_flash_session_set_memory(llama_flash_session * session, uint64_t bytes, llama_flash_error * err) {
    return with_session(session, "set_memory", err, [&] { return session->set_memory(bytes, err); });
}

int32_t llama_flash_session_resize(llama_flash_session * session, uint64_t bytes, bool urgent, llama_flash_resize * out, llama_flash_error * err) {
    if (!out) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "resize: nowhere to tell how far it has come");
    }
    *out = {};
    return with_session(session, "resize", err, [&] { return session->resize(bytes, urgent, *out, err); });
}

int32_t llama_flash_session_few_tokens(llama_flash_session * session, bool few, llama_flash_error * err) {
    return with_session(session, "few_tokens", err, [&] { return session->few_tokens(few, err); });
}

uint64_t llama_flash_session_hot(const llama_flash_session * session, uint64_t * ids, uint64_t capacity) {
    uint64_t n = 0;
    with_session(session, "hot", nullptr, [&] {
        n = hot_records(session->experts, session->neurons, ids, ids ? capacity : 0);
        return LLAMA_FLASH_OK;
    });
    return n;
}

int32_t llama_flash_session_warm(llama_flash_session * session, const uint64_t * ids, uint64_t n, uint64_t * done, llama_flash_error * err) {
    if (!ids || !done) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "warm: no records or nowhere to tell how far it has come");
    }
    *done = 0;
    return with_session(session, "warm", err, [&] { return session->warm(ids, n, *done, err); });
}

uint64_t llama_flash_session_tensors(const llama_flash_session * session, llama_flash_tensor * out, uint64_t capacity) {
    uint64_t n = 0;
    with_session(session, "tensors", nullptr, [&] {
        n = describe_tensors(*session, out, out ? capacity : 0);
        return LLAMA_FLASH_OK;
    });
    return n;
}

int32_t llama_flash_session_residency(const llama_flash_session * session, uint8_t * place, uint32_t * age, uint64_t n_records, llama_flash_error * err) {
    return with_session(session, "residency", err, [&] { return residency(*session, place, age, n_records, err); });
}

int32_t llama_flash_session_reuse(const llama_flash_session * session, uint64_t * counts, llama_flash_error * err) {
    if (!counts) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "reuse: nowhere to tell it");
    }
    return with_session(session, "reuse", err, [&] {
        std::copy(std::begin(session->notes.reuse), std::end(session->notes.reuse), counts);
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_session_memory(const llama_flash_session * session, llama_flash_memory * out) {
    if (!out) {
        return LLAMA_FLASH_E_INVALID;
    }
    *out = {};
    return with_session(session, "memory", nullptr, [&] {
        *out = session->memory;
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_session_trace(llama_flash_session * session, uint64_t capacity, llama_flash_error * err) {
    return with_session(session, "trace", err, [&] {
        session->notes.trace.start(capacity);
        return LLAMA_FLASH_OK;
    });
}

uint64_t llama_flash_session_trace_take(llama_flash_session * session, llama_flash_trace_entry * entries, uint64_t capacity, uint64_t * lost) {
    uint64_t n = 0;
    if (entries && lost) {
        *lost = 0;
        with_session(session, "trace_take", nullptr, [&] {
            n = session->notes.trace.drain(entries, capacity, *lost);
            return LLAMA_FLASH_OK;
        });
    }
    return n;
}

int32_t llama_flash_session_trace_tensor(const llama_flash_session * session, uint32_t index, llama_flash_trace_tensor * out) {
    if (!out) {
        return LLAMA_FLASH_E_INVALID;
    }
    *out = {};
    return with_session(session, "trace_tensor", nullptr,
                        [&] { return trace_tensor(*session, index, *out) ? LLAMA_FLASH_OK : LLAMA_FLASH_E_INVALID; });
}

bool llama_flash_abort(void * data) {
    const auto * session = (const llama_flash_session *) data;
    return session && (session->failed() || session->forked());
}

uint64_t llama_flash_session_waiting(const llama_flash_session * session, llama_flash_error * read) {
    uint64_t ns = 0;
    guarded(read, [&] {
        const waited_read now = session && !session->forked() ? session->reads.waited_for().look() : waited_read{};
        if (read && now.ns > 0) {
            flash_fail(read, LLAMA_FLASH_E_READ, "a read of %s at offset %llu (%llu bytes) has not ended for %.1f s", now.file.c_str(),
                       (unsigned long long) now.offset, (unsigned long long) now.size, (double) now.ns / 1e9);
            snprintf(read->file, sizeof(read->file), "%s", now.file.c_str());
            read->offset = now.offset;
            read->size   = now.size;
        }
        ns = (uint64_t) now.ns;
        return LLAMA_FLASH_OK;
    });
    return ns;
}

int32_t llama_flash_session_take_error(llama_flash_session * session, llama_flash_error * err) {
    return with_session(session, "take_error", err, [&] { return session->take_error(err); });
}

int32_t llama_flash_session_stats(const llama_flash_session * session, llama_flash_stats * out) {
    if (!out) {
        return LLAMA_FLASH_E_INVALID;
    }
    *out = {};
    return with_session(session, "stats", nullptr, [&] {
        *out = session->statistics();
        return LLAMA_FLASH_OK;
    });
}

int32_t llama_flash_get_context_memory(const llama_context * ctx, llama_flash_context_memory * out) {
    if (!ctx || !out) {
        return LLAMA_FLASH_E_INVALID;
    }
    *out = {};
    return guarded(nullptr, [&] {
        for (const auto & entry : llama_get_memory_breakdown(ctx)) {
            const bool flash = entry.first == ggml_backend_flash_buffer_type();
            if (is_device_memory(entry.first)) {
                continue; // a worker's, or a card's
            }
            out->model += flash ? 0 : entry.second.model;
            out->context += entry.second.context;
            out->compute += entry.second.compute;
        }
        return LLAMA_FLASH_OK;
    });
}

uint64_t llama_flash_load_staging(void) {
    uint64_t bytes = 0;
    guarded(nullptr, [&] {
        bytes = load_staging();
        return LLAMA_FLASH_OK;
    });
    return bytes;
}

int32_t llama_flash_discard_compute(llama_context * ctx) {
    if (!ctx) {
        return LLAMA_FLASH_E_INVALID;
    }
    return guarded(nullptr, [&] {
        llama_discard_compute(ctx);
        return LLAMA_FLASH_OK;
    });
}
