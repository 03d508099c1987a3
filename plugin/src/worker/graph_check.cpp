// By op: how many sources it needs, and for those of language models how shapes fit together. What kernels ask of types, supports_op
// says. Numbers that are computed (ids of rows and experts) can be wrong still: a worker computes in a process of its own.
//
// Long: the tables of ops are one switch each.
#include "worker/graph_check.h"

#include "worker/weights.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <cstdint>
#include <cstring>

namespace {

// sources without which an op cannot be; -1: nobody may ask for it
int sources_of(ggml_op op) {
    switch (op) {
        case GGML_OP_NONE:
        case GGML_OP_ARANGE:
            return 0;
        case GGML_OP_ADD:
        case GGML_OP_ADD1:
        case GGML_OP_ACC:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_COUNT_EQUAL:
        case GGML_OP_CONCAT:
        case GGML_OP_MUL_MAT:
        case GGML_OP_OUT_PROD:
        case GGML_OP_SET:
        case GGML_OP_CPY:
        case GGML_OP_GET_ROWS:
        case GGML_OP_SET_ROWS:
        case GGML_OP_ROPE:
        case GGML_OP_IM2COL:
        case GGML_OP_CONV_2D_DW:
        case GGML_OP_SSM_CONV:
        case GGML_OP_SOLVE_TRI:
            return 2;
        case GGML_OP_ADD_ID:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_FLASH_ATTN_EXT:
            return 3;
        case GGML_OP_GATED_LINEAR_ATTN:
            return 5;
        case GGML_OP_RWKV_WKV6:
        case GGML_OP_GATED_DELTA_NET:
            return 6;
        case GGML_OP_SSM_SCAN:
        case GGML_OP_RWKV_WKV7:
            return 7;
        case GGML_OP_DUP:
        case GGML_OP_SQR:
        case GGML_OP_SQRT:
        case GGML_OP_LOG:
        case GGML_OP_SIN:
        case GGML_OP_COS:
        case GGML_OP_SUM:
        case GGML_OP_SUM_ROWS:
        case GGML_OP_CUMSUM:
        case GGML_OP_MEAN:
        case GGML_OP_ARGMAX:
        case GGML_OP_REPEAT:
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_GROUP_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_SCALE:
        case GGML_OP_CONT:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_DIAG:
        case GGML_OP_DIAG_MASK_INF:
        case GGML_OP_DIAG_MASK_ZERO:
        case GGML_OP_SOFT_MAX:
        case GGML_OP_CLAMP:
        case GGML_OP_PAD:
        case GGML_OP_ROLL:
        case GGML_OP_ARGSORT:
        case GGML_OP_TOP_K:
        case GGML_OP_LEAKY_RELU:
        case GGML_OP_TRI:
        case GGML_OP_FILL:
        case GGML_OP_UNARY:
        case GGML_OP_GLU:
            return 1;
        default: // functions by address, images, training
            return -1;
    }
}

bool is_view(ggml_op op) {
    return op == GGML_OP_NONE || op == GGML_OP_RESHAPE || op == GGML_OP_VIEW || op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

bool divides(int64_t a, int64_t b) {
    return a > 0 && b % a == 0;
}

// ggml's own is not public
bool fit_as_product(const ggml_tensor & a, const ggml_tensor & b) {
    return a.ne[0] == b.ne[0] && divides(a.ne[2], b.ne[2]) && divides(a.ne[3], b.ne[3]);
}

bool has_shape(const ggml_tensor & t, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    return t.ne[0] == ne0 && t.ne[1] == ne1 && t.ne[2] == ne2 && t.ne[3] == ne3;
}

bool glu_fits(const ggml_tensor & t) {
    const ggml_tensor & a = *t.src[0];
    return t.src[1] ? ggml_are_same_shape(&a, t.src[1]) && ggml_are_same_shape(&a, &t) : a.ne[0] / 2 == t.ne[0] && ggml_nrows(&a) == ggml_nrows(&t);
}

bool attention_fits(const ggml_tensor & t) {
    const ggml_tensor & q = *t.src[0];
    const ggml_tensor & k = *t.src[1];
    const ggml_tensor & v = *t.src[2];
    const ggml_tensor * m = t.src[3];
    return fit_as_product(k, q) && v.ne[1] == k.ne[1] && divides(v.ne[2], q.ne[2]) && divides(v.ne[3], q.ne[3]) &&
           has_shape(t, v.ne[0], q.ne[2], q.ne[1], q.ne[3]) && (!m || (m->ne[0] == k.ne[1] && m->ne[1] >= q.ne[1]));
}

bool rows_fit(const ggml_tensor & t) {
    const ggml_tensor & a   = *t.src[0];
    const ggml_tensor & ids = *t.src[1];
    if (t.op == GGML_OP_GET_ROWS) {
        return has_shape(t, a.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]) && a.ne[2] == ids.ne[1] && a.ne[3] == ids.ne[2] && ids.ne[3] == 1 &&
               ids.type == GGML_TYPE_I32;
    }
    return a.ne[0] == t.ne[0] && a.ne[2] == t.ne[2] && a.ne[3] == t.ne[3] && a.ne[1] == ids.ne[0] && divides(ids.ne[1], a.ne[2]) &&
           divides(ids.ne[2], a.ne[3]) && (ids.type == GGML_TYPE_I64 || ids.type == GGML_TYPE_I32) && a.type == GGML_TYPE_F32;
}

bool experts_fit(const ggml_tensor & t) {
    const ggml_tensor & a   = *t.src[0];
    const ggml_tensor & b   = *t.src[1];
    const ggml_tensor & ids = *t.src[2];
    if (t.op == GGML_OP_ADD_ID) {
        return ggml_are_same_shape(&a, &t) && a.ne[0] == b.ne[0] && a.ne[1] == ids.ne[0] && a.ne[2] == ids.ne[1] && ids.type == GGML_TYPE_I32;
    }
    // a fourth source would be a table of addresses, see ggml_mul_mat_id_expert
    return !t.src[3] && ids.type == GGML_TYPE_I32 && a.ne[0] == b.ne[0] && a.ne[3] == 1 && ids.ne[1] == b.ne[2] && divides(b.ne[1], ids.ne[0]) &&
           has_shape(t, a.ne[1], ids.ne[0], b.ne[2], 1);
}

bool shapes_fit(const ggml_tensor & t) {
    const ggml_tensor & a = *t.src[0];
    switch (t.op) {
        case GGML_OP_ADD:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            return ggml_can_repeat(t.src[1], &a) && ggml_are_same_shape(&a, &t);
        case GGML_OP_MUL_MAT:
            return fit_as_product(a, *t.src[1]) && has_shape(t, a.ne[1], t.src[1]->ne[1], t.src[1]->ne[2], t.src[1]->ne[3]) && !ggml_is_transposed(&a);
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ADD_ID:
            return experts_fit(t);
        case GGML_OP_GET_ROWS:
        case GGML_OP_SET_ROWS:
            return rows_fit(t);
        case GGML_OP_FLASH_ATTN_EXT:
            return attention_fits(t);
        case GGML_OP_GLU:
            return glu_fits(t);
        case GGML_OP_REPEAT:
            return ggml_can_repeat(&a, &t);
        case GGML_OP_DUP:
        case GGML_OP_CPY:
        case GGML_OP_CONT:
            return ggml_nelements(&a) == ggml_nelements(&t);
        case GGML_OP_ROPE:
            return ggml_are_same_shape(&a, &t) && t.src[1]->type == GGML_TYPE_I32 && t.src[1]->ne[0] >= a.ne[2];
        case GGML_OP_SOFT_MAX:
            return ggml_are_same_shape(&a, &t) && (!t.src[1] || (t.src[1]->ne[0] == a.ne[0] && t.src[1]->ne[1] >= a.ne[1]));
        case GGML_OP_SUM_ROWS:
        case GGML_OP_MEAN:
            return has_shape(t, 1, a.ne[1], a.ne[2], a.ne[3]);
        case GGML_OP_SQR:
        case GGML_OP_SQRT:
        case GGML_OP_LOG:
        case GGML_OP_SIN:
        case GGML_OP_COS:
        case GGML_OP_CUMSUM:
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_GROUP_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_DIAG_MASK_INF:
        case GGML_OP_DIAG_MASK_ZERO:
        case GGML_OP_LEAKY_RELU:
        case GGML_OP_TRI:
        case GGML_OP_UNARY:
        case GGML_OP_ARGSORT:
            return ggml_are_same_shape(&a, &t);
        default:
            return true;
    }
}

std::string named(const ggml_tensor & t) {
    return std::string("the op ") + ggml_op_name(t.op) + " of tensor '" + t.name + "'";
}

// a weight that is not in the client's buffer has one use: rows of floats, one behind the other, come of whole rows
bool weights_are_used_right(const ggml_tensor & t) {
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const bool is_product = i == 0 && (t.op == GGML_OP_MUL_MAT || t.op == GGML_OP_MUL_MAT_ID) && t.src[1];
        if (t.src[i] && worker_weights::is_elsewhere(*t.src[i]) &&
            !(is_product && ggml_is_contiguous(&t) && t.src[1]->nb[0] == ggml_type_size(t.src[1]->type))) {
            return false;
        }
    }
    return !worker_weights::is_elsewhere(t) && !(t.view_src && worker_weights::is_elsewhere(*t.view_src));
}

bool node_is_sound(const ggml_tensor & t, std::string & reason) {
    const int n = sources_of(t.op);
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const ggml_tensor * s = t.src[i];
        if ((!s && i < n) || (s && !is_view(t.op) && !ggml_is_empty(s) && (!s->data || !s->buffer))) {
            reason = named(t) + ": source " + std::to_string(i) + " is missing";
            return false;
        }
    }
    if (!weights_are_used_right(t)) {
        reason = named(t) + ": a weight is used in another way than it was bound for";
        return false;
    }
    if (is_view(t.op) || ggml_is_empty(&t)) {
        return true; // not computed
    }
    if (!t.data || !t.buffer) {
        reason = named(t) + ": nowhere to write to";
        return false;
    }
    if (!shapes_fit(t)) {
        reason = named(t) + ": its sources do not fit";
        return false;
    }
    if (!ggml_backend_dev_supports_op(ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0), &t)) {
        reason = named(t) + ": no kernel for these types";
        return false;
    }
    return true;
}

// kernels read numbers, and the halves in a block's head, where the CPU expects them
bool is_aligned(const ggml_tensor & t) {
    const size_t size = ggml_type_size(t.type);
    const size_t unit = ggml_blck_size(t.type) == 1 ? size : size % 2 == 0 ? 2
                                                                           : 1;
    bool         ok   = (uintptr_t) t.data % unit == 0;
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        ok = ok && (t.ne[i] <= 1 || t.nb[i] % unit == 0);
    }
    return ok;
}

} // namespace

bool tensor_is_sound(const ggml_tensor & tensor, std::string & reason) {
    uint32_t op; // as it was sent, which may be no enum ggml_op
    static_assert(sizeof(op) == sizeof(tensor.op), "an op is sent as 32 bits");
    memcpy(&op, &tensor.op, sizeof(op));
    if (op >= GGML_OP_COUNT || sources_of((ggml_op) op) < 0) {
        reason = "the op " + std::to_string(op) + " of tensor '" + tensor.name + "' is not computed for others";
        return false;
    }
    const auto        blck  = (unsigned __int128) ggml_blck_size(tensor.type);
    unsigned __int128 bytes = (unsigned __int128) tensor.ne[0] * (blck > 1 ? tensor.nb[0] : 1) / blck + ggml_type_size(tensor.type);
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        bytes += (unsigned __int128) (tensor.ne[i] > 0 ? tensor.ne[i] - 1 : 0) * tensor.nb[i];
    }
    const unsigned __int128 elements = (unsigned __int128) tensor.ne[0] * tensor.ne[1];
    if (tensor.ne[0] % ggml_blck_size(tensor.type) != 0 || bytes > (unsigned __int128) 1 << 46 ||
        elements * tensor.ne[2] > (unsigned __int128) 1 << 62 || elements * tensor.ne[2] * tensor.ne[3] > (unsigned __int128) 1 << 62) {
        reason = std::string("tensor '") + tensor.name + "': its shape makes no sense";
        return false;
    }
    if (!is_aligned(tensor)) {
        reason = std::string("tensor '") + tensor.name + "': its numbers are not where a number may lie";
        return false;
    }
    return true;
}

bool graph_is_sound(const ggml_cgraph & graph, std::string & reason) {
    for (int i = 0; i < graph.n_nodes; i++) {
        if (!graph.nodes[i]) {
            reason = "a graph with a node that is none";
            return false;
        }
        if (!node_is_sound(*graph.nodes[i], reason)) {
            return false;
        }
    }
    return true;
}
