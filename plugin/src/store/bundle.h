// One layer's neuron bundles: where each part of each neuron lies in the file, and in a slot (docs/reference/format.md). Plain data.
#pragma once

#include "io/reader.h"
#include "kernels/predictor.h"
#include "kernels/shadow.h"
#include "llama_flash.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

enum class ffn_part : uint8_t { gate,
                                up,
                                down };
constexpr size_t FFN_PARTS = 3;

// Neurons of a run that are computed together: a multiple of every kernel's interleave.
constexpr uint32_t FFN_RUN_ROWS = 256;

struct bundle_part {
    bool            present     = false;
    ggml_type       type        = GGML_TYPE_F32;
    uint64_t        offset      = 0;     // in a record; times n_ff if split
    size_t          row_bytes   = 0;     // one neuron's
    size_t          slot_offset = 0;     // in a slot, if cached
    bool            cached      = false; // comes from flash; else resident
    ggml_tensor     weight      = {};    // as the loader presents it: the label and shape of the graph's tensor
    stock_kernel    kernel;              // gate and up
    const uint8_t * resident = nullptr;  // all rows in the kernel's layout, if not cached
};

// What of a record is read at once: parts that are neighbours in the file.
struct bundle_stream {
    uint64_t base;   // first byte of neuron 0's, from the tensor's begin
    uint64_t stride; // from one neuron to the next
    size_t   bytes;  // of one neuron
    size_t   slot_offset;
};

struct flash_bundle {
    std::string            name; // of the tensor in the file
    int32_t                layer         = 0;
    uint32_t               n_ff          = 0; // neurons of the block, or of each expert
    uint32_t               n_embd        = 0;
    uint32_t               n_expert      = 0; // 0: a dense block
    uint32_t               n_expert_used = 1; // blocks that a token passes through, at most
    uint32_t               n_neurons     = 0; // neuron i of expert e is number e * n_ff + i
    bool                   split         = false;
    bool                   gated         = false;
    uint64_t               record_bytes  = 0;
    llama_flash_activation activation    = LLAMA_FLASH_RELU;
    float                  threshold     = 0.0f;
    bundle_part            parts[FFN_PARTS];
    std::vector<float>     up_bias; // [n_ff] or empty
    std::vector<float>     gate_bias;
    predictor              predict;

    const flash_file * file   = nullptr;
    uint64_t           offset = 0; // of the tensor in the file
    uint32_t           first  = 0; // number of its first neuron among the session's
    uint32_t           index  = 0; // among the session's bundles

    std::vector<bundle_stream> streams;          // of what is cached
    size_t                     cached_bytes = 0; // of one neuron

    // records [0, n_pinned) lie whole, one after the other, at `home`
    uint32_t        n_pinned    = 0;
    const uint8_t * home        = nullptr;
    int32_t         home_memory = -1; // in neuron_store's homes

    // evaluation in progress (ffn.cpp)
    uint32_t              done     = 0;         // parts computed, a bit each
    bool                  chosen   = false;     // `active` holds the active set
    bool                  by_token = false;     // and each token has its own part of it (ffn_work::tokens_of)
    std::vector<uint32_t> active;               // ascending
    size_t                counted      = 0;     // of `active`, in the statistics
    uint64_t              tokens       = 0;     // number of the last token computed
    bool                  fused        = false; // the down sums of this evaluation are there already
    uint64_t              fused_tokens = 0;
    uint64_t              fused_digest = 0;

    void forget_evaluation() {
        done     = 0;
        chosen   = false;
        by_token = false;
        fused    = false;
    }

    bundle_part &       part(ffn_part p) { return parts[(size_t) p]; }
    const bundle_part & part(ffn_part p) const { return parts[(size_t) p]; }

    // where part p of neuron i lies in a whole bundle that begins at `data`
    const uint8_t * in_bundle(const uint8_t * data, ffn_part p, uint32_t i) const {
        const bundle_part & q = part(p);
        return data + (split ? n_ff * q.offset + i * q.row_bytes : i * record_bytes + q.offset);
    }

    uint64_t tensor_bytes() const { return record_bytes * n_neurons; }

    uint32_t n_blocks() const { return n_expert > 0 ? n_expert : 1; }

    // the expert that neuron i belongs to
    uint32_t block_of(uint32_t i) const { return n_expert > 0 ? i / n_ff : 0; }

    // value of a block's neuron i whose gate and up (biases not yet added) are g and u
    float value(uint32_t i, float g, float u) const {
        if (!up_bias.empty()) {
            u += up_bias[i];
        }
        if (!gate_bias.empty()) {
            g += gate_bias[i];
        }
        switch (activation) {
            case LLAMA_FLASH_RELU:    return gated ? (g > 0.0f ? g * u : 0.0f) : (u > 0.0f ? u : 0.0f);
            case LLAMA_FLASH_RELU2:   return gated ? (g > 0.0f ? g * g * u : 0.0f) : (u > 0.0f ? u * u : 0.0f);
            case LLAMA_FLASH_FATRELU: return g > threshold ? g * u : 0.0f;
            case LLAMA_FLASH_DRELU:   return g > 0.0f && u > 0.0f ? g * u : 0.0f;
        }
        return 0.0f;
    }

    // whether a gated neuron can have a value, by its gate alone (bias not yet added)
    bool gate_open(uint32_t i, float g) const {
        return g + (gate_bias.empty() ? 0.0f : gate_bias[i]) > (activation == LLAMA_FLASH_FATRELU ? threshold : 0.0f);
    }
};
