// Many tokens, or the mode OFF: the records of a block pass by once, in order, and all that is made of them is computed run by run.
#include "ops/ffn_shared.h"

#include <algorithm>
#include <cstring>

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
    ggml_tensor *       rows[2]    = {};      // gate, up: op whose output they are (a copy of the op where the output is ours)
    const float *       gate       = nullptr; // [columns][n_ff], gate's and up's results: what values are made of
    const float *       up         = nullptr;
    const ggml_tensor * activation = nullptr; // down's own source, if not made here
    float *             sums       = nullptr; // [columns][n_embd]
    bool                ahead      = false;   // the next layer will be passed over too
};

// The columns of one expert, and where its neurons begin.
struct expert_columns {
    uint32_t           first; // neuron
    const ffn_column * columns;
    uint32_t           n;
};

// leader: the next run, pinned ones first; end: of the expert
static const neuron_store::run * next_run(ffn_op & s, const flash_bundle & b, uint32_t done, uint32_t end) {
    if (done >= b.n_pinned) {
        return s.neurons.stream_next();
    }
    neuron_store::run & r = s.work.home;
    r.first               = done;
    r.count               = std::min(FFN_RUN_ROWS, std::min(b.n_pinned, end) - done);
    for (size_t p = 0; p < FFN_PARTS; p++) {
        r.data[p]   = b.parts[p].present ? b.in_bundle(b.home, (ffn_part) p, done) : nullptr;
        r.stride[p] = b.record_bytes;
    }
    return &r;
}

// all: the inputs of an expert's columns, one behind the other
static void gather_inputs(ffn_op & s, const flash_bundle & b, const ggml_compute_params * params, const ggml_tensor * x,
                          const expert_columns & e) {
    uint32_t first;
    uint32_t last;
    share(e.n, params, first, last);
    for (uint32_t k = first; k < last; k++) {
        memcpy(s.work.gathered.data() + (size_t) k * b.n_embd, token(x, e.columns[k].x), b.n_embd * sizeof(float));
    }
}

// all: rows of gate or up of the run for few columns, as sparse_rows computes them
static void run_dots(ffn_op & s, const flash_bundle & b, size_t part, const ggml_compute_params * params, ggml_tensor * op,
                     const expert_columns & e) {
    static thread_local std::vector<uint8_t> store;

    const neuron_store::run & run = *s.work.run;
    const row_kernel          kernel(b.parts[part].type, b.n_embd);
    const uint8_t *           converted = convert(kernel, s.work.gathered.data(), b.n_embd * sizeof(float), e.n, store);
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
static void expert_rows(ffn_op & s, const flash_bundle & b, size_t part, const ggml_compute_params * params, ggml_tensor * op,
                        const expert_columns & e) {
    ffn_work &                w      = s.work;
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
static void run_rows(ffn_op & s, const flash_bundle & b, size_t part, const ggml_compute_params * params, ggml_tensor * op,
                     const expert_columns & e) {
    static thread_local std::vector<uint8_t> scratch;

    if (s.work.n_tokens <= DECODE_TOKENS && b.n_expert > 0) {
        return run_dots(s, b, part, params, op, e);
    }
    const neuron_store::run & run = *s.work.run;
    const bundle_part &       p   = b.parts[part];
    scratch.resize(p.row_bytes * STOCK_REPACK_ROWS);
    for (int64_t row = params->ith * STOCK_REPACK_ROWS; row < run.count; row += params->nth * STOCK_REPACK_ROWS) {
        const int64_t n = std::min<int64_t>(STOCK_REPACK_ROWS, run.count - row);
        for (int64_t i = row; i < row + n; i++) {
            memcpy(s.work.compact.data() + (size_t) i * p.row_bytes, run.data[part] + (size_t) i * run.stride[part], p.row_bytes);
        }
        if (p.kernel.extra) {
            stock_repack(p.kernel, &p.weight, s.work.compact.data(), row, n, scratch.data());
        }
    }
    ggml_barrier(params->threadpool);
    if (b.n_expert > 0) {
        return expert_rows(s, b, part, params, op, e);
    }
    stock_mul_mat(p.kernel, params, op, s.work.compact.data(), run.first, run.count);
    ggml_barrier(params->threadpool);
}

// all: the values of the run's neurons, this thread's columns
static void run_values(ffn_op & s, const flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass,
                       const expert_columns & e) {
    ffn_work &                w   = s.work;
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
static void run_sums(ffn_op & s, const flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass,
                     const expert_columns & e) {
    static thread_local std::vector<float>   tile;
    static thread_local std::vector<uint8_t> used;

    const ffn_work &          w    = s.work;
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
static bool is_kept(const ffn_op & s, const flash_bundle & b, uint32_t first, uint32_t n) {
    const ffn_work & w     = s.work;
    uint32_t         ahead = 0; // experts that are used more
    for (uint32_t e : w.experts) {
        const uint32_t other = w.first_column[e + 1] - w.first_column[e];
        ahead += other > n || (other == n && e * b.n_ff < first);
    }
    return ahead < s.neurons.share_of(0, b.n_neurons) / b.n_ff;
}

// leader: empty slots are filled with the neurons that the prompt uses most, each layer its share
static void keep_most_used(ffn_op & s, const flash_bundle & b, const expert_columns & e) {
    ffn_work &                w   = s.work;
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

// All: whether the bytes of the run that has arrived are those of their first read. false: the op has failed.
static bool check_run(ffn_op & s, const ggml_compute_params * params) {
    uint32_t first;
    uint32_t last;
    share(s.work.run->count, params, first, last);
    s.neurons.check_run(first, last);
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        s.neurons.is_run_sound();
    }
    return agreed(s, params);
}

// All: one pass over b's records. Between begin() and end(). false: the op has failed.
static bool pass_over(ffn_op & s, flash_bundle & b, const ggml_compute_params * params, const layer_pass & pass) {
    ffn_work & w      = s.work;
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
                s.neurons.stream_release();
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
static void note_prompt(ffn_op & s, flash_bundle & b, int64_t n_tokens) {
    s.clock.advance(b.tokens, (uint64_t) n_tokens);
}

// whether the next layer will be passed over too; the last layer may see fewer tokens
static bool passes_on(const ffn_op & s, const flash_bundle & b, int64_t n_tokens) {
    if (b.n_expert > 0) {
        return false; // its experts are not yet known
    }
    return s.neuron_params.mode == LLAMA_FLASH_NEURONS_OFF || (n_tokens > DECODE_TOKENS && b.index + 2 < s.bundles.size());
}

// gate or up for all neurons, and with the last of them the sums of down
void whole_rows(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    const int64_t  n_tokens = s.work.n_tokens;
    const ffn_part twin     = part == ffn_part::gate ? ffn_part::up : ffn_part::gate;
    if (b.gated && (b.done & bit_of(twin)) && b.part(part).cached && b.part(twin).cached) { // computed with the first
        uint32_t first;
        uint32_t last;
        share((uint32_t) s.work.columns.size(), params, first, last);
        for (uint32_t c = first; c < last; c++) {
            memcpy(token_out(op, c), s.work.other.data() + (size_t) c * b.n_ff, b.n_ff * sizeof(float));
        }
        return;
    }
    if (params->ith == 0) {
        note_prompt(s, b, n_tokens);
    }
    ggml_barrier(params->threadpool); // all have read what begin() decided

    // the op of the other part comes later: until then its output is in work.other
    ggml_tensor twin_op = *op;
    layer_pass  pass;
    pass.sums                = s.work.sums.data();
    pass.ahead               = passes_on(s, b, n_tokens);
    pass.rows[(size_t) part] = op;
    const float * outputs[2] = {};
    outputs[(size_t) part]   = token(op, 0);
    if (b.gated) {
        if (b.part(twin).cached) {
            twin_op.src[0]           = &b.part(twin).weight;
            twin_op.data             = s.work.other.data();
            pass.rows[(size_t) twin] = &twin_op;
        }
        outputs[(size_t) twin] = s.work.other.data(); // by this pass, or by the resident gate's op
    }
    pass.gate = outputs[0];
    pass.up   = outputs[1];
    if (pass_over(s, b, params, pass) && params->ith == 0) {
        b.fused        = true;
        b.fused_tokens = (uint64_t) n_tokens;
        b.fused_digest = total_digest(s.work);
    }
}

// down for many tokens: the sums that were made in passing, if they are of these activations
void whole_sums(ffn_op & s, flash_bundle & b, const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * h        = op->src[1];
    const int64_t       n_tokens = s.work.n_tokens;
    uint32_t            first;
    uint32_t            last;
    share((uint32_t) s.work.columns.size(), params, first, last);
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
        s.work.digests[(size_t) params->ith] = sum;
        ggml_barrier(params->threadpool);
        if (params->ith == 0) {
            s.work.same = total_digest(s.work) == b.fused_digest;
            s.notes.stats.layers_repeated += !s.work.same;
            std::fill(s.work.digests.begin(), s.work.digests.end(), 0);
        }
    } else if (params->ith == 0) {
        s.work.same = false;
    }
    ggml_barrier(params->threadpool);
    if (!s.work.same) {
        layer_pass pass;
        pass.sums       = s.work.sums.data();
        pass.activation = h;
        pass.ahead      = passes_on(s, b, n_tokens);
        if (!pass_over(s, b, params, pass)) {
            return;
        }
    }
    for (uint32_t c = first; c < last; c++) {
        memcpy(token_out(op, c), s.work.sums.data() + (size_t) c * b.n_embd, b.n_embd * sizeof(float));
    }
}
