#include "bundle_check.h"

#include "base/status.h"

#include <cstdint>
#include <string>
#include <utility>

// bytes, so that sums of a few such products do not overflow
static bool too_many(uint64_t size, uint64_t n) {
    return n > 0 && size > (uint64_t) INT64_MAX / n;
}

// These return what is wrong, nullptr if nothing is.

static const char * check_experts(const llama_flash_bundle & d) {
    if (d.n_expert == 0) {
        return nullptr;
    }
    if (d.n_expert_used == 0 || d.n_expert_used > d.n_expert) {
        return "a token uses some of the experts";
    }
    if (d.split || d.gate.type < 0 || d.up_bias || d.gate_bias || d.predictor_rank > 0) {
        return "bundles of experts have a gate and are not split, and have neither biases nor predictors";
    }
    return nullptr;
}

static bool read_part(const llama_flash_bundle_part & from, uint32_t n_embd, bundle_part & to) {
    to.present = from.type >= 0;
    if (!to.present) {
        return true;
    }
    if (!row_type_supported(from.type) || n_embd % ggml_blck_size((ggml_type) from.type) != 0) {
        return false;
    }
    to.type      = (ggml_type) from.type;
    to.offset    = from.offset;
    to.row_bytes = ggml_row_size(to.type, n_embd);
    return true;
}

static const char * read_parts(const llama_flash_bundle & d, flash_bundle & b) {
    if (!read_part(d.gate, d.n_embd, b.part(ffn_part::gate)) || !read_part(d.up, d.n_embd, b.part(ffn_part::up)) ||
        !read_part(d.down, d.n_embd, b.part(ffn_part::down))) {
        return "a part's type cannot be computed on, or its blocks do not divide the row";
    }
    if (b.gated && d.gate.type != d.up.type) { // one op may compute both, in the work space that the engine gives it for its own type
        return "gate and up differ in type";
    }
    uint64_t end = 0; // parts follow one another: gate, up, down
    for (auto & p : b.parts) {
        if (p.present) {
            if (p.offset != end) {
                return "its parts do not follow one another";
            }
            end += p.row_bytes;
        }
    }
    if (end != d.record_bytes) {
        return "its record is not as long as its parts together";
    }
    if (too_many(d.record_bytes, b.n_neurons)) {
        return "it has more bytes than any file";
    }
    return nullptr;
}

static const char * read_predictor(const llama_flash_bundle & d, predictor & p) {
    if (d.predictor_rank == 0) {
        return nullptr;
    }
    if (!d.predictor_in || !d.predictor_out || !d.predictor_bias) {
        return "its predictor is not complete";
    }
    if (!row_type_supported(d.predictor_in_type) || !row_type_supported(d.predictor_out_type)) {
        return "its predictor's type cannot be computed on";
    }
    const ggml_type in  = (ggml_type) d.predictor_in_type;
    const ggml_type out = (ggml_type) d.predictor_out_type;
    if (d.n_embd % ggml_blck_size(in) != 0 || d.predictor_rank % ggml_blck_size(out) != 0) {
        return "blocks of its predictor's type do not divide the row";
    }
    p.rank = d.predictor_rank;
    p.in   = row_kernel(in, d.n_embd);
    p.out  = row_kernel(out, d.predictor_rank);
    if (too_many(p.in.row_bytes, d.predictor_rank) || too_many(p.out.row_bytes, d.n_ff)) {
        return "its predictor has more bytes than any memory";
    }
    const auto * a = (const uint8_t *) d.predictor_in;
    const auto * c = (const uint8_t *) d.predictor_out;
    p.in_rows.assign(a, a + p.in.row_bytes * d.predictor_rank);
    p.out_rows.assign(c, c + p.out.row_bytes * d.n_ff);
    p.bias.assign(d.predictor_bias, d.predictor_bias + d.n_ff);
    return nullptr;
}

static const char * read_bundle(const llama_flash_bundle & d, uint64_t first, flash_bundle & b) {
    if (d.n_ff == 0 || d.n_embd == 0 || d.up.type < 0 || d.down.type < 0) {
        return "a bundle has an up and a down part of some length";
    }
    if (d.activation > LLAMA_FLASH_DRELU) {
        return "its activation is not known";
    }
    const uint64_t n_neurons = (uint64_t) d.n_ff * b.n_blocks();
    if (first + n_neurons > INT32_MAX) {
        return "the model has more neurons than can be numbered";
    }
    b.n_neurons  = (uint32_t) n_neurons;
    b.first      = (uint32_t) first;
    b.activation = (llama_flash_activation) d.activation;
    if (const char * what = check_experts(d)) {
        return what;
    }
    b.n_expert_used = d.n_expert > 0 ? d.n_expert_used : 1;
    if (const char * what = read_parts(d, b)) {
        return what;
    }
    if (d.up_bias) {
        b.up_bias.assign(d.up_bias, d.up_bias + d.n_ff);
    }
    if (d.gate_bias) {
        b.gate_bias.assign(d.gate_bias, d.gate_bias + d.n_ff);
    }
    return read_predictor(d, b.predict);
}

int32_t make_bundle(const llama_flash_bundle & d, const std::vector<flash_bundle> & before, flash_bundle & out, llama_flash_error * err) {
    flash_bundle b;
    b.name         = "blk." + std::to_string(d.layer) + (d.n_expert > 0 ? ".ffn_bundle_exps.weight" : ".ffn_bundle.weight");
    b.layer        = d.layer;
    b.n_expert     = d.n_expert;
    b.n_ff         = d.n_ff;
    b.n_embd       = d.n_embd;
    b.split        = d.split != 0;
    b.gated        = d.gate.type >= 0;
    b.record_bytes = d.record_bytes;
    b.threshold    = d.threshold;
    b.index        = (uint32_t) before.size();
    if (const char * what = read_bundle(d, before.empty() ? 0 : before.back().first + before.back().n_neurons, b)) {
        return flash_fail(err, LLAMA_FLASH_E_FORMAT, "tensor %s: %s", b.name.c_str(), what);
    }
    out = std::move(b);
    return LLAMA_FLASH_OK;
}
