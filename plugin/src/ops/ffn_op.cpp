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
#include "ops/ffn_shared.h"

// Leader: whether the op is part of an evaluation of all neurons, in passing. The result is the same for an op of few tokens.
static bool in_passing(const ffn_op & s, const flash_bundle & b) {
    const ffn_work & w = s.work;
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
static bool begin(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params, const ggml_tensor * op) {
    if (params->ith == 0) {
        s.gate.begin_op(b.name);
        if (!s.work.sort_columns(b, part, op)) {
            s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "the graph multiplies it with something that is not a row of tokens");
        }
        const uint32_t n_tokens = s.work.n_tokens;
        if (n_tokens > s.work.n_values.size() && !s.failed()) { // of a context with a larger n_ubatch
            s.work.reserve(s.bundles, n_tokens);
            s.gate.note_ubatch(n_tokens);
        }
        s.work.has_read = false;
        s.work.picked.resize((size_t) params->nth);
        s.work.digests.assign((size_t) params->nth, 0);
        if (part != ffn_part::down && (b.done & (bit_of(part) | bit_of(ffn_part::down)))) {
            b.forget_evaluation();
        }
        if (b.done == 0) {
            s.neurons.release(); // of an evaluation that was broken off
        }
        s.work.whole = !s.failed() && in_passing(s, b);
        s.stop       = s.failed();
    }
    ggml_barrier(params->threadpool);
    return !s.stop;
}

static void end(ffn_op & s, flash_bundle & b, ffn_part part, const ggml_compute_params * params) {
    ggml_barrier(params->threadpool); // all are done before the leader lets another op in
    if (params->ith == 0) {
        b.done |= bit_of(part);
        if (!s.stop && s.work.has_read) { // a file that changed while it was read
            s.reads.look_again();
            s.reads.check_file(*b.file, b.name, b.offset, b.tensor_bytes());
        }
        if (s.stop || s.failed()) {
            b.forget_evaluation();
        } else {
            s.reads.settle(false);
            s.neurons.pump();
        }
        if (b.done == 0 || part == ffn_part::down) {
            s.neurons.release();
        }
        s.gate.end_op();
    }
}

void ffn_op::run(flash_bundle & b, ffn_part part, const ggml_compute_params * params, ggml_tensor * op) {
    if (begin(*this, b, part, params, op)) {
        const bool whole = work.whole;
        if (part == ffn_part::down) {
            whole ? whole_sums(*this, b, params, op) : sparse_sums(*this, b, params, op);
        } else if (!b.part(part).cached) {
            resident_rows(*this, b, part, params, op, !whole);
        } else {
            whole ? whole_rows(*this, b, part, params, op) : sparse_rows(*this, b, part, params, op);
        }
    }
    end(*this, b, part, params);
}
