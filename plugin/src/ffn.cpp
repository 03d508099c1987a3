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
// All threads run through the same function; thread 0 decides between two barriers, the others read what it decided after the second.
#include "ffn.h"

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

void ffn_work::reserve(const std::vector<flash_bundle> & bundles, uint32_t n_ubatch) {
    const size_t n_ff   = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_ff; });
    const size_t n_embd = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_embd; });
    const size_t gated  = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.gated; });
    const size_t rank   = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.predict.rank; });
    projected.resize(DECODE_TOKENS * rank);
    list.reserve(n_ff);
    left.reserve(n_ff);
    there.reserve(n_ff);
    asked.assign(n_ff, 0);
    compact.resize(max_of(bundles, widest_row) * FFN_RUN_ROWS);
    other.resize(gated * n_ff * n_ubatch);
    sums.resize(n_embd * n_ubatch);
    value_row.resize((size_t) n_ubatch * FFN_RUN_ROWS);
    value.resize((size_t) n_ubatch * FFN_RUN_ROWS);
    n_values.resize(n_ubatch);
    uses.resize(FFN_RUN_ROWS);
}

size_t ffn_work::bytes(const std::vector<flash_bundle> & bundles, uint32_t n_ubatch) const {
    const size_t n_ff   = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_ff; });
    const size_t n_embd = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.n_embd; });
    const size_t gated  = max_of(bundles, [](const flash_bundle & b) -> size_t { return b.gated; });
    return max_of(bundles, widest_row) * FFN_RUN_ROWS + 4 * (size_t) n_ubatch * (gated * n_ff + n_embd + 2 * FFN_RUN_ROWS + 1) + 32 * n_ff;
}

// helpers

static uint32_t bit_of(ffn_part part) {
    return 1u << (uint32_t) part;
}

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

// Begin of an op on a part; a part that comes again begins a new evaluation. false: the op has failed (all threads).
static bool begin(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, int64_t n_tokens) {
    if (params->ith == 0) {
        s.begin_op(b.name);
        if ((size_t) n_tokens > s.ffn.n_values.size() && s.memory.total > 0) { // of a context with a larger n_ubatch
            s.memory.bookkeeping -= s.ffn.bytes(s.bundles, (uint32_t) s.ffn.n_values.size());
            s.ffn.reserve(s.bundles, (uint32_t) n_tokens);
            s.memory.bookkeeping += s.ffn.bytes(s.bundles, (uint32_t) n_tokens);
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
        s.op.stop = s.failed();
    }
    ggml_barrier(params->threadpool);
    return !s.op.stop;
}

static void end(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params) {
    ggml_barrier(params->threadpool); // all are done before the leader lets another op in
    if (params->ith == 0) {
        b.done |= bit_of(part);
        if (!s.op.stop && s.ffn.has_read) { // a file that changed while it was read
            s.op.checked = nullptr;
            s.check_file(*b.file, b.name, b.offset, b.tensor_bytes());
        }
        if (s.op.stop || s.failed()) {
            b.forget_evaluation();
        } else {
            s.settle_reads(false);
            s.neurons.pump(s);
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
    s.neurons.use(s, b, (uint32_t) n_tokens);
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

// all: the threads' shares of the neurons for which f(token, neuron) holds for any token
template <typename F> static void pick(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, int64_t n_tokens, F f) {
    std::vector<uint32_t> & picked = s.ffn.picked[(size_t) params->ith];
    picked.clear();
    uint32_t first;
    uint32_t last;
    share(b.n_ff, params, first, last);
    for (uint32_t i = first; i < last; i++) {
        for (int64_t t = 0; t < n_tokens; t++) {
            if (f(t, i)) {
                picked.push_back(i);
                break;
            }
        }
    }
}

// sparse evaluation

// leader: demands the next chunk of the list, as many neurons as the slots surely hold
static void next_chunk(llama_flash_session & s, flash_bundle & b) {
    ffn_work &    w  = s.ffn;
    const int64_t t0  = flash_now_ns();
    const size_t most = std::max<size_t>(1, s.neurons.n_slots() / 2);
    w.begin           = w.end;
    w.end             = std::min(w.list.size(), w.begin + most);
    if (w.list.size() > most) {
        s.neurons.release();
    }
    w.left.clear();
    w.there.clear();
    s.neurons.demand(s, b, w.list.data() + w.begin, w.end - w.begin, w.end > b.counted);
    b.counted = std::max(b.counted, w.end);
    for (size_t k = w.begin; k < w.end; k++) {
        w.asked[w.list[k]] = s.op.stamp;
        (s.neurons.find(b, w.list[k]) ? w.there : w.left).push_back(w.list[k]);
    }
    w.next.store(0, std::memory_order_relaxed);
    s.stats.manage_ns += (uint64_t) (flash_now_ns() - t0);
}

// leader: waits for something to land; false: nothing is missing any more (or the op has failed)
static bool wait_for_landing(llama_flash_session & s, const flash_bundle & b) {
    while (!s.ffn.left.empty()) {
        s.settle_reads(false);
        if (s.failed()) {
            return false;
        }
        if (s.neurons.begin_landing()) {
            s.ffn.has_read = true;
            return true;
        }
        s.neurons.pump(s);
        if (!s.wait_for_reads() && !s.failed()) {
            s.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "a neuron that nobody reads");
        }
    }
    return false;
}

// All: f(neuron, slot data) for each neuron of the chunk, and for those still to come, g as they land. false: the op has failed.
template <typename F>
static bool for_chunk(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, ffn_part part, bool as_they_come, F f) {
    constexpr int64_t AT_ONCE = 8;
    ffn_work &        w       = s.ffn;
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
            s.neurons.pump(s);
            s.stats.manage_ns += (uint64_t) (flash_now_ns() - t0);
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
        s.neurons.expect(s, next, s.ffn.list.data(), s.ffn.list.size());
    }
}

// gate or up, its rows from flash: the active ones
static void sparse_rows(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    static thread_local std::vector<uint8_t> store;

    const ggml_tensor * x        = op->src[1];
    const int64_t       n_tokens = x->ne[1];
    const bundle_part & p        = b.part(part);
    const row_kernel    kernel(p.type, b.n_embd);
    ffn_work &          w        = s.ffn;
    const bool          leader   = params->ith == 0;

    if (!begin(s, b, part, params, n_tokens)) {
        return end(s, b, part, params);
    }
    const bool    choose = !b.chosen;
    if (choose && s.neuron_params.mode == LLAMA_FLASH_NEURONS_EXACT) { // the gate's op chooses
        if (leader) {
            s.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "the graph asks for up before gate");
        }
        return end(s, b, part, params);
    }
    const int64_t t0     = leader ? flash_now_ns() : 0;
    if (choose) {
        predict(s, b, params, x);
    }
    uint32_t first;
    uint32_t last;
    share(b.n_ff, params, first, last);
    for (int64_t t = 0; t < n_tokens; t++) {
        std::fill(token_out(op, t) + first, token_out(op, t) + last, b.gated && part == ffn_part::up ? 0.0f : OFF);
    }
    ggml_barrier(params->threadpool);
    if (leader) {
        if (choose) {
            gather(s, params->nth, b.active);
            s.stats.predict_ns += (uint64_t) (flash_now_ns() - t0);
            chosen(s, b, n_tokens);
        }
        w.list = b.active;
        w.end  = 0;
        s.settle_reads(false);
        next_chunk(s, b);
    }
    const uint8_t * converted = convert(kernel, token(x, 0), x->nb[1], n_tokens, store);
    bool            ok        = agreed(s, params);
    while (ok) {
        ok = for_chunk(s, b, params, part, true, [&](uint32_t i, const uint8_t * slot) {
            for (int64_t t = 0; t < n_tokens; t++) {
                token_out(op, t)[i] = kernel.dot(slot + p.slot_offset, converted + (size_t) t * kernel.x_bytes);
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
    end(s, b, part, params);
}

// gate or up, resident: computed in full by the stock kernel; if `choose`, its result says what is active
static void resident_rows(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op, bool choose) {
    const bundle_part & p        = b.part(part);
    const int64_t       n_tokens = op->src[1]->ne[1];
    if (!begin(s, b, part, params, n_tokens)) {
        return end(s, b, part, params);
    }
    stock_mul_mat(p.kernel, params, op, p.resident, 0, b.n_ff);
    ggml_barrier(params->threadpool);
    if (choose) {
        const int64_t t0 = params->ith == 0 ? flash_now_ns() : 0;
        pick(s, b, params, n_tokens, [&](int64_t t, uint32_t i) {
            const float y = token(op, t)[i];
            return b.gated ? b.gate_open(i, y) : b.value(i, 0.0f, y) != 0.0f;
        });
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            gather(s, params->nth, b.active);
            s.stats.predict_ns += (uint64_t) (flash_now_ns() - t0);
            chosen(s, b, n_tokens);
            s.ffn.list = b.active;
            s.ffn.end  = 0;
            s.settle_reads(false);
            next_chunk(s, b); // the reads begin; who computes waits for them
        }
    } else if (b.gated && part == ffn_part::gate) { // for the pass of up and down
        uint32_t first;
        uint32_t last;
        share((uint32_t) n_tokens, params, first, last);
        for (uint32_t t = first; t < last; t++) {
            memcpy(s.ffn.other.data() + (size_t) t * b.n_ff, token(op, t), b.n_ff * sizeof(float));
        }
    }
    end(s, b, part, params);
}

// down: the sum of the neurons that have a value, in ascending order
static void sparse_sums(llama_flash_session & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * h        = op->src[1];
    const int64_t       n_tokens = h->ne[1];
    const bundle_part & p        = b.part(ffn_part::down);
    ffn_work &          w        = s.ffn;

    if (!begin(s, b, ffn_part::down, params, n_tokens)) {
        return end(s, b, ffn_part::down, params);
    }
    pick(s, b, params, n_tokens, [&](int64_t t, uint32_t i) { return token(h, t)[i] != 0.0f; });
    int64_t first;
    int64_t last;
    sum_columns(p.type, b.n_embd, params->ith, params->nth, first, last);
    for (int64_t t = 0; t < n_tokens; t++) {
        std::fill(token_out(op, t) + first, token_out(op, t) + last, 0.0f);
    }
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        gather(s, params->nth, w.list);
        w.end = 0;
        s.settle_reads(false);
        next_chunk(s, b);
    }
    bool ok = agreed(s, params);
    while (ok) {
        ok = for_chunk(s, b, params, ffn_part::down, false, [](uint32_t, const uint8_t *) {});
        if (!ok) {
            break;
        }
        float tile[SUM_COLUMNS];
        for (size_t k = w.begin; k < w.end; k++) {
            const uint32_t  i   = w.list[k];
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
                for (int64_t t = 0; t < n_tokens; t++) {
                    const float value = token(h, t)[i];
                    if (value != 0.0f) {
                        add_scaled(token_out(op, t) + c, tile, value, n);
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
    end(s, b, ffn_part::down, params);
}

// whole layers

// order-independent digest of the activations that are not zero
static uint64_t digest_of(uint64_t t, uint64_t i, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint64_t x = (bits | i << 32) + (t + 1) * 0x9e3779b97f4a7c15ull;
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ (x >> 33);
}

// What a pass over a layer's records computes.
struct layer_pass {
    ggml_tensor *       rows[2]    = {};       // gate, up: op whose output they are (a copy of the op where the output is ours)
    const float *       gate       = nullptr;  // [tokens][n_ff], gate's and up's results: what values are made of
    const float *       up         = nullptr;
    const ggml_tensor * activation = nullptr;  // down's own source, if not made here
    float *             sums       = nullptr;  // [tokens][n_embd]
    int64_t             n_tokens   = 0;
    bool                ahead      = false;    // the next layer will be passed over too
};

// leader: the next run, pinned ones first
static const neuron_store::run * next_run(llama_flash_session & s, const flash_bundle & b, uint32_t done) {
    if (done >= b.n_pinned) {
        return s.neurons.stream_next(s);
    }
    neuron_store::run & r = s.ffn.home;
    r.first               = done;
    r.count               = std::min(FFN_RUN_ROWS, b.n_pinned - done);
    for (size_t p = 0; p < FFN_PARTS; p++) {
        r.data[p]   = b.parts[p].present ? b.in_bundle(b.home, (ffn_part) p, done) : nullptr;
        r.stride[p] = b.record_bytes;
    }
    return &r;
}

// all: rows of gate or up of the run by the stock kernel
static void run_rows(llama_flash_session & s, const flash_bundle & b, size_t part, const ggml_compute_params * params, const ggml_tensor * op) {
    static thread_local std::vector<uint8_t> scratch;

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
    stock_mul_mat(p.kernel, params, op, s.ffn.compact.data(), run.first, run.count);
    ggml_barrier(params->threadpool);
}

// all: the values of the run's neurons, this thread's tokens
static void run_values(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass) {
    ffn_work &                w   = s.ffn;
    const neuron_store::run & run = *w.run;
    uint64_t                  sum = 0;
    uint32_t                  first;
    uint32_t                  last;
    share((uint32_t) pass.n_tokens, params, first, last);
    for (uint32_t t = first; t < last; t++) {
        uint32_t * rows   = w.value_row.data() + (size_t) t * FFN_RUN_ROWS;
        float *    values = w.value.data() + (size_t) t * FFN_RUN_ROWS;
        uint32_t   n      = 0;
        for (uint32_t r = 0; r < run.count; r++) {
            const uint32_t i = run.first + r;
            float          value;
            if (pass.activation) {
                value = token(pass.activation, t)[i];
            } else {
                const size_t at = (size_t) t * b.n_ff + i;
                value           = b.value(i, pass.gate ? pass.gate[at] : 0.0f, pass.up[at]);
            }
            if (value != 0.0f) {
                rows[n]   = r;
                values[n] = value;
                n++;
                sum += digest_of(t, i, value);
            }
        }
        w.n_values[t] = n;
    }
    w.digests[(size_t) params->ith] += sum;
}

// all: adds the run's neurons to the sums, this thread's columns
static void run_sums(llama_flash_session & s, const flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass) {
    static thread_local std::vector<float>   tile;
    static thread_local std::vector<uint8_t> used;

    const ffn_work &          w    = s.ffn;
    const neuron_store::run & run  = *w.run;
    const size_t              down = (size_t) ffn_part::down;
    tile.resize(FFN_RUN_ROWS * SUM_COLUMNS);
    used.assign(FFN_RUN_ROWS, 0);
    for (int64_t t = 0; t < pass.n_tokens; t++) {
        for (uint32_t k = 0; k < w.n_values[(size_t) t]; k++) {
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
        for (int64_t t = 0; t < pass.n_tokens; t++) {
            const uint32_t * rows   = w.value_row.data() + (size_t) t * FFN_RUN_ROWS;
            const float *    values = w.value.data() + (size_t) t * FFN_RUN_ROWS;
            float *          sums   = pass.sums + (size_t) t * b.n_embd + c;
            for (uint32_t k = 0; k < w.n_values[(size_t) t]; k++) {
                add_scaled(sums, tile.data() + rows[k] * SUM_COLUMNS, values[k], n);
            }
        }
    }
}

// leader: empty slots are filled with the neurons that the prompt uses most, each layer its share
static void keep_most_used(llama_flash_session & s, const flash_bundle & b, const layer_pass & pass) {
    ffn_work &                w   = s.ffn;
    const neuron_store::run & run = *w.run;
    if (s.neuron_params.mode == LLAMA_FLASH_NEURONS_OFF || s.neurons.n_empty() == 0 || run.first < b.n_pinned) {
        return;
    }
    std::fill(w.uses.begin(), w.uses.end(), 0);
    for (int64_t t = 0; t < pass.n_tokens; t++) {
        for (uint32_t k = 0; k < w.n_values[(size_t) t]; k++) {
            w.uses[w.value_row[(size_t) t * FFN_RUN_ROWS + k]]++;
        }
    }
    s.neurons.keep(b, run, w.uses.data(), (uint32_t) pass.n_tokens, b.tokens);
}

// All: one pass over b's records. Between begin() and end(). false: the op has failed.
static bool pass_over(llama_flash_session & s, flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass) {
    ffn_work & w      = s.ffn;
    const bool leader = params->ith == 0;
    if (leader) {
        s.neurons.stream_begin(s, b, b.n_pinned, FFN_RUN_ROWS, pass.ahead);
    }
    if (pass.sums) {
        uint32_t first;
        uint32_t last;
        share((uint32_t) pass.n_tokens, params, first, last);
        std::fill(pass.sums + (size_t) first * b.n_embd, pass.sums + (size_t) last * b.n_embd, 0.0f);
    }
    uint32_t count = 0;
    for (uint32_t done = 0; done < b.n_ff; done += count) {
        if (leader) {
            w.run = next_run(s, b, done);
            if (w.run && w.run->first != done) {
                s.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "a run out of order");
            }
        }
        if (!agreed(s, params)) {
            return false;
        }
        count = w.run->count;
        for (size_t part = 0; part < 2; part++) {
            if (pass.rows[part]) {
                run_rows(s, b, part, params, pass.rows[part]);
            }
        }
        if (pass.sums) {
            run_values(s, b, params, pass);
            ggml_barrier(params->threadpool);
            run_sums(s, b, params, pass);
            if (leader) {
                keep_most_used(s, b, pass);
            }
        }
        ggml_barrier(params->threadpool);
        if (leader && done >= b.n_pinned) {
            s.neurons.stream_give();
            w.has_read = true;
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
    return s.neuron_params.mode == LLAMA_FLASH_NEURONS_OFF || (n_tokens > DECODE_TOKENS && b.index + 2 < s.bundles.size());
}

// gate or up for all neurons, and with the last of them the sums of down
static void whole_rows(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    const int64_t  n_tokens = op->src[1]->ne[1];
    const ffn_part twin     = part == ffn_part::gate ? ffn_part::up : ffn_part::gate;
    if (!begin(s, b, part, params, n_tokens)) {
        return end(s, b, part, params);
    }
    if (b.gated && (b.done & bit_of(twin)) && b.part(part).cached && b.part(twin).cached) { // computed with the first
        uint32_t first;
        uint32_t last;
        share((uint32_t) n_tokens, params, first, last);
        for (uint32_t t = first; t < last; t++) {
            memcpy(token_out(op, t), s.ffn.other.data() + (size_t) t * b.n_ff, b.n_ff * sizeof(float));
        }
        return end(s, b, part, params);
    }
    if (params->ith == 0) {
        note_prompt(s, b, n_tokens);
    }
    ggml_barrier(params->threadpool); // all have read what begin() decided

    // the other part's op has not come: its output goes to ours
    ggml_tensor twin_op = *op;
    layer_pass  pass;
    pass.n_tokens = n_tokens;
    pass.sums     = s.ffn.sums.data();
    pass.ahead    = passes_on(s, b, n_tokens);
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
    end(s, b, part, params);
}

// down for many tokens: the sums that were made in passing, if they are of these activations
static void whole_sums(llama_flash_session & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * h        = op->src[1];
    const int64_t       n_tokens = h->ne[1];
    if (!begin(s, b, ffn_part::down, params, n_tokens)) {
        return end(s, b, ffn_part::down, params);
    }
    uint32_t first;
    uint32_t last;
    share((uint32_t) n_tokens, params, first, last);
    if (b.fused && b.fused_tokens == (uint64_t) n_tokens) {
        uint64_t sum = 0;
        for (uint32_t t = first; t < last; t++) {
            const float * values = token(h, t);
            for (uint32_t i = 0; i < b.n_ff; i++) {
                if (values[i] != 0.0f) {
                    sum += digest_of(t, i, values[i]);
                }
            }
        }
        s.ffn.digests[(size_t) params->ith] = sum;
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            s.ffn.same = total_digest(s.ffn) == b.fused_digest;
            s.stats.layers_repeated += !s.ffn.same;
            std::fill(s.ffn.digests.begin(), s.ffn.digests.end(), 0);
        }
    } else if (params->ith == 0) {
        s.ffn.same = false;
    }
    ggml_barrier(params->threadpool);
    if (!s.ffn.same) {
        layer_pass pass;
        pass.n_tokens   = n_tokens;
        pass.sums       = s.ffn.sums.data();
        pass.activation = h;
        pass.ahead      = passes_on(s, b, n_tokens);
        if (!pass_over(s, b, params, pass)) {
            return end(s, b, ffn_part::down, params);
        }
    }
    for (uint32_t t = first; t < last; t++) {
        memcpy(token_out(op, t), s.ffn.sums.data() + (size_t) t * b.n_embd, b.n_embd * sizeof(float));
    }
    end(s, b, ffn_part::down, params);
}

void flash_ffn(llama_flash_session & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * x     = op->src[1];
    const uint32_t      mode  = s.neuron_params.mode;
    const bool          whole = x->ne[1] > DECODE_TOKENS || mode == LLAMA_FLASH_NEURONS_OFF || (mode == LLAMA_FLASH_NEURONS_LOWRANK && b.predict.rank == 0);

    if (x->ne[2] != 1 || x->ne[3] != 1 || op->nb[1] != (size_t) op->ne[0] * sizeof(float) || x->nb[0] != sizeof(float)) {
        if (begin(s, b, part, params, x->ne[1]) && params->ith == 0) {
            s.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "the graph multiplies it with something that is not a row of tokens");
        }
        end(s, b, part, params);
    } else if (part == ffn_part::down) {
        whole ? whole_sums(s, b, params, op) : sparse_sums(s, b, params, op);
    } else if (!b.part(part).cached) {
        resident_rows(s, b, part, params, op, !whole);
    } else {
        whole ? whole_rows(s, b, part, params, op) : sparse_rows(s, b, part, params, op);
    }
}
