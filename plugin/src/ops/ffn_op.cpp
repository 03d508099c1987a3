// A feed-forward block on neuron bundles is two or three MUL_MATs: (gate,) up, and after the activation, down.
//
// For a few tokens (decoding) only the active neurons are computed. The first op in which the active set can be known chooses it
// (predictor, or gate, or up) and demands its records; gate and up write OFF for all other neurons, which every activation
// maps to zero; down sums the neurons whose value is not zero, in ascending order. What is computed depends on nothing but the input.
//
// For more tokens (prompts), and with the mode OFF, the layer's records pass by once, in order: gate, up and the sums
// of down are computed run by run in the first op. The down op takes those sums if the activations that the graph
// made are the ones they were made from (compared by digest), else the layer passes by again.
//
// Experts are several such blocks, each with columns of its own: the pairs of a token and an expert that the router chose. Their
// ops are MUL_MAT_ID; a dense block is computed as the one expert of all tokens. Only the experts that have columns are touched.
//
// All threads run through the same function; thread 0 decides between two barriers, the others read what it decided after the second.
#include "ops/ffn.h"

#include "session.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cstring>

constexpr float OFF = -1e30f; // finite: OFF * 0 must be 0

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
           32 * n_neurons;
}

// helpers

static uint32_t bit_of(ffn_part part) {
    return 1u << (uint32_t) part;
}

// column i of an op's input or output
static const float * token(const ggml_tensor * t, int64_t i) {
    return (const float *) ((const char *) t->data + (size_t) i * t->nb[1]);
}

static float * token_out(ggml_tensor * t, int64_t i) {
    return (float *) ((char *) t->data + (size_t) i * t->nb[1]);
}

// this thread's share of n
static void share(uint32_t n, const ggml_compute_params * params, uint32_t & first, uint32_t & last) {
    first = (uint32_t) ((uint64_t) n * (uint32_t) params->ith / (uint32_t) params->nth);
    last  = (uint32_t) ((uint64_t) n * ((uint32_t) params->ith + 1) / (uint32_t) params->nth);
}

// converts the tokens of src for k; the caller's thread keeps the result until its next call with the same store
static const uint8_t * convert(const row_kernel & k, const float * src, size_t stride, int64_t n_tokens, std::vector<uint8_t> & store) {
    store.resize((size_t) n_tokens * k.x_bytes);
    for (int64_t t = 0; t < n_tokens; t++) {
        k.convert((const float *) ((const char *) src + (size_t) t * stride), store.data() + (size_t) t * k.x_bytes);
    }
    return store.data();
}

// columns

// whether an op's input or output is ne1 * ne2 columns of floats, nb[1] bytes from one to the next
static bool is_columns(const ggml_tensor * t, int64_t ne1, int64_t ne2) {
    return t->ne[1] == ne1 && t->ne[2] == ne2 && t->ne[3] == 1 && t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) &&
           (ne2 == 1 || t->nb[2] == (size_t) ne1 * t->nb[1]);
}

// Leader: the op's columns, by expert. false: the op is not one that can be computed here.
static bool sort_columns(ffn_work & w, const flash_bundle & b, ffn_part part, const ggml_tensor * op) {
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
            const uint32_t out = t * n_used + k;
            w.columns[--w.first_column[(size_t) expert_at(ids, k, t) + 1]] = { out, one_x ? t : out };
        }
    }
    w.first_column.erase(w.first_column.begin()); // each expert's begin has moved up by one
    w.first_column.push_back((uint32_t) w.columns.size());
    return true;
}

// Leader: whether the op is part of an evaluation of all neurons, in passing. The result is the same for an op of few tokens.
static bool in_passing(const llama_flash_session & s, const flash_bundle & b) {
    const ffn_work & w = s.ffn;
    if (w.n_tokens > DECODE_TOKENS) {
        return true;
    }
    if (s.neuron_params.mode == LLAMA_FLASH_NEURONS_EXACT) {
        return false;
    }
    if (b.n_expert == 0) {
        return s.neuron_params.mode == LLAMA_FLASH_NEURONS_OFF || b.predict.rank == 0;
    }
    if (b.done != 0) { // as it began
        return !b.chosen;
    }
    return b.n_pinned < b.n_neurons && w.experts.size() * b.n_ff > s.neurons.n_slots() / 2; // each part would read them anew
}

// Begin of an op on a part; a part that comes again begins a new evaluation. false: the op has failed (all threads).
static bool begin(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, const ggml_tensor * op) {
    if (params->ith == 0) {
        s.begin_op(b.name);
        if (!sort_columns(s.ffn, b, part, op)) {
            s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "the graph multiplies it with something that is not a row of tokens");
        }
        const uint32_t n_tokens = s.ffn.n_tokens;
        if (n_tokens > s.ffn.n_values.size() && s.memory.total > 0) { // of a context with a larger n_ubatch
            s.ffn.reserve(s.bundles, n_tokens);
            s.note_needs(n_tokens);
            s.note_memory();
        }
        s.ffn.has_read = false;
        s.ffn.picked.resize((size_t) params->nth);
        s.ffn.digests.assign((size_t) params->nth, 0);
        if (part != ffn_part::down && (b.done & (bit_of(part) | bit_of(ffn_part::down)))) {
            b.forget_evaluation();
        }
        if (b.done == 0) {
            s.neurons.release(); // of an evaluation that was broken off
        }
        s.ffn.whole = !s.failed() && in_passing(s, b);
        s.op.stop   = s.failed();
    }
    ggml_barrier(params->threadpool);
    return !s.op.stop;
}

static void end(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params) {
    ggml_barrier(params->threadpool); // all are done before the leader lets another op in
    if (params->ith == 0) {
        b.done |= bit_of(part);
        if (!s.op.stop && s.ffn.has_read) { // a file that changed while it was read
            s.reads.look_again();
            s.reads.check_file(*b.file, b.name, b.offset, b.tensor_bytes());
        }
        if (s.op.stop || s.failed()) {
            b.forget_evaluation();
        } else {
            s.reads.settle(false);
            s.neurons.pump();
        }
        if (b.done == 0 || part == ffn_part::down) {
            s.neurons.release();
        }
        s.end_op();
    }
}

// the barrier after a leader's decision; false: the op has failed
static bool agreed(llama_flash_session & s, const ggml_compute_params * params) {
    if (params->ith == 0) {
        s.op.stop = s.failed();
    }
    ggml_barrier(params->threadpool);
    return !s.op.stop;
}

// active sets

// leader: the threads' lists, one behind the other
static void gather(llama_flash_session & s, int nth, std::vector<uint32_t> & out) {
    out.clear();
    for (int i = 0; i < nth; i++) {
        out.insert(out.end(), s.ffn.picked[(size_t) i].begin(), s.ffn.picked[(size_t) i].end());
    }
}

// leader: b.active is the active set of a new evaluation
static void chosen(llama_flash_session & s, flash_bundle & b, int64_t n_tokens) {
    // the last layer sees only the tokens whose output is asked for: its clock follows the others'
    b.tokens = std::max(b.tokens + (uint64_t) n_tokens, s.tokens);
    s.tokens = b.tokens;
    b.chosen  = true;
    b.counted = 0;
    s.neurons.use(b, (uint32_t) n_tokens);
}

// all: the threads' shares of the neurons that b's predictor expects for x
static void predict(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, const ggml_tensor * x) {
    static thread_local std::vector<uint8_t> x_store;
    static thread_local std::vector<uint8_t> p_store;

    const predictor & p        = b.predict;
    const int64_t     n_tokens = x->ne[1];
    p.project(convert(p.in, token(x, 0), x->nb[1], n_tokens, x_store), p.in.x_bytes, n_tokens, params->ith, params->nth, s.ffn.projected.data());
    ggml_barrier(params->threadpool);
    std::vector<uint32_t> & picked = s.ffn.picked[(size_t) params->ith];
    picked.clear();
    uint32_t first;
    uint32_t last;
    share(b.n_ff, params, first, last);
    p.select(convert(p.out, s.ffn.projected.data(), p.rank * sizeof(float), n_tokens, p_store), p.out.x_bytes, n_tokens, first, last, picked);
}

// all: the threads' shares of the neurons for which f(column, neuron of the expert) holds for any of the expert's columns
template <typename F> static void pick(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, F f) {
    const ffn_work &        w      = s.ffn;
    std::vector<uint32_t> & picked = s.ffn.picked[(size_t) params->ith];
    picked.clear();
    uint32_t first;
    uint32_t last;
    share((uint32_t) w.experts.size() * b.n_ff, params, first, last);
    while (first < last) { // expert by expert
        const uint32_t           e     = w.experts[first / b.n_ff];
        const uint32_t           row   = first % b.n_ff;
        const uint32_t           n     = std::min(b.n_ff - row, last - first);
        const ffn_column * const begin = w.columns.data() + w.first_column[e];
        const ffn_column * const end   = w.columns.data() + w.first_column[e + 1];
        for (uint32_t i = row; i < row + n; i++) {
            for (const ffn_column * c = begin; c < end; c++) {
                if (f(c->out, i)) {
                    picked.push_back(e * b.n_ff + i);
                    break;
                }
            }
        }
        first += n;
    }
}

// sparse evaluation

// Leader: demands the next chunk of the list, as many neurons as the slots surely hold. Who computes on it starts the reads: a
// thousand of them take the kernel milliseconds, in which the other threads have work already.
static void next_chunk(llama_flash_session & s, flash_bundle & b) {
    ffn_work &    w  = s.ffn;
    const int64_t t0  = flash_now_ns();
    const size_t most = b.n_pinned == b.n_neurons ? w.list.size() : std::max<size_t>(1, s.neurons.n_slots() / 2);
    w.begin           = w.end;
    w.end             = std::min(w.list.size(), w.begin + most);
    if (w.list.size() > most) {
        s.neurons.release();
    }
    w.left.clear();
    w.there.clear();
    s.neurons.demand(b, w.list.data() + w.begin, w.end - w.begin, w.end > b.counted);
    b.counted = std::max(b.counted, w.end);
    for (size_t k = w.begin; k < w.end; k++) {
        w.asked[w.list[k]] = s.op.stamp;
        (s.neurons.find(b, w.list[k]) ? w.there : w.left).push_back(w.list[k]);
    }
    w.next.store(0, std::memory_order_relaxed);
    s.notes.stats.manage_ns += (uint64_t) (flash_now_ns() - t0);
}

// leader: waits for something to land; false: nothing is missing any more (or the op has failed)
static bool wait_for_landing(llama_flash_session & s, const flash_bundle & b) {
    while (!s.ffn.left.empty()) {
        s.reads.settle(false);
        if (s.failed()) {
            return false;
        }
        if (s.neurons.begin_landing()) {
            s.ffn.has_read = true;
            return true;
        }
        s.neurons.pump();
        if (!s.reads.wait() && !s.failed()) {
            s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "a neuron that nobody reads");
        }
    }
    return false;
}

// All: f(neuron, slot data) for each neuron of the chunk, and for those still to come, g as they land. false: the op has failed.
template <typename F>
static bool for_chunk(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, ffn_part part, bool as_they_come, F f) {
    constexpr int64_t AT_ONCE = 8;
    ffn_work &        w       = s.ffn;
    if (params->ith == 0) {
        s.neurons.pump();
    }
    if (as_they_come) {
        const int64_t n = (int64_t) w.there.size();
        for (;;) {
            const int64_t k = w.next.fetch_add(AT_ONCE, std::memory_order_relaxed);
            if (k >= n) {
                break;
            }
            for (int64_t j = k; j < std::min(n, k + AT_ONCE); j++) {
                f(w.there[(size_t) j], s.neurons.find(b, w.there[(size_t) j]));
            }
        }
    }
    const size_t part_at = b.part(part).slot_offset;
    for (;;) {
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            w.land = wait_for_landing(s, b);
        }
        if (!agreed(s, params)) {
            return false;
        }
        if (!w.land) {
            return true;
        }
        const int64_t t0 = params->ith == 0 ? flash_now_ns() : 0; // copying, with what is computed on the way
        s.neurons.land([&](const flash_bundle & of, uint32_t neuron, const uint8_t * slot, const bundle_stream * stream) {
            if (as_they_come && &of == &b && w.asked[neuron] == s.op.stamp && stream->slot_offset <= part_at &&
                part_at < stream->slot_offset + stream->bytes) {
                f(neuron, slot);
            }
        });
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            s.neurons.end_landing();
            w.left.erase(std::remove_if(w.left.begin(), w.left.end(), [&](uint32_t i) { return s.neurons.find(b, i) != nullptr; }), w.left.end());
            s.neurons.pump();
            s.notes.stats.manage_ns += (uint64_t) (flash_now_ns() - t0);
        }
    }
}

// leader: reads ahead what the next layer's predictor expects for this layer's input
static void look_ahead(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, const ggml_tensor * x) {
    const bool wanted = s.neuron_params.lookahead && s.neuron_params.mode == LLAMA_FLASH_NEURONS_LOWRANK && b.index + 1 < s.bundles.size() &&
                        s.bundles[b.index + 1].predict.rank > 0 && s.bundles[b.index + 1].n_embd == b.n_embd && x->ne[1] == 1;
    if (!wanted) {
        return;
    }
    flash_bundle & next = s.bundles[b.index + 1];
    predict(s, next, params, x);
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        gather(s, params->nth, s.ffn.list);
        s.neurons.expect(next, s.ffn.list.data(), s.ffn.list.size());
    }
}

// gate or up, its rows from flash: the active ones
static void sparse_rows(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    static thread_local std::vector<uint8_t> store;

    const ggml_tensor * x      = op->src[1];
    const bundle_part & p      = b.part(part);
    const row_kernel    kernel(p.type, b.n_embd);
    ffn_work &          w      = s.ffn;
    const bool          leader = params->ith == 0;
    const bool          choose = !b.chosen;
    if (choose && s.neuron_params.mode == LLAMA_FLASH_NEURONS_EXACT) { // the gate's op chooses
        if (leader) {
            s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "the graph asks for up before gate");
        }
        return;
    }
    const int64_t t0 = leader ? flash_now_ns() : 0;
    if (choose && b.predict.rank > 0) {
        predict(s, b, params, x);
    } else if (choose) { // nobody knows: all of the experts'
        pick(s, b, params, [](uint32_t, uint32_t) { return true; });
    }
    uint32_t first;
    uint32_t last;
    share(b.n_ff, params, first, last);
    for (const ffn_column & c : w.columns) {
        std::fill(token_out(op, c.out) + first, token_out(op, c.out) + last, b.gated && part == ffn_part::up ? 0.0f : OFF);
    }
    ggml_barrier(params->threadpool);
    if (leader) {
        if (choose) {
            gather(s, params->nth, b.active);
            s.notes.stats.predict_ns += (uint64_t) (flash_now_ns() - t0);
            chosen(s, b, w.n_tokens);
        }
        w.list = b.active;
        w.end  = 0;
        s.reads.settle(false);
        next_chunk(s, b);
    }
    const uint8_t * converted = convert(kernel, token(x, 0), x->nb[1], x->ne[1] * x->ne[2], store);
    bool            ok        = agreed(s, params);
    while (ok) {
        ok = for_chunk(s, b, params, part, true, [&](uint32_t i, const uint8_t * slot) {
            const uint32_t e = b.block_of(i);
            for (uint32_t k = w.first_column[e]; k < w.first_column[e + 1]; k++) {
                const ffn_column & c = w.columns[k];
                token_out(op, c.out)[i - e * b.n_ff] = kernel.dot(slot + p.slot_offset, converted + c.x * kernel.x_bytes);
            }
        });
        if (!ok || w.end == w.list.size()) {
            break;
        }
        ggml_barrier(params->threadpool);
        if (leader) {
            next_chunk(s, b);
        }
        ok = agreed(s, params);
    }
    if (ok && choose) {
        ggml_barrier(params->threadpool);
        look_ahead(s, b, params, x);
    }
}

// gate or up, resident: computed in full by the stock kernel; if `choose`, its result says what is active
static void resident_rows(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op, bool choose) {
    static thread_local std::vector<const void *> table;

    const bundle_part & p = b.part(part);
    if (b.n_expert > 0) {
        table.resize(b.n_expert);
        for (size_t e = 0; e < b.n_expert; e++) {
            table[e] = p.resident + e * b.n_ff * p.row_bytes;
        }
        stock_mul_mat_id(p.kernel, params, op, table.data());
    } else {
        stock_mul_mat(p.kernel, params, op, p.resident, 0, b.n_ff);
    }
    ggml_barrier(params->threadpool);
    if (choose) {
        const int64_t t0 = params->ith == 0 ? flash_now_ns() : 0;
        pick(s, b, params, [&](uint32_t c, uint32_t i) {
            const float y = token(op, c)[i];
            return b.gated ? b.gate_open(i, y) : b.value(i, 0.0f, y) != 0.0f;
        });
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            gather(s, params->nth, b.active);
            s.notes.stats.predict_ns += (uint64_t) (flash_now_ns() - t0);
            chosen(s, b, s.ffn.n_tokens);
            s.ffn.list = b.active;
            s.ffn.end  = 0;
            s.reads.settle(false);
            next_chunk(s, b);
            s.neurons.pump(); // the reads begin; who computes waits for them
        }
    } else if (b.gated && part == ffn_part::gate) { // for the pass of up and down
        uint32_t first;
        uint32_t last;
        share((uint32_t) s.ffn.columns.size(), params, first, last);
        for (uint32_t c = first; c < last; c++) {
            memcpy(s.ffn.other.data() + (size_t) c * b.n_ff, token(op, c), b.n_ff * sizeof(float));
        }
    }
}

// down: the sum of the neurons that have a value, in ascending order
static void sparse_sums(llama_flash_session & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * h = op->src[1];
    const bundle_part & p = b.part(ffn_part::down);
    ffn_work &          w = s.ffn;
    pick(s, b, params, [&](uint32_t c, uint32_t i) { return token(h, c)[i] != 0.0f; });
    int64_t first;
    int64_t last;
    sum_columns(p.type, b.n_embd, params->ith, params->nth, first, last);
    for (const ffn_column & c : w.columns) {
        std::fill(token_out(op, c.out) + first, token_out(op, c.out) + last, 0.0f);
    }
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        gather(s, params->nth, w.list);
        w.end = 0;
        s.reads.settle(false);
        next_chunk(s, b);
    }
    bool ok = agreed(s, params);
    while (ok) {
        ok = for_chunk(s, b, params, ffn_part::down, false, [](uint32_t, const uint8_t *) {});
        if (!ok) {
            break;
        }
        float    tile[SUM_COLUMNS];
        uint32_t e = 0; // the neuron's expert
        for (size_t k = w.begin; k < w.end; k++) {
            const uint32_t i = w.list[k];
            if (i >= (e + 1) * b.n_ff) {
                e = b.block_of(i);
            }
            const uint8_t * row = s.neurons.find(b, i) + p.slot_offset;
            if (k + 1 < w.end) {
                const uint8_t * next = s.neurons.find(b, w.list[k + 1]) + p.slot_offset + ggml_row_size(p.type, first);
                for (size_t line = 0; line < 8; line++) {
                    __builtin_prefetch(next + 64 * line);
                }
            }
            for (int64_t c = first; c < last; c += SUM_COLUMNS) {
                const int64_t n = std::min(SUM_COLUMNS, last - c);
                row_to_float(p.type, row, c, n, tile);
                for (uint32_t j = w.first_column[e]; j < w.first_column[e + 1]; j++) {
                    const uint32_t column = w.columns[j].out;
                    const float    value  = token(h, column)[i - e * b.n_ff];
                    if (value != 0.0f) {
                        add_scaled(token_out(op, column) + c, tile, value, n);
                    }
                }
            }
        }
        if (w.end == w.list.size()) {
            break;
        }
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            next_chunk(s, b);
        }
        ok = agreed(s, params);
    }
}

// whole layers

// order-independent digest of the activations that are not zero
static uint64_t digest_of(uint64_t column, uint64_t i, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint64_t x = (bits | i << 32) + (column + 1) * 0x9e3779b97f4a7c15ull;
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ (x >> 33);
}

// What a pass over the records of a layer, or of its experts that have columns, computes.
struct layer_pass {
    ggml_tensor *       rows[2]    = {};       // gate, up: op whose output they are (a copy of the op where the output is ours)
    const float *       gate       = nullptr;  // [columns][n_ff], gate's and up's results: what values are made of
    const float *       up         = nullptr;
    const ggml_tensor * activation = nullptr;  // down's own source, if not made here
    float *             sums       = nullptr;  // [columns][n_embd]
    bool                ahead      = false;    // the next layer will be passed over too
};

// The columns of one expert, and where its neurons begin.
struct expert_columns {
    uint32_t           first; // neuron
    const ffn_column * columns;
    uint32_t           n;
};

// leader: the next run, pinned ones first; end: of the expert
static const neuron_store::run * next_run(llama_flash_session & s, const flash_bundle & b, uint32_t done, uint32_t end) {
    if (done >= b.n_pinned) {
        return s.neurons.stream_next();
    }
    neuron_store::run & r = s.ffn.home;
    r.first               = done;
    r.count               = std::min(FFN_RUN_ROWS, std::min(b.n_pinned, end) - done);
    for (size_t p = 0; p < FFN_PARTS; p++) {
        r.data[p]   = b.parts[p].present ? b.in_bundle(b.home, (ffn_part) p, done) : nullptr;
        r.stride[p] = b.record_bytes;
    }
    return &r;
}

// all: the inputs of an expert's columns, one behind the other
static void gather_inputs(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, const ggml_tensor * x,
                          const expert_columns & e) {
    uint32_t first;
    uint32_t last;
    share(e.n, params, first, last);
    for (uint32_t k = first; k < last; k++) {
        memcpy(s.ffn.gathered.data() + (size_t) k * b.n_embd, token(x, e.columns[k].x), b.n_embd * sizeof(float));
    }
}

// all: rows of gate or up of the run for few columns, as sparse_rows computes them
static void run_dots(llama_flash_session & s, const flash_bundle & b, size_t part, const ggml_compute_params * params, ggml_tensor * op,
                     const expert_columns & e) {
    static thread_local std::vector<uint8_t> store;

    const neuron_store::run & run = *s.ffn.run;
    const row_kernel          kernel(b.parts[part].type, b.n_embd);
    const uint8_t *           converted = convert(kernel, s.ffn.gathered.data(), b.n_embd * sizeof(float), e.n, store);
    uint32_t                  first;
    uint32_t                  last;
    share(run.count, params, first, last);
    for (uint32_t r = first; r < last; r++) {
        for (uint32_t k = 0; k < e.n; k++) {
            token_out(op, e.columns[k].out)[run.first - e.first + r] = kernel.dot(run.data[part] + r * run.stride[part], converted + k * kernel.x_bytes);
        }
    }
    ggml_barrier(params->threadpool);
}

// all: rows of gate or up of the run, which lie in `compact`, by the stock kernel for an expert's columns
static void expert_rows(llama_flash_session & s, const flash_bundle & b, size_t part, const ggml_compute_params * params, ggml_tensor * op,
                        const expert_columns & e) {
    ffn_work &                w      = s.ffn;
    const neuron_store::run & run    = *w.run;
    ggml_tensor               weight = b.parts[part].weight;
    weight.ne[2]                     = 1;

    auto matrix = [&](std::vector<float> & data, int64_t length) {
        ggml_tensor t = {};
        t.type        = GGML_TYPE_F32;
        t.data        = data.data();
        t.ne[0]       = length;
        t.ne[1]       = e.n;
        t.ne[2] = t.ne[3] = 1;
        t.nb[0]           = sizeof(float);
        t.nb[1]           = (size_t) length * sizeof(float);
        t.nb[2] = t.nb[3] = t.nb[1] * e.n;
        return t;
    };
    ggml_tensor x   = matrix(w.gathered, b.n_embd);
    ggml_tensor out = matrix(w.rows, FFN_RUN_ROWS);
    out.op          = GGML_OP_MUL_MAT;
    out.src[0]      = &weight;
    out.src[1]      = &x;
    stock_mul_mat(b.parts[part].kernel, params, &out, w.compact.data(), 0, run.count);
    ggml_barrier(params->threadpool);
    uint32_t first;
    uint32_t last;
    share(e.n, params, first, last);
    for (uint32_t k = first; k < last; k++) {
        memcpy(token_out(op, e.columns[k].out) + (run.first - e.first), w.rows.data() + (size_t) k * FFN_RUN_ROWS, run.count * sizeof(float));
    }
    ggml_barrier(params->threadpool);
}

// all: rows of gate or up of the run
static void run_rows(llama_flash_session & s, const flash_bundle & b, size_t part, const ggml_compute_params * params, ggml_tensor * op,
                     const expert_columns & e) {
    static thread_local std::vector<uint8_t> scratch;

    if (s.ffn.n_tokens <= DECODE_TOKENS && b.n_expert > 0) {
        return run_dots(s, b, part, params, op, e);
    }
    const neuron_store::run & run = *s.ffn.run;
    const bundle_part &       p   = b.parts[part];
    scratch.resize(p.row_bytes * STOCK_REPACK_ROWS);
    for (int64_t row = params->ith * STOCK_REPACK_ROWS; row < run.count; row += params->nth * STOCK_REPACK_ROWS) {
        const int64_t n = std::min<int64_t>(STOCK_REPACK_ROWS, run.count - row);
        for (int64_t i = row; i < row + n; i++) {
            memcpy(s.ffn.compact.data() + (size_t) i * p.row_bytes, run.data[part] + (size_t) i * run.stride[part], p.row_bytes);
        }
        if (p.kernel.extra) {
            stock_repack(p.kernel, &p.weight, s.ffn.compact.data(), row, n, scratch.data());
        }
    }
    ggml_barrier(params->threadpool);
    if (b.n_expert > 0) {
        return expert_rows(s, b, part, params, op, e);
    }
    stock_mul_mat(p.kernel, params, op, s.ffn.compact.data(), run.first, run.count);
    ggml_barrier(params->threadpool);
}

// all: the values of the run's neurons, this thread's columns
static void run_values(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass,
                       const expert_columns & e) {
    ffn_work &                w   = s.ffn;
    const neuron_store::run & run = *w.run;
    uint64_t                  sum = 0;
    uint32_t                  first;
    uint32_t                  last;
    share(e.n, params, first, last);
    for (uint32_t k = first; k < last; k++) {
        const uint32_t column = e.columns[k].out;
        uint32_t *     rows   = w.value_row.data() + (size_t) k * FFN_RUN_ROWS;
        float *        values = w.value.data() + (size_t) k * FFN_RUN_ROWS;
        uint32_t       n      = 0;
        for (uint32_t r = 0; r < run.count; r++) {
            const uint32_t i = run.first - e.first + r;
            float          value;
            if (pass.activation) {
                value = token(pass.activation, column)[i];
            } else {
                const size_t at = (size_t) column * b.n_ff + i;
                value           = b.value(i, pass.gate ? pass.gate[at] : 0.0f, pass.up[at]);
            }
            if (value != 0.0f) {
                rows[n]   = r;
                values[n] = value;
                n++;
                sum += digest_of(column, i, value);
            }
        }
        w.n_values[k] = n;
    }
    w.digests[(size_t) params->ith] += sum;
}

// all: adds the run's neurons to the sums, this thread's elements
static void run_sums(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass,
                     const expert_columns & e) {
    static thread_local std::vector<float>   tile;
    static thread_local std::vector<uint8_t> used;

    const ffn_work &          w    = s.ffn;
    const neuron_store::run & run  = *w.run;
    const size_t              down = (size_t) ffn_part::down;
    tile.resize(FFN_RUN_ROWS * SUM_COLUMNS);
    used.assign(FFN_RUN_ROWS, 0);
    for (uint32_t t = 0; t < e.n; t++) {
        for (uint32_t k = 0; k < w.n_values[t]; k++) {
            used[w.value_row[(size_t) t * FFN_RUN_ROWS + k]] = 1;
        }
    }
    int64_t first;
    int64_t last;
    sum_columns(b.parts[down].type, b.n_embd, params->ith, params->nth, first, last);
    for (int64_t c = first; c < last; c += SUM_COLUMNS) {
        const int64_t n = std::min(SUM_COLUMNS, last - c);
        for (uint32_t r = 0; r < run.count; r++) {
            if (used[r]) {
                row_to_float(b.parts[down].type, run.data[down] + r * run.stride[down], c, n, tile.data() + r * SUM_COLUMNS);
            }
        }
        for (uint32_t t = 0; t < e.n; t++) {
            const uint32_t * rows   = w.value_row.data() + (size_t) t * FFN_RUN_ROWS;
            const float *    values = w.value.data() + (size_t) t * FFN_RUN_ROWS;
            float *          sums   = pass.sums + (size_t) e.columns[t].out * b.n_embd + c;
            for (uint32_t k = 0; k < w.n_values[t]; k++) {
                add_scaled(sums, tile.data() + rows[k] * SUM_COLUMNS, values[k], n);
            }
        }
    }
}

// leader: whether an expert with n columns is among those of the layer that empty slots are for, if experts are kept whole
static bool is_kept(const llama_flash_session & s, const flash_bundle & b, uint32_t first, uint32_t n) {
    const ffn_work & w     = s.ffn;
    uint32_t         ahead = 0; // experts that are used more
    for (uint32_t e : w.experts) {
        const uint32_t other = w.first_column[e + 1] - w.first_column[e];
        ahead += other > n || (other == n && e * b.n_ff < first);
    }
    return ahead < s.neurons.share_of(0, b.n_neurons) / b.n_ff;
}

// leader: empty slots are filled with the neurons that the prompt uses most, each layer its share
static void keep_most_used(llama_flash_session & s, const flash_bundle & b, const expert_columns & e) {
    ffn_work &                w   = s.ffn;
    const neuron_store::run & run = *w.run;
    if (s.neurons.n_slots() == 0 || s.neurons.n_empty() == 0 || run.first < b.n_pinned) {
        return;
    }
    uint32_t most = s.neurons.share_of(run.first, run.count);
    if (b.n_expert > 0 && s.neuron_params.mode != LLAMA_FLASH_NEURONS_EXACT) { // decoding uses whole experts
        std::fill(w.uses.begin(), w.uses.end(), e.n);
        most = is_kept(s, b, e.first, e.n) ? run.count : 0;
    } else {
        std::fill(w.uses.begin(), w.uses.end(), 0);
        for (uint32_t t = 0; t < e.n; t++) {
            for (uint32_t k = 0; k < w.n_values[t]; k++) {
                w.uses[w.value_row[(size_t) t * FFN_RUN_ROWS + k]]++;
            }
        }
    }
    s.neurons.keep(b, run, w.uses.data(), most, w.n_tokens, b.tokens);
}

// All: whether the run that has come holds what it held before. false: the op has failed.
static bool check_run(llama_flash_session & s, const ggml_compute_params * params) {
    uint32_t first;
    uint32_t last;
    share(s.ffn.run->count, params, first, last);
    s.neurons.check_run(first, last);
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        s.neurons.is_run_sound();
    }
    return agreed(s, params);
}

// All: one pass over b's records. Between begin() and end(). false: the op has failed.
static bool pass_over(llama_flash_session & s, flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass) {
    ffn_work & w      = s.ffn;
    const bool leader = params->ith == 0;
    if (leader && b.n_expert == 0) {
        s.neurons.stream_begin(b, b.n_pinned, FFN_RUN_ROWS, pass.ahead);
    } else if (leader && b.n_pinned == 0) {
        s.neurons.stream_experts(b, w.experts, FFN_RUN_ROWS);
    }
    uint32_t first;
    uint32_t last;
    share((uint32_t) w.columns.size(), params, first, last);
    std::fill(pass.sums + (size_t) first * b.n_embd, pass.sums + (size_t) last * b.n_embd, 0.0f);
    for (uint32_t number : w.experts) {
        const uint32_t       n    = w.first_column[number + 1] - w.first_column[number];
        const expert_columns e    = { number * b.n_ff, w.columns.data() + w.first_column[number], n };
        const uint32_t       end  = e.first + b.n_ff;
        const ggml_tensor *  rows = pass.rows[0] ? pass.rows[0] : pass.rows[1];
        if (rows && b.n_expert > 0) {
            gather_inputs(s, b, params, rows->src[1], e);
        }
        uint32_t count = 0;
        for (uint32_t done = e.first; done < end; done += count) {
            if (leader) {
                w.run = next_run(s, b, done, end);
                if ((!w.run || w.run->first != done) && !s.failed()) {
                    s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "a run is missing, or out of order");
                }
            }
            if (!agreed(s, params)) {
                return false;
            }
            count = w.run->count;
            if (done >= b.n_pinned && !check_run(s, params)) {
                return false;
            }
            for (size_t part = 0; part < 2; part++) {
                if (pass.rows[part]) {
                    run_rows(s, b, part, params, pass.rows[part], e);
                }
            }
            run_values(s, b, params, pass, e);
            ggml_barrier(params->threadpool);
            run_sums(s, b, params, pass, e);
            if (leader) {
                keep_most_used(s, b, e);
            }
            ggml_barrier(params->threadpool);
            if (leader && done >= b.n_pinned) {
                s.neurons.stream_give();
                w.has_read = true;
            }
        }
    }
    ggml_barrier(params->threadpool);
    return true;
}

static uint64_t total_digest(const ffn_work & w) {
    uint64_t sum = 0;
    for (uint64_t d : w.digests) {
        sum += d;
    }
    return sum;
}

// leader: all tokens of a prompt have passed
static void note_prompt(llama_flash_session & s, flash_bundle & b, int64_t n_tokens) {
    b.tokens = std::max(b.tokens + (uint64_t) n_tokens, s.tokens);
    s.tokens = b.tokens;
}

// whether the next layer will be passed over too; the last layer may see fewer tokens
static bool passes_on(const llama_flash_session & s, const flash_bundle & b, int64_t n_tokens) {
    if (b.n_expert > 0) {
        return false; // nobody knows its experts yet
    }
    return s.neuron_params.mode == LLAMA_FLASH_NEURONS_OFF || (n_tokens > DECODE_TOKENS && b.index + 2 < s.bundles.size());
}

// gate or up for all neurons, and with the last of them the sums of down
static void whole_rows(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    const int64_t  n_tokens = s.ffn.n_tokens;
    const ffn_part twin     = part == ffn_part::gate ? ffn_part::up : ffn_part::gate;
    if (b.gated && (b.done & bit_of(twin)) && b.part(part).cached && b.part(twin).cached) { // computed with the first
        uint32_t first;
        uint32_t last;
        share((uint32_t) s.ffn.columns.size(), params, first, last);
        for (uint32_t c = first; c < last; c++) {
            memcpy(token_out(op, c), s.ffn.other.data() + (size_t) c * b.n_ff, b.n_ff * sizeof(float));
        }
        return;
    }
    if (params->ith == 0) {
        note_prompt(s, b, n_tokens);
    }
    ggml_barrier(params->threadpool); // all have read what begin() decided

    // the other part's op has not come: its output goes to ours
    ggml_tensor twin_op = *op;
    layer_pass  pass;
    pass.sums  = s.ffn.sums.data();
    pass.ahead = passes_on(s, b, n_tokens);
    pass.rows[(size_t) part] = op;
    const float * outputs[2] = {};
    outputs[(size_t) part]   = token(op, 0);
    if (b.gated) {
        if (b.part(twin).cached) {
            twin_op.src[0] = &b.part(twin).weight;
            twin_op.data   = s.ffn.other.data();
            pass.rows[(size_t) twin] = &twin_op;
        }
        outputs[(size_t) twin] = s.ffn.other.data(); // by this pass, or by the resident gate's op
    }
    pass.gate = outputs[0];
    pass.up   = outputs[1];
    if (pass_over(s, b, params, pass) && params->ith == 0) {
        b.fused        = true;
        b.fused_tokens = (uint64_t) n_tokens;
        b.fused_digest = total_digest(s.ffn);
    }
}

// down for many tokens: the sums that were made in passing, if they are of these activations
static void whole_sums(llama_flash_session & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * h        = op->src[1];
    const int64_t       n_tokens = s.ffn.n_tokens;
    uint32_t            first;
    uint32_t            last;
    share((uint32_t) s.ffn.columns.size(), params, first, last);
    if (b.fused && b.fused_tokens == (uint64_t) n_tokens) {
        uint64_t sum = 0;
        for (uint32_t c = first; c < last; c++) {
            const float * values = token(h, c);
            for (uint32_t i = 0; i < b.n_ff; i++) {
                if (values[i] != 0.0f) {
                    sum += digest_of(c, i, values[i]);
                }
            }
        }
        s.ffn.digests[(size_t) params->ith] = sum;
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            s.ffn.same = total_digest(s.ffn) == b.fused_digest;
            s.notes.stats.layers_repeated += !s.ffn.same;
            std::fill(s.ffn.digests.begin(), s.ffn.digests.end(), 0);
        }
    } else if (params->ith == 0) {
        s.ffn.same = false;
    }
    ggml_barrier(params->threadpool);
    if (!s.ffn.same) {
        layer_pass pass;
        pass.sums       = s.ffn.sums.data();
        pass.activation = h;
        pass.ahead      = passes_on(s, b, n_tokens);
        if (!pass_over(s, b, params, pass)) {
            return;
        }
    }
    for (uint32_t c = first; c < last; c++) {
        memcpy(token_out(op, c), s.ffn.sums.data() + (size_t) c * b.n_embd, b.n_embd * sizeof(float));
    }
}

void flash_ffn(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    if (begin(s, b, part, params, op)) {
        const bool whole = s.ffn.whole;
        if (part == ffn_part::down) {
            whole ? whole_sums(s, b, params, op) : sparse_sums(s, b, params, op);
        } else if (!b.part(part).cached) {
            resident_rows(s, b, part, params, op, !whole);
        } else {
            whole ? whole_rows(s, b, part, params, op) : sparse_rows(s, b, part, params, op);
        }
    }
    end(s, b, part, params);
}
