#include "kernels/sparse.h"

#include "ggml-cpu-impl.h"
#include "llamafile/sgemm.h"

#include <algorithm>
#include <cstring>

row_kernel::row_kernel(ggml_type type, int64_t n) : type(type), n(n), row_bytes(ggml_row_size(type, n)) {
    const ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(type);
    vec_dot                             = traits->vec_dot;
    x_bytes                             = ggml_row_size(traits->vec_dot_type, n);
    from_float                          = traits->vec_dot_type == GGML_TYPE_F32 ? nullptr : ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
}

void row_kernel::convert(const float * x, uint8_t * out) const {
    if (from_float) {
        from_float(x, out, n);
    } else {
        memcpy(out, x, (size_t) n * sizeof(float));
    }
}

float row_kernel::dot(const uint8_t * row, const uint8_t * x) const {
    float      s;
    const bool is_float = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
    if (!is_float || !llamafile_gemv(1, n, row, n, x, &s, type)) {
        vec_dot((int) n, &s, 0, row, 0, x, 0, 1);
    }
    return s;
}

bool row_type_supported(int32_t number) {
    if (number < 0 || number >= GGML_TYPE_COUNT) {
        return false; // not to be made a ggml_type
    }
    const ggml_type type = (ggml_type) number;
    return ggml_get_type_traits_cpu(type)->vec_dot && (type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float);
}

void sum_columns(ggml_type type, int64_t n, int ith, int nth, int64_t & first, int64_t & last) {
    const int64_t unit  = std::max<int64_t>(ggml_blck_size(type), 32);
    const int64_t units = (n + unit - 1) / unit;
    first               = std::min(n, units * ith / nth * unit);
    last                = std::min(n, units * (ith + 1) / nth * unit);
}

// ggml-base converts with the baseline's instructions; the types that a bundle usually has deserve the machine's

static void q8_0_to_float(const uint8_t * row, int64_t n, float * __restrict out) {
    for (int64_t b = 0; b < n / 32; b++) {
        const uint8_t * block = row + b * 34;
        ggml_fp16_t     d16;
        memcpy(&d16, block, sizeof(d16));
        const float    d = ggml_fp16_to_fp32(d16);
        const int8_t * q = (const int8_t *) block + 2;
        for (int i = 0; i < 32; i++) {
            out[b * 32 + i] = (float) q[i] * d;
        }
    }
}

static void q4_0_to_float(const uint8_t * row, int64_t n, float * __restrict out) {
    for (int64_t b = 0; b < n / 32; b++) {
        const uint8_t * block = row + b * 18;
        ggml_fp16_t     d16;
        memcpy(&d16, block, sizeof(d16));
        const float     d = ggml_fp16_to_fp32(d16);
        const uint8_t * q = block + 2;
        for (int i = 0; i < 16; i++) {
            out[b * 32 + i]      = (float) ((q[i] & 15) - 8) * d;
            out[b * 32 + i + 16] = (float) ((q[i] >> 4) - 8) * d;
        }
    }
}

void row_to_float(ggml_type type, const uint8_t * row, int64_t first, int64_t n, float * out) {
    const uint8_t * begin = row + ggml_row_size(type, first);
    switch (type) {
        case GGML_TYPE_F32:  memcpy(out, begin, (size_t) n * sizeof(float)); break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) begin, out, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) begin, out, n); break;
        case GGML_TYPE_Q8_0: q8_0_to_float(begin, n, out); break;
        case GGML_TYPE_Q4_0: q4_0_to_float(begin, n, out); break;
        default:             ggml_get_type_traits(type)->to_float(begin, out, n);
    }
}

// never inlined: every sum is made by the same instructions, whatever the loops around it
__attribute__((noinline)) void add_scaled(float * __restrict sum, const float * __restrict x, float weight, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        sum[i] += weight * x[i];
    }
}
