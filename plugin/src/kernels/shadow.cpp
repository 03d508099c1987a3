#include "kernels/shadow.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ops.h"
#include "traits.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

// buffers of a few bytes, one per buffer type and process: a shadow weight needs one to belong to
static ggml_backend_buffer_t stand_in(ggml_backend_buffer_type_t buft) {
    static std::mutex           mutex;
    std::lock_guard<std::mutex> lock(mutex);
    static auto &               buffers = *new std::vector<std::pair<ggml_backend_buffer_type_t, ggml_backend_buffer_t>>(); // stays, as they do
    for (auto & entry : buffers) {
        if (entry.first == buft) {
            return entry.second;
        }
    }
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft, 256);
    buffers.emplace_back(buft, buffer);
    return buffer;
}

stock_kernel stock_kernel_for(const ggml_tensor * weight, bool experts) {
    ggml_tensor w = *weight;
    w.data        = nullptr;
    w.extra       = nullptr;

    // the op that the loader asks about, see weight_buft_supported in llama-model-loader.cpp
    ggml_tensor src1 = {};
    src1.type        = GGML_TYPE_F32;
    ggml_tensor op   = {};
    op.op            = experts ? GGML_OP_MUL_MAT_ID : GGML_OP_MUL_MAT;
    op.type          = GGML_TYPE_F32;
    op.src[0]        = &w;
    op.src[1]        = &src1;

    stock_kernel kernel;
    for (ggml_backend_buffer_type_t buft : ggml_backend_cpu_get_extra_buffer_types()) {
        // other layouts (AMX, KleidiAI) are not made of independent groups of rows
        if (!buft || strcmp(ggml_backend_buft_name(buft), "CPU_REPACK") != 0) {
            continue;
        }
        w.buffer = stand_in(buft);
        if (w.buffer && ((ggml::cpu::extra_buffer_type *) buft->context)->supports_op(buft->device, &op)) {
            w.buffer->iface.init_tensor(w.buffer, &w);
            kernel.buffer = w.buffer;
            kernel.extra  = w.extra;
            return kernel;
        }
    }
    kernel.buffer = stand_in(ggml_backend_cpu_buffer_type());
    return kernel;
}

void stock_repack(const stock_kernel & kernel, const ggml_tensor * weight, uint8_t * data, int64_t row, int64_t n, uint8_t * scratch) {
    ggml_tensor rows = *weight;
    rows.buffer      = kernel.buffer;
    rows.extra       = kernel.extra;
    rows.ne[1]       = n;
    rows.ne[2]       = 1;
    rows.ne[3]       = 1;
    rows.nb[2]       = rows.nb[1] * (size_t) n;
    rows.nb[3]       = rows.nb[2];
    rows.data        = data + (size_t) row * rows.nb[1];

    // a group of interleaved rows has as many bytes as the rows themselves
    memcpy(scratch, rows.data, rows.nb[2]);
    kernel.buffer->iface.set_tensor(kernel.buffer, &rows, scratch, 0, rows.nb[2]);
}

void stock_repack_rows(const stock_kernel & kernel, const ggml_tensor * weight, uint8_t * data, int64_t n) {
    std::vector<uint8_t> scratch(kernel.extra ? weight->nb[1] * STOCK_REPACK_ROWS : 0);
    for (int64_t row = 0; kernel.extra && row < n; row += STOCK_REPACK_ROWS) {
        stock_repack(kernel, weight, data, row, std::min(STOCK_REPACK_ROWS, n - row), scratch.data());
    }
}

bool stock_work_size(const stock_kernel & kernel, int n_threads, const ggml_tensor * op, size_t & size) {
    return kernel.extra && ((ggml::cpu::tensor_traits *) kernel.extra)->work_size(n_threads, op, size);
}

// the shadow of op's weight: n rows at data
static ggml_tensor shadow_weight(const stock_kernel & kernel, const ggml_tensor * op, const void * data, int64_t n) {
    ggml_tensor w = *op->src[0];
    w.buffer      = kernel.buffer;
    w.extra       = kernel.extra;
    w.data        = const_cast<void *>(data);
    w.ne[1]       = n;
    return w;
}

void stock_mul_mat(const stock_kernel & kernel, const ggml_compute_params * params, const ggml_tensor * op, const void * data,
                   int64_t row, int64_t n) {
    ggml_tensor w = shadow_weight(kernel, op, data, n);
    w.nb[2]       = w.nb[1] * (size_t) n;
    w.nb[3]       = w.nb[2];

    ggml_tensor dst = *op;
    dst.src[0]      = &w;
    dst.ne[0]       = n;
    dst.data        = (char *) op->data + (size_t) row * op->nb[0];

    ggml_compute_params p = *params;
    if (kernel.extra) {
        ((ggml::cpu::tensor_traits *) kernel.extra)->compute_forward(&p, &dst);
    } else {
        ggml_compute_forward_mul_mat(&p, &dst);
    }
}

void stock_get_rows(const ggml_compute_params * params, const ggml_tensor & op, const void * rows, int64_t n) {
    static const stock_kernel plain = { stand_in(ggml_backend_cpu_buffer_type()), nullptr };

    ggml_tensor w = shadow_weight(plain, &op, rows, n);

    ggml_tensor dst = op;
    dst.src[0]      = &w;
    ggml_compute_forward_get_rows(params, &dst);
}

void stock_mul_mat_id(const stock_kernel & kernel, const ggml_compute_params * params, const ggml_tensor * op, const void * const * table,
                      bool again) {
    ggml_tensor w = shadow_weight(kernel, op, nullptr, op->src[0]->ne[1]);

    ggml_tensor addresses  = {};
    addresses.data         = const_cast<void **>((void * const *) table);
    addresses.op_params[0] = again;

    ggml_tensor dst = *op;
    dst.src[0]      = &w;
    dst.src[3]      = &addresses;

    ggml_compute_params p = *params;
    if (kernel.extra) {
        ((ggml::cpu::tensor_traits *) kernel.extra)->compute_forward(&p, &dst);
    } else {
        ggml_compute_forward_mul_mat_id(&p, &dst);
    }
}
