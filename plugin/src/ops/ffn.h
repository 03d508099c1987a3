// MUL_MAT with a part of a neuron bundle, MUL_MAT_ID with one of experts: gate, up or down of a feed-forward block. See docs/explanation/neurons.md.
#pragma once

#include "ops/gate.h"
#include "store/neurons.h"
#include "store/records.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

struct ggml_compute_params;
struct ggml_tensor;

// A column of an op: one token's, or, with experts, that of a token and one of its experts.
struct ffn_column {
    uint32_t out; // number in the output (and, for down, in the input)
    uint32_t x;   // in the input
};

// What the threads of an op share. Sized by reserve(), so that nothing is allocated while decoding.
struct ffn_work {
    void   reserve(const std::vector<flash_bundle> & bundles, uint32_t n_ubatch);
    size_t bytes(const std::vector<flash_bundle> & bundles, uint32_t n_ubatch) const;

    // Leader: sorts the op's columns. false: the op is not one that can be computed here.
    bool sort_columns(const flash_bundle & b, ffn_part part, const ggml_tensor * op);

    // the op's columns by the expert (a dense block counts as one) that they go to
    uint32_t                n_tokens = 0;
    bool                    whole    = false; // all neurons of these experts are computed, in passing
    std::vector<uint32_t>   experts;          // that have columns, ascending
    std::vector<uint32_t>   first_column;     // [experts of the layer + 1]: in `columns`
    std::vector<ffn_column> columns;          // ascending, expert by expert

    std::vector<std::vector<uint32_t>> picked;    // by thread: neurons of its range
    std::vector<float>                 projected; // [tokens][rank]
    std::vector<uint16_t>              tokens_of; // by neuron of a dense layer: which tokens it is active for, a bit for each
    std::vector<uint32_t>              list;      // of the op, ascending
    std::vector<uint32_t>              left;      // of the chunk, not there yet
    std::vector<uint32_t>              there;     // of the chunk, to be computed now
    std::vector<uint64_t>              asked;     // by neuron: stamp of the op whose chunk has it
    size_t                             begin = 0; // chunk [begin, end) of the list
    size_t                             end   = 0;
    std::atomic<int64_t>               next{ 0 };
    bool                               land     = false; // reads have arrived
    bool                               same     = false; // the sums made in passing are the ones asked for
    bool                               has_read = false; // the op has computed on bytes that it waited for

    // evaluations of whole layers
    const neuron_store::run * run = nullptr;
    neuron_store::run         home;      // a run of pinned records
    std::vector<uint8_t>      compact;   // rows of one part of the run
    std::vector<float>        other;     // [columns][n_ff]: gate, or the part whose op has not come yet
    std::vector<float>        sums;      // [columns][n_embd]
    std::vector<float>        gathered;  // [columns of an expert][n_embd]: their inputs
    std::vector<float>        rows;      // [columns of an expert][FFN_RUN_ROWS]: gate or up of the run
    std::vector<uint32_t>     value_row; // [columns of an expert][FFN_RUN_ROWS]: rows with a value
    std::vector<float>        value;
    std::vector<uint32_t>     n_values; // [columns of an expert], as many as there is room for
    std::vector<uint32_t>     uses;     // by row of the run: tokens that use it
    std::vector<uint64_t>     digests;  // by thread
};

struct ffn_op {
    // Entered by all threads of the pool. On failure the session has an error, op's data is undefined.
    void run(flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op);

    bool failed() const { return reads.failed(); }

    op_gate &                         gate;
    read_queue &                      reads;
    instruments &                     notes;
    token_clock &                     clock;
    neuron_store &                    neurons;
    const std::vector<flash_bundle> & bundles;
    const llama_flash_neuron_params & neuron_params;

    ffn_work work{};
    bool     stop = false; // the op has failed
};
