// What ffn_op.cpp, ffn_sparse.cpp and ffn_whole.cpp share, and no other file includes.
#pragma once

#include "ops/ffn.h"

#include "ggml-cpu-impl.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

inline uint32_t bit_of(ffn_part part) {
    return 1u << (uint32_t) part;
}

// column i of an op's input or output
inline const float * token(const ggml_tensor * t, int64_t i) {
    return (const float *) ((const char *) t->data + (size_t) i * t->nb[1]);
}

inline float * token_out(ggml_tensor * t, int64_t i) {
    return (float *) ((char *) t->data + (size_t) i * t->nb[1]);
}

// this thread's share of n
inline void share(uint32_t n, const ggml_compute_params * params, uint32_t & first, uint32_t & last) {
    first = (uint32_t) ((uint64_t) n * (uint32_t) params->ith / (uint32_t) params->nth);
    last  = (uint32_t) ((uint64_t) n * ((uint32_t) params->ith + 1) / (uint32_t) params->nth);
}

// converts the tokens of src for k; the caller's thread keeps the result until its next call with the same store
inline const uint8_t * convert(const row_kernel & k, const float * src, size_t stride, int64_t n_tokens, std::vector<uint8_t> & store) {
    store.resize((size_t) n_tokens * k.x_bytes);
    for (int64_t t = 0; t < n_tokens; t++) {
        k.convert((const float *) ((const char *) src + (size_t) t * stride), store.data() + (size_t) t * k.x_bytes);
    }
    return store.data();
}

// the barrier after a leader's decision; false: the op has failed
inline bool agreed(ffn_op & s, const ggml_compute_params * params) {
    if (params->ith == 0) {
        s.stop = s.failed();
    }
    ggml_barrier(params->threadpool);
    return !s.stop;
}

// leader: the threads' lists of neurons, one behind the other
inline void gather(const ffn_work & w, int nth, std::vector<uint32_t> & out) {
    out.clear();
    for (int i = 0; i < nth; i++) {
        out.insert(out.end(), w.picked[(size_t) i].begin(), w.picked[(size_t) i].end());
    }
}

// ffn_sparse.cpp: the active neurons only

void sparse_rows(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op);
void resident_rows(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op, bool choose);
void sparse_sums(ffn_op & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op);

// ffn_whole.cpp: all neurons, in passing

void whole_rows(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op);
void whole_sums(ffn_op & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op);
