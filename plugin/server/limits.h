// What clients may ask of llama-server: refused before it is parsed, where possible before it is read.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// python/llama_flash/native/server.py has the same structure. All are at least 1.
struct llama_flash_limits {
    uint64_t max_body;     // bytes of a request's body
    uint64_t max_grammar;  // bytes of a grammar, given or made from a JSON schema
    uint64_t max_memory;   // bytes that all requests together may take
    uint32_t max_depth;    // arrays and objects in each other, in a body
    uint32_t max_requests; // that are answered or wait at the same time
    uint32_t n_ctx;        // tokens of a sequence: no answer is longer
};
}

// For the server that is started next.
void set_limits(const llama_flash_limits & limits);
