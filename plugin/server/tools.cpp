// The engine's tools as one C function, compiled into a library of their own: for a program that loads and computes through hooks
// (llama-ext.h), as serve.cpp is for llama-server. They are used to being a process: some of their options and errors end it.
#include "common.h"
#include "log.h"
#include "src/llama-ext.h"

#include <cstdio>
#include <cstring>
#include <exception>

int llama_bench(int argc, char ** argv);
int llama_cli(int argc, char ** argv);
int llama_imatrix(int argc, char ** argv);
int llama_perplexity(int argc, char ** argv);
int llama_quantize(int argc, char ** argv);

namespace {

struct tool {
    const char * name; // as the program is called
    int (*main)(int argc, char ** argv);
};

const tool tools[] = {
    { "llama-bench", llama_bench },
    { "llama-cli", llama_cli },
    { "llama-imatrix", llama_imatrix },
    { "llama-perplexity", llama_perplexity },
    { "llama-quantize", llama_quantize },
};

int run(const tool & which, int argc, char ** argv) {
    int status = 1;
    try {
        status = which.main(argc, argv);
    } catch (const std::exception & error) {
        fprintf(stderr, "%s: %s\n", which.name, error.what());
    } catch (...) {
        fprintf(stderr, "%s: unknown exception\n", which.name);
    }
    common_log_flush(common_log_main());
    fflush(nullptr);
    return status;
}

} // namespace

#define TOOLS_API extern "C" __attribute__((visibility("default")))

TOOLS_API int llama_flash_tool(int argc, char ** argv, const llama_hooks * hooks);

// Runs the tool that argv[0] names. Returns its exit status, -1 if there is no such tool. argv ends with a null pointer. The hooks are
// called on this thread, or on that of llama-cli's server.
int llama_flash_tool(int argc, char ** argv, const llama_hooks * hooks) {
    for (const tool & which : tools) {
        if (strcmp(which.name, argv[0]) == 0) {
            llama_set_hooks(*hooks);
            const int status = run(which, argc, argv);
            llama_set_hooks({});
            return status;
        }
    }
    return -1;
}
