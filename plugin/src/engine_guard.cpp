// Loading a model and making a context, with what the engine would end the process for as an error that has its reason.
//
// The engine reports two ways: what is wrong with a file goes to its log, and an assert ends the process (ggml_abort). Here the
// log is listened to, and while a model is loaded on a thread an assert on that thread is an exception, which the engine catches
// where it catches its own. The engine's C files are compiled so that exceptions pass through them (ci/engine/CMakeLists.txt).
#include "engine_guard.h"

#include "base/status.h"
#include "llama_flash.h"

#include "ggml-impl.h"
#include "ggml-threading.h"
#include "llama-ext.h"
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <pthread.h>
#include <stdexcept>
#include <string>

namespace {

constexpr size_t MOST_TEXT = 16 << 10; // bytes kept of the engine's errors: the last ones say most

// what the engine says on the thread that loads
struct listener {
    std::string errors;           // lines
    bool        is_error = false; // the last line was one: text of the level CONT continues it

    void hear(ggml_log_level level, const char * text) {
        if (level != GGML_LOG_LEVEL_CONT) {
            is_error = level == GGML_LOG_LEVEL_ERROR;
        }
        if (is_error) {
            errors += text;
            if (errors.size() > MOST_TEXT) {
                errors.erase(0, errors.size() - MOST_TEXT);
            }
        }
    }
};

thread_local listener * current = nullptr;

// the engine has one log callback for the process: while models are loaded it is ours, which passes everything on to the one before
struct {
    std::mutex        mutex;
    int               users       = 0;
    ggml_log_callback before      = nullptr;
    void *            before_data = nullptr;
} tap;

// A child that is forked while another thread holds one of these locks would find it locked for ever. So the thread that forks takes
// them first. The engine holds its own for moments only.
void take_locks() {
    tap.mutex.lock();
    ggml_critical_section_start();
}

void give_locks() {
    ggml_critical_section_end();
    tap.mutex.unlock();
}

[[maybe_unused]] const int kept_free = pthread_atfork(take_locks, give_locks, give_locks);

void on_log(ggml_log_level level, const char * text, void * data) {
    if (current) {
        current->hear(level, text);
    }
    if (tap.before) {
        tap.before(level, text, tap.before_data);
    }
    GGML_UNUSED(data);
}

class listening {
  public:
    explicit listening(listener & to) : outer(current) {
        std::lock_guard<std::mutex> lock(tap.mutex);
        if (tap.users++ == 0) {
            llama_log_get(&tap.before, &tap.before_data);
            llama_log_set(on_log, nullptr);
        }
        current = &to;
    }

    ~listening() {
        std::lock_guard<std::mutex> lock(tap.mutex);
        current = outer;
        if (--tap.users == 0) {
            ggml_log_callback now;
            void *            data;
            llama_log_get(&now, &data);
            if (now == on_log) { // else somebody has set another one meanwhile
                llama_log_set(tap.before, tap.before_data);
            }
        }
    }

    listening(const listening &)             = delete;
    listening & operator=(const listening &) = delete;

  private:
    listener * outer;
};

ggml_abort_callback_t abort_before = nullptr;

void on_abort(const char * message) {
    if (current && std::uncaught_exceptions() == 0) {
        throw std::runtime_error(message);
    }
    if (abort_before) {
        abort_before(message);
        return;
    }
    fprintf(stderr, "%s\n", message); // as without a callback
    ggml_print_backtrace();
}

template <typename F> auto guard(char * reason, size_t size, F f) -> decltype(f()) {
    listener      heard;
    decltype(f()) made = nullptr;
    try {
        listening now(heard);
        made = f();
    } catch (const std::bad_alloc &) {
        heard.errors += "\nout of memory";
    } catch (const std::exception & e) {
        heard.errors += std::string("\n") + e.what();
    } catch (...) {
        heard.errors += "\nunknown exception";
    }
    if (reason && size > 0) {
        const size_t n = made ? 0 : std::min(heard.errors.size(), size - 1);
        memcpy(reason, heard.errors.data() + heard.errors.size() - n, n);
        reason[n] = '\0';
    }
    return made;
}

} // namespace

void flash_guard_engine() {
    abort_before = ggml_set_abort_callback(on_abort);
}

llama_model * llama_flash_load_model(const char * path, const llama_model_params * params, char * reason, size_t size) {
    return guard(reason, size, [&] { return llama_model_load_from_file(path, *params); });
}

ggml_cgraph * flash_guarded_graph(llama_context * ctx, uint32_t n_tokens, bool encoder, bool embd) {
    return guard(nullptr, 0, [&] { return llama_graph_build(ctx, n_tokens, encoder, embd); });
}

std::string flash_guarded_call(const std::function<void()> & f) {
    char reason[512] = "";
    bool done        = false;
    guard(reason, sizeof(reason), [&]() -> bool * {
        f();
        done = true;
        return &done;
    });
    return done ? "" : reason[0] ? reason
                                 : "unknown";
}

llama_context * llama_flash_new_context(llama_model * model, const llama_context_params * params, char * reason, size_t size) {
    return guard(reason, size, [&] { return llama_init_from_model(model, *params); });
}
