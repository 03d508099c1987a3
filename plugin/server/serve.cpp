// llama-server as two C functions, compiled into its library: for a program that has signal handlers and an exit of its own, and that
// loads and computes through hooks (llama-ext.h). Of arguments that end the process (--help, --version, --completion-bash) none may
// be given.
#include "answers.h"
#include "arg.h"
#include "chat.h"
#include "common.h"
#include "ggml.h"
#include "limits.h"
#include "llama.h"
#include "log.h"
#include "server-context.h"
#include "server-http.h"
#include "server-stream.h"
#include "src/llama-ext.h"
#include "ui.h"

#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

int                                                                llama_server(common_params & params, int argc, char ** argv);
void                                                               llama_server_terminate();
extern std::function<void(server_routes &, server_http_context &)> llama_server_extend_routes;

#define SERVE_API extern "C" __attribute__((visibility("default")))

// Writes, with llama_flash_serve_write, what the program has to say on a page of the server's: members for the object of HEALTH, text
// in Prometheus' format for METRICS. Called by the threads of HTTP, several at once, while the server computes.
enum llama_flash_page { LLAMA_FLASH_PAGE_HEALTH  = 0,
                        LLAMA_FLASH_PAGE_METRICS = 1 };
typedef void (*llama_flash_tell_t)(int page, void * to);

// States of prompts that the program keeps: server_prompt_hooks of server-context.h. Called by the thread of the server's main loop.
struct llama_flash_prompt_hooks {
    int32_t block;
    int32_t (*recall)(llama_context * ctx, int32_t seq, const int32_t * tokens, size_t n_tokens, int32_t n_past, int32_t other, int32_t n_other,
                      const char * adapters);
    bool (*keep)(llama_context * ctx, int32_t seq, const int32_t * tokens, size_t n_tokens, int64_t stamp, bool all_idle, const char * adapters);
};

// A sequence that goes on with the next pass: its number, its text, and room for tokens that may follow.
typedef struct llama_flash_draft {
    int32_t         sequence;
    int32_t         n_text;
    const int32_t * text;
    int32_t         n_max;    // of them that can be of use, at most
    int32_t         n_room;   // that `tokens` has room for
    int32_t         n_tokens; // that were written
    int32_t *       tokens;
} llama_flash_draft;

// A sequence that computes of its prompt in the next pass, and how many tokens are left of that.
typedef struct llama_flash_ahead {
    int32_t sequence;
    int32_t n_tokens;
} llama_flash_ahead;

// Makes drafts of n of the n_generating sequences that go on with the next pass. Called on the server's thread.
typedef void (*llama_flash_make_drafts_t)(int n_generating, llama_flash_draft * drafts, int n, const llama_flash_ahead * prompts, int n_prompts);

// Whether n_new prompts wait for the next pass. Called on the server's thread, before each pass that could begin some.
typedef bool (*llama_flash_holds_prompts_t)(int n_new, int n_begun);

SERVE_API int  llama_flash_serve(int argc, char ** argv, const llama_hooks * hooks, llama_flash_tell_t tell,
                                 const llama_flash_limits * limits, const llama_flash_prompt_hooks * prompts,
                                 llama_flash_make_drafts_t make_drafts, llama_flash_holds_prompts_t holds_prompts);
SERVE_API void llama_flash_serve_write(void * to, const char * text, size_t size);
SERVE_API void llama_flash_serve_stop();
SERVE_API bool llama_flash_serve_template(const char * text, char * error, size_t n_error);

static server_http_context::handler_t with(const server_http_context::handler_t & page, int which, llama_flash_tell_t tell) {
    return [page, which, tell](const server_http_req & request) -> server_http_res_ptr {
        server_http_res_ptr response = page(request);
        if (response->status != 200) {
            return response;
        }
        std::string said;
        tell(which, &said);
        if (which == LLAMA_FLASH_PAGE_METRICS) {
            response->data += said + told_answers();
        } else if (!said.empty()) {
            auto members = nlohmann::ordered_json::parse(response->data);
            members.update(nlohmann::ordered_json::parse(said));
            response->data = members.dump(); // a throw becomes status 500
        }
        return response;
    };
}

static void set_prompts(const llama_flash_prompt_hooks & prompts) {
    const auto recall = prompts.recall;
    const auto keep   = prompts.keep;

    llama_server_prompt_hooks.block  = prompts.block;
    llama_server_prompt_hooks.recall = [recall](llama_context * ctx, llama_seq_id seq, const llama_tokens & tokens, int32_t n_past, llama_seq_id other,
                                                int32_t n_other, const std::string & adapters) {
        return recall(ctx, seq, tokens.data(), tokens.size(), n_past, other, n_other, adapters.c_str());
    };
    llama_server_prompt_hooks.keep = [keep](llama_context * ctx, llama_seq_id seq, const llama_tokens & tokens, int64_t stamp, bool all_idle,
                                            const std::string & adapters) {
        return keep(ctx, seq, tokens.data(), tokens.size(), stamp, all_idle, adapters.c_str());
    };
}

static const int32_t MOST_DRAFTED = 15; // tokens: the most that are asked for (planning/drafted.py)

static void ask_for_drafts(llama_flash_make_drafts_t make_drafts, int n_generating, std::vector<server_draft> & drafts,
                           const std::vector<server_prompt_ahead> & prompts) {
    std::vector<llama_flash_draft> asked;
    asked.reserve(drafts.size());
    for (auto & draft : drafts) {
        draft.result.resize(std::max(0, std::min(draft.n_room, MOST_DRAFTED)));
        const auto n_room = (int32_t) draft.result.size();
        asked.push_back({ draft.id_slot, (int32_t) draft.text->size(), draft.text->data(), std::max(0, std::min(draft.n_max, n_room)), n_room,
                          0, draft.result.data() });
    }
    std::vector<llama_flash_ahead> ahead;
    ahead.reserve(prompts.size());
    for (const auto & prompt : prompts) {
        ahead.push_back({ prompt.id_slot, prompt.n_tokens });
    }
    make_drafts(n_generating, asked.data(), (int) asked.size(), ahead.data(), (int) ahead.size());
    for (size_t i = 0; i < drafts.size(); i++) {
        drafts[i].result.resize(std::min((size_t) std::max(0, asked[i].n_tokens), drafts[i].result.size()));
    }
}

// What a browser is told where there is no page to chat.
static server_http_res_ptr in_place_of_the_page(bool off) {
    auto response          = std::make_unique<server_http_res>();
    response->content_type = "text/plain; charset=utf-8";
    response->data         = "This is llama-flash, a server with OpenAI's interface: give a client the address http://.../v1\n";
    if (off) {
        response->data += "Its page for chats is off (--no-page).\n";
    } else {
        response->data += "It was built without its page for chats. To have that: install npm, which comes with Node.js, run `make ui` ";
        response->data += "where llama-flash was built, and start this server again.\n";
    }
    return response;
}

// Serves until it is stopped. Returns 0 then, and 1 if it did not begin: why is in the log, or known to the hooks. argv is llama-server's
// and ends with a null pointer; nothing but argv and the environment says what is served. The hooks are called on this thread, freed
// also where else a model is freed. prompts: NULL where none are kept. make_drafts: NULL where there are none. holds_prompts: NULL where
// each begins at once.
int llama_flash_serve(int argc, char ** argv, const llama_hooks * hooks, llama_flash_tell_t tell, const llama_flash_limits * limits,
                      const llama_flash_prompt_hooks * prompts, llama_flash_make_drafts_t make_drafts,
                      llama_flash_holds_prompts_t holds_prompts) {
    int               result = 1;
    ggml_log_callback log; // of the process, which goes on
    void *            log_data;
    llama_log_get(&log, &log_data);
    try {
        // threads of HTTP come and go: with an arena for each, what large requests have freed would stay with the process
        mallopt(M_ARENA_MAX, 4);
        mallopt(M_MMAP_THRESHOLD, 256 << 10); // fixed: texts that are large are given back when they are freed
        set_limits(*limits);
        llama_set_hooks(*hooks);
        if (prompts) {
            set_prompts(*prompts);
        }
        if (make_drafts != nullptr) {
            llama_server_make_drafts = [make_drafts](int n_generating, std::vector<server_draft> & drafts,
                                                     const std::vector<server_prompt_ahead> & prompts) {
                ask_for_drafts(make_drafts, n_generating, drafts, prompts);
            };
        }
        if (holds_prompts != nullptr) {
            llama_server_holds_prompts = holds_prompts;
        }
        common_params_set_config_files(false); // they could set what has been counted
        common_init();
        common_params params;
        llama_server_extend_routes = [tell, &params](server_routes & routes, server_http_context & http) {
            routes.get_health  = with(routes.get_health, LLAMA_FLASH_PAGE_HEALTH, tell);
            routes.get_metrics = with(routes.get_metrics, LLAMA_FLASH_PAGE_METRICS, tell);
            if (!params.ui || llama_ui_get_assets().empty()) {
                http.get("/", [off = !params.ui](const server_http_req &) { return in_place_of_the_page(off); });
            }
        };
        if (common_params_parse(argc, argv, params, LLAMA_EXAMPLE_SERVER)) {
            server_stream_session_manager_start(); // the server itself stops it
            llama_backend_init();
            llama_numa_init(params.numa);
            result = llama_server(params, argc, nullptr); // without argv: no signal handlers, no downloads, no router
        }
    } catch (const std::exception & error) {
        fprintf(stderr, "llama-server: %s\n", error.what());
    } catch (...) {
        fprintf(stderr, "llama-server: unknown exception\n");
    }
    common_log_flush(common_log_main());
    llama_log_set(log, log_data);
    llama_server_extend_routes = nullptr;
    llama_server_prompt_hooks  = {};
    llama_server_make_drafts   = nullptr;
    llama_server_holds_prompts = nullptr;
    llama_set_hooks({});
    return result;
}

void llama_flash_serve_write(void * to, const char * text, size_t size) {
    static_cast<std::string *>(to)->append(text, size);
}

// From any thread, while the server answers.
void llama_flash_serve_stop() {
    llama_server_terminate();
}

// Whether llama-server's parser takes the text as a chat template: one that it does not take would end the process. Else why not, in
// error.
bool llama_flash_serve_template(const char * text, char * error, size_t n_error) {
    try {
        const common_chat_template parsed(text, "", ""); // what follows says that it cannot be parsed, and not why
        common_chat_msg            message;
        message.role    = "user";
        message.content = "test";
        common_chat_templates_inputs inputs;
        inputs.messages      = { message };
        const auto templates = common_chat_templates_init(nullptr, text);
        common_chat_templates_apply(templates.get(), inputs);
        return true;
    } catch (const std::exception & failure) {
        snprintf(error, n_error, "%s", failure.what());
    } catch (...) {
        snprintf(error, n_error, "unknown exception");
    }
    return false;
}
