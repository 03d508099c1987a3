#include "kernels/router.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cmath>

static constexpr int   LONGEST_PATH = 24;    // nodes between ids and router
static constexpr float LEAST_WEIGHT = 1e-3f; // of a norm, to be divided by

static bool is_plain(const ggml_tensor * t) {
    return t && t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && t->op == GGML_OP_NONE && !t->extra;
}

// a weight, which lives as long as the model, and whose values we can read
static bool readable(const ggml_tensor * t) {
    return t && t->data && t->buffer && ggml_backend_buffer_is_host(t->buffer) && ggml_backend_buffer_get_usage(t->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

// the tensor whose values, in the same order, `t` shows
static const ggml_tensor * source(const ggml_tensor * t) {
    while (t && (t->op == GGML_OP_RESHAPE || (t->op == GGML_OP_VIEW && ggml_nelements(t) == ggml_nelements(t->src[0])))) {
        t = t->src[0];
    }
    return t;
}

const ggml_tensor * router::product(const ggml_tensor * op) {
    const ggml_tensor * t = op->src[2];
    for (int i = 0; t && i < LONGEST_PATH; i++, t = t->src[0]) {
        if (t->op == GGML_OP_MUL_MAT) {
            return t;
        }
    }
    return nullptr;
}

router::tensors router::named(const ggml_tensor * op) {
    const ggml_tensor * input = source(op->src[1]);
    const ggml_tensor * t     = product(op);
    const ggml_tensor * w     = t ? t->src[0] : nullptr;
    if (!is_plain(w) || w->ne[1] != op->src[0]->ne[2] || w->ne[0] != op->src[1]->ne[0] || source(t->src[1]) != input) {
        return {}; // there is none, or it looks at something else than the experts do
    }
    const ggml_tensor * norm = input->op == GGML_OP_MUL ? input->src[1] : nullptr;
    return { w, is_plain(norm) && ggml_nelements(norm) == w->ne[0] ? norm : nullptr };
}

router router::of(const ggml_tensor * op) {
    router        r;
    const tensors found = named(op);
    if (!readable(found.weight)) {
        return r;
    }
    r.weight   = (const float *) found.weight->data;
    r.n_embd   = (uint32_t) found.weight->ne[0];
    r.n_expert = (uint32_t) found.weight->ne[1];
    r.norm     = readable(found.norm) ? (const float *) found.norm->data : nullptr;
    return r;
}

void input_for(const router & here, const router & next, const float * input, std::vector<float> & out) {
    out.assign(input, input + next.n_embd);
    if (!here.norm || !next.norm) {
        return;
    }
    for (uint32_t i = 0; i < next.n_embd; i++) {
        out[i] *= std::fabs(here.norm[i]) > LEAST_WEIGHT ? next.norm[i] / here.norm[i] : 1.0f;
    }
}

void score_experts(const router & r, const float * input, int ith, int nth, float * scores) {
    const auto dot = ggml_get_type_traits_cpu(GGML_TYPE_F32)->vec_dot;
    for (uint32_t e = (uint32_t) ith; e < r.n_expert; e += (uint32_t) nth) {
        dot((int) r.n_embd, &scores[e], 0, r.weight + (size_t) e * r.n_embd, 0, input, 0, 1);
    }
}
