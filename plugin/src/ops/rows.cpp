#include "ops/rows.h"

#include "ggml-cpu-impl.h"

void row_op::compute(const flash_tensor & t, const ggml_compute_params * params, const ggml_tensor * op) const {
    ggml_tensor ids = *op->src[1];
    ids.data        = const_cast<int32_t *>(rows.places().data());
    ids.ne[0]       = (int64_t) rows.places().size();
    ids.nb[0]       = sizeof(int32_t);
    ids.nb[1] = ids.nb[2] = ids.nb[3] = ids.nb[0] * (size_t) ids.ne[0];

    ggml_tensor dst = *op;
    dst.src[1]      = &ids;
    dst.ne[1]       = ids.ne[0];
    dst.data        = (char *) op->data + (size_t) first * op->nb[1];
    stock_get_rows(params, dst, rows.data(t.weight.nb[1]), (int64_t) rows.n());
}

void row_op::run(flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op) {
    const bool leader = params->ith == 0;
    if (leader) {
        gate.begin_op(t.name);
        first = 0;
        stop  = reads.failed() || op->src[1]->ne[0] == 0 || !rows.read(t, op->src[1], first);
    }
    for (;;) {
        ggml_barrier(params->threadpool);
        if (stop) {
            ggml_barrier(params->threadpool); // all have seen it before the leader lets another op in
            break;
        }
        const bool more = rows.more();
        compute(t, params, op);
        ggml_barrier(params->threadpool);
        if (!more) {
            break;
        }
        if (leader) {
            first += (int64_t) rows.places().size();
            stop = !rows.read(t, op->src[1], first);
        }
    }
    if (leader) {
        gate.end_op();
    }
}
