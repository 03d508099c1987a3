// The work space of a feed-forward block's ops, and the order of their columns.
#include "ops/ffn.h"

#include "ggml.h"

#include <algorithm>

// work space

static size_t max_of(const std::vector<flash_bundle> & bundles, size_t (*f)(const flash_bundle &)) {
    size_t most = 0;
    for (const auto & b : bundles) {
        most = std::max(most, f(b));
    }
    return most;
}

static size_t widest_row(const flash_bundle & b) {
    return std::max(b.part(ffn_part::up).row_bytes, b.part(ffn_part::gate).row_bytes);
}

// floats that a whole evaluation keeps for each token: a gated block's other part, the sums of down, an expert's input and rows
static size_t floats_of_token(const flash_bundle & b) {
    return (size_t) b.n_expert_used * ((b.gated ? b.n_ff : 0) + b.n_embd) + (b.n_expert > 0 ? b.n_embd + FFN_RUN_ROWS : 0);
}

void ffn_work::reserve(const std::vector<flash_bundle> & bundles, uint32_t n_ubatch) {
    const size_t n_neurons = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_neurons; });
    const size_t n_blocks  = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_blocks(); });
    const size_t n_used    = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_expert_used; });
    const size_t n_other   = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.gated ? (size_t) b.n_expert_used * b.n_ff : 0; });
    const size_t n_sums    = max_of(bundles, [](const flash_bundle & b) -> size_t { return (size_t) b.n_expert_used * b.n_embd; });
    const size_t n_input   = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_expert > 0 ? b.n_embd : 0; });
    const size_t rank      = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.predict.rank; });
    experts.reserve(n_blocks);
    first_column.reserve(n_blocks + 1);
    columns.reserve(n_used * n_ubatch);
    projected.resize(DECODE_TOKENS * rank);
    tokens_of.resize(rank > 0 ? n_neurons : 0);
    list.reserve(n_neurons);
    left.reserve(n_neurons);
    there.reserve(n_neurons);
    asked.assign(n_neurons, 0);
    compact.resize(max_of(bundles, widest_row) * FFN_RUN_ROWS);
    other.resize(n_other * n_ubatch);
    sums.resize(n_sums * n_ubatch);
    gathered.resize(n_input * n_ubatch);
    rows.resize(n_input ? (size_t) n_ubatch * FFN_RUN_ROWS : 0);
    value_row.resize((size_t) n_ubatch * FFN_RUN_ROWS);
    value.resize((size_t) n_ubatch * FFN_RUN_ROWS);
    n_values.resize(n_ubatch);
    uses.resize(FFN_RUN_ROWS);
}

size_t ffn_work::bytes(const std::vector<flash_bundle> & bundles, uint32_t n_ubatch) const {
    const size_t n_neurons = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_neurons; });
    const size_t n_used    = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_expert_used; });
    return max_of(bundles, widest_row) * FFN_RUN_ROWS + 4 * (size_t) n_ubatch * (max_of(bundles, floats_of_token) + 2 * n_used + 2 * FFN_RUN_ROWS + 1) +
           34 * n_neurons;
}

// columns

// whether an op's input or output is ne1 * ne2 columns of floats, nb[1] bytes from one to the next
static bool is_columns(const ggml_tensor * t, int64_t ne1, int64_t ne2) {
    return t->ne[1] == ne1 && t->ne[2] == ne2 && t->ne[3] == 1 && t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) &&
           (ne2 == 1 || t->nb[2] == (size_t) ne1 * t->nb[1]);
}

bool ffn_work::sort_columns(const flash_bundle & b, ffn_part part, const ggml_tensor * op) {
    ffn_work &          w   = *this;
    const ggml_tensor * x   = op->src[1];
    const ggml_tensor * ids = op->src[2];
    w.experts.clear();
    w.columns.clear();
    w.first_column.assign(b.n_blocks() + 1, 0);
    if (b.n_expert == 0) {
        w.n_tokens = (uint32_t) x->ne[1];
        for (uint32_t t = 0; t < w.n_tokens; t++) {
            w.columns.push_back({ t, t });
        }
        w.experts.push_back(0);
        w.first_column[1] = w.n_tokens;
        return is_columns(x, w.n_tokens, 1) && is_columns(op, w.n_tokens, 1) && op->nb[1] == (size_t) op->ne[0] * sizeof(float);
    }
    w.n_tokens            = (uint32_t) ids->ne[1];
    const uint32_t n_used = (uint32_t) ids->ne[0];
    const bool     one_x  = part != ffn_part::down && x->ne[1] == 1; // for all of a token's experts
    if (ids->type != GGML_TYPE_I32 || ids->ne[2] != 1 || ids->ne[3] != 1 || n_used > b.n_expert_used || !is_columns(x, one_x ? 1 : n_used, w.n_tokens) ||
        !is_columns(op, n_used, w.n_tokens) || op->nb[1] != (size_t) op->ne[0] * sizeof(float)) {
        return false;
    }
    for (uint32_t t = 0; t < w.n_tokens; t++) {
        for (uint32_t k = 0; k < n_used; k++) {
            const int32_t e = expert_at(ids, k, t);
            if (e < 0 || (uint32_t) e >= b.n_expert) {
                return false;
            }
            w.first_column[(size_t) e + 1]++;
        }
    }
    for (uint32_t e = 0; e < b.n_expert; e++) {
        if (w.first_column[e + 1] > 0) {
            w.experts.push_back(e);
        }
        if (w.first_column[e + 1] > w.n_tokens) {
            return false; // an expert has at most one column of a token
        }
        w.first_column[e + 1] += w.first_column[e];
    }
    w.columns.resize((size_t) n_used * w.n_tokens);
    for (uint32_t t = w.n_tokens; t-- > 0;) { // backwards: the counts become the begins of the experts
        for (uint32_t k = n_used; k-- > 0;) {
            const uint32_t out                                             = t * n_used + k;
            w.columns[--w.first_column[(size_t) expert_at(ids, k, t) + 1]] = { out, one_x ? t : out };
        }
    }
    w.first_column.erase(w.first_column.begin()); // each expert's begin has moved up by one
    w.first_column.push_back((uint32_t) w.columns.size());
    return true;
}
