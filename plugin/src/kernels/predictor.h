// Low-rank predictors: which neurons will be active, from the feed-forward block's input (docs/reference/format.md). Knows no files, no slots.
#pragma once

#include "kernels/sparse.h"

#include <cstdint>
#include <vector>

struct predictor {
    uint32_t             rank = 0; // 0: none
    row_kernel           in;       // [rank] rows of n_embd
    row_kernel           out;      // [n_ff] rows of rank
    std::vector<uint8_t> in_rows;
    std::vector<uint8_t> out_rows;
    std::vector<float>   bias; // [n_ff]

    // projected[t * rank + r] for rows r = ith, ith + nth, ...; x: tokens of n_embd, converted for `in`
    void project(const uint8_t * x, size_t x_bytes, int64_t n_tokens, int ith, int nth, float * projected) const;

    // appends the neurons of [first, last) that any token needs; projected: converted for `out`. tokens[i]: which ones need neuron i, a bit
    // for each of the first 16; nullptr: nobody asks.
    void select(const uint8_t * projected, size_t projected_bytes, int64_t n_tokens, uint32_t first, uint32_t last, std::vector<uint32_t> & active,
                uint16_t * tokens) const;
};
