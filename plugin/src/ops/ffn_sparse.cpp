// A few tokens: the active neurons of a block, chosen by the first op that can, and read where they are missing.
#include "ops/ffn_shared.h"

#include <algorithm>
#include <cstring>

constexpr float OFF = -1e30f; // finite: OFF * 0 must be 0

// active sets

// Leader: b.active is the active set of a new evaluation. by_token: a token computes what its own input asks for, no matter what the
// others of its pass do.
static void chosen(ffn_op & s, flash_bundle & b, int64_t n_tokens, bool by_token) {
    s.clock.advance(b.tokens, (uint64_t) n_tokens);
    b.chosen   = true;
    b.by_token = by_token && n_tokens > 1;
    b.counted  = 0;
    s.neurons.use(b, (uint32_t) n_tokens);
}

// all: the threads' shares of the neurons that b's predictor expects for x; tokens: for predictor::select
static void predict(ffn_op & s, const flash_bundle & b, const ggml_compute_params * params, const ggml_tensor * x, uint16_t * tokens) {
    static_assert(DECODE_TOKENS <= 8 * sizeof(*tokens), "a bit for each token");
    static thread_local std::vector<uint8_t> x_store;
    static thread_local std::vector<uint8_t> p_store;

    const predictor & p        = b.predict;
    const int64_t     n_tokens = x->ne[1];
    p.project(convert(p.in, token(x, 0), x->nb[1], n_tokens, x_store), p.in.x_bytes, n_tokens, params->ith, params->nth, s.work.projected.data());
    ggml_barrier(params->threadpool);
    std::vector<uint32_t> & picked = s.work.picked[(size_t) params->ith];
    picked.clear();
    uint32_t first;
    uint32_t last;
    share(b.n_ff, params, first, last);
    p.select(convert(p.out, s.work.projected.data(), p.rank * sizeof(float), n_tokens, p_store), p.out.x_bytes, n_tokens, first, last, picked,
             tokens);
}

// all: the threads' shares of the neurons for which f(column, neuron of the expert) holds for any of the expert's columns
template <typename F> static void pick(ffn_op & s, const flash_bundle & b, const ggml_compute_params * params, F f) {
    const ffn_work &        w      = s.work;
    std::vector<uint32_t> & picked = s.work.picked[(size_t) params->ith];
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
static void next_chunk(ffn_op & s, flash_bundle & b) {
    ffn_work &    w    = s.work;
    const int64_t t0   = flash_now_ns();
    const size_t  most = b.n_pinned == b.n_neurons ? w.list.size() : std::max<size_t>(1, s.neurons.n_slots() / 2);
    w.begin            = w.end;
    w.end              = std::min(w.list.size(), w.begin + most);
    if (w.list.size() > most) {
        s.neurons.release();
    }
    w.left.clear();
    w.there.clear();
    s.neurons.demand(b, w.list.data() + w.begin, w.end - w.begin, w.end > b.counted);
    b.counted = std::max(b.counted, w.end);
    for (size_t k = w.begin; k < w.end; k++) {
        w.asked[w.list[k]] = s.gate.stamp;
        (s.neurons.find(b, w.list[k]) ? w.there : w.left).push_back(w.list[k]);
    }
    w.next.store(0, std::memory_order_relaxed);
    s.notes.stats.manage_ns += (uint64_t) (flash_now_ns() - t0);
}

// leader: waits for something to land; false: nothing is missing any more (or the op has failed)
static bool wait_for_landing(ffn_op & s, const flash_bundle & b) {
    while (!s.work.left.empty()) {
        s.reads.settle(false);
        if (s.failed()) {
            return false;
        }
        if (s.neurons.begin_landing()) {
            s.work.has_read = true;
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
static bool for_chunk(ffn_op & s, const flash_bundle & b, const ggml_compute_params * params, ffn_part part, bool as_they_come, F f) {
    constexpr int64_t AT_ONCE = 8;
    ffn_work &        w       = s.work;
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
            if (as_they_come && &of == &b && w.asked[neuron] == s.gate.stamp && stream->slot_offset <= part_at &&
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
static void look_ahead(ffn_op & s, const flash_bundle & b, const ggml_compute_params * params, const ggml_tensor * x) {
    const bool wanted = s.neuron_params.lookahead && s.neuron_params.mode == LLAMA_FLASH_NEURONS_LOWRANK && b.index + 1 < s.bundles.size() &&
                        s.bundles[b.index + 1].predict.rank > 0 && s.bundles[b.index + 1].n_embd == b.n_embd && x->ne[1] == 1;
    if (!wanted) {
        return;
    }
    const flash_bundle & next = s.bundles[b.index + 1];
    predict(s, next, params, x, nullptr);
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        gather(s.work, params->nth, s.work.list);
        s.neurons.expect(next, s.work.list.data(), s.work.list.size());
    }
}

// all: what gate or up is for neurons that are not active, this thread's share of them
static void write_off(const ffn_work & w, const flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    uint32_t first;
    uint32_t last;
    share(b.n_ff, params, first, last);
    for (const ffn_column & c : w.columns) {
        std::fill(token_out(op, c.out) + first, token_out(op, c.out) + last, b.gated && part == ffn_part::up ? 0.0f : OFF);
    }
}

// gate or up, its rows from flash: the active ones
void sparse_rows(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    static thread_local std::vector<uint8_t> store;

    const ggml_tensor * x = op->src[1];
    const bundle_part & p = b.part(part);
    const row_kernel    kernel(p.type, b.n_embd);
    ffn_work &          w      = s.work;
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
        predict(s, b, params, x, x->ne[1] > 1 ? w.tokens_of.data() : nullptr);
    } else if (choose) { // without a predictor: all neurons of the experts that are used
        pick(s, b, params, [](uint32_t, uint32_t) { return true; });
    }
    write_off(w, b, part, params, op);
    ggml_barrier(params->threadpool);
    if (leader) {
        if (choose) {
            gather(s.work, params->nth, b.active);
            s.notes.stats.predict_ns += (uint64_t) (flash_now_ns() - t0);
            chosen(s, b, w.n_tokens, b.predict.rank > 0);
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
                if (!b.by_token || (w.tokens_of[i] >> c.x & 1)) {
                    token_out(op, c.out)[i - e * b.n_ff] = kernel.dot(slot + p.slot_offset, converted + c.x * kernel.x_bytes);
                }
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
void resident_rows(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op, bool choose) {
    static thread_local std::vector<const void *> table;

    const bundle_part & p = b.part(part);
    if (b.n_expert > 0) {
        table.resize(b.n_expert);
        for (size_t e = 0; e < b.n_expert; e++) {
            table[e] = p.resident + e * b.n_ff * p.row_bytes;
        }
        stock_mul_mat_id(p.kernel, params, op, table.data(), false);
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
            gather(s.work, params->nth, b.active);
            s.notes.stats.predict_ns += (uint64_t) (flash_now_ns() - t0);
            chosen(s, b, s.work.n_tokens, false);
            s.work.list = b.active;
            s.work.end  = 0;
            s.reads.settle(false);
            next_chunk(s, b);
            s.neurons.pump(); // the reads begin; who computes waits for them
        }
    } else if (b.gated && part == ffn_part::gate) { // the pass over up and down needs gate's output
        uint32_t first;
        uint32_t last;
        share((uint32_t) s.work.columns.size(), params, first, last);
        for (uint32_t c = first; c < last; c++) {
            memcpy(s.work.other.data() + (size_t) c * b.n_ff, token(op, c), b.n_ff * sizeof(float));
        }
    }
}

// down: the sum of the neurons that have a value, in ascending order
void sparse_sums(ffn_op & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * h = op->src[1];
    const bundle_part & p = b.part(ffn_part::down);
    ffn_work &          w = s.work;
    pick(s, b, params, [&](uint32_t c, uint32_t i) { return token(h, c)[i] != 0.0f; });
    int64_t first;
    int64_t last;
    sum_columns(p.type, b.n_embd, params->ith, params->nth, first, last);
    for (const ffn_column & c : w.columns) {
        std::fill(token_out(op, c.out) + first, token_out(op, c.out) + last, 0.0f);
    }
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        gather(s.work, params->nth, w.list);
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
