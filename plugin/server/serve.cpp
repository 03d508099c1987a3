// llama-server as two C functions, compiled into its library: for a program that has signal handlers and an exit of its own, and that
// loads and computes through hooks (llama-ext.h). Of arguments that end the process (--help, --version, --completion-bash) none may
// be given.
#include "arg.h"
#include "common.h"
#include "ggml.h"
#include "llama.h"
#include "log.h"
#include "server-stream.h"
#include "src/llama-ext.h"

#include <cstdio>
#include <exception>

int  llama_server(common_params & params, int argc, char ** argv);
void llama_server_terminate();

#define SERVE_API extern "C" __attribute__((visibility("default")))

SERVE_API int  llama_flash_serve(int argc, char ** argv, const llama_hooks * hooks);
SERVE_API void llama_flash_serve_stop();

// Serves until it is stopped. Returns 0 then, and 1 if it did not begin: why is in the log, or known to the hooks. argv is llama-server's
// and ends with a null pointer. The hooks are called on this thread, freed also where else a model is freed.
int llama_flash_serve(int argc, char ** argv, const llama_hooks * hooks) {
    int result = 1;
    try {
        llama_set_hooks(*hooks);
        common_init();
        common_params params;
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
    llama_set_hooks({});
    return result;
}

// From any thread, while the server answers.
void llama_flash_serve_stop() {
    llama_server_terminate();
}
