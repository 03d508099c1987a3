// What the next layer's router will choose, guessed before its input is known: its weights applied to this layer's input of the
// feed-forward block. The residual stream changes little from layer to layer, so most of the guesses are right.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// One whose values somebody else has read.
struct router_values {
    router_values(const float * weight, const float * norm, uint32_t n_embd, uint32_t n_expert) : weight(weight, weight + (size_t) n_expert * n_embd), norm(norm, norm ? norm + n_embd : norm), n_embd(n_embd), n_expert(n_expert) {}

    std::vector<float> weight; // [n_expert] rows of n_embd
    std::vector<float> norm;   // [n_embd], or empty
    uint32_t           n_embd;
    uint32_t           n_expert;
};

// The router that made the ids of a MUL_MAT_ID, found by following the graph from them.
struct router {
    const float * weight   = nullptr; // [n_expert] rows of n_embd; nullptr: none that we could compute
    const float * norm     = nullptr; // [n_embd], weights of the norm that its input has passed; nullptr: none
    uint32_t      n_embd   = 0;
    uint32_t      n_expert = 0;

    router() = default;
    explicit router(const router_values & v) : weight(v.weight.data()), norm(v.norm.empty() ? nullptr : v.norm.data()), n_embd(v.n_embd), n_expert(v.n_expert) {}

    static router of(const ggml_tensor * op);

    // the tensors of which `of` takes the values, wherever they lie
    struct tensors {
        const ggml_tensor * weight = nullptr;
        const ggml_tensor * norm   = nullptr;
    };
    static tensors named(const ggml_tensor * op);

    // the product that the ids of a MUL_MAT_ID come from; nullptr: none was found
    static const ggml_tensor * product(const ggml_tensor * op);
};

// input[n_embd] of the router `here`, rescaled to what the next layer's norm would make of it
void input_for(const router & here, const router & next, const float * input, std::vector<float> & out);

// scores[e] for experts e = ith, ith + nth, ...
void score_experts(const router & r, const float * input, int ith, int nth, float * scores);
