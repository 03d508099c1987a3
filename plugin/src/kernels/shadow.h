// The stock engine's kernels on records: which kernel it would choose for a weight, its repacking, and ops presented to it as
// shadows (copies whose weight points at records).
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>

struct ggml_compute_params;

struct stock_kernel {
    ggml_backend_buffer_t buffer = nullptr; // stands in as the shadow weight's buffer
    void *                extra  = nullptr; // traits of the repacked layout, nullptr: the file's layout
};

// The kernel that the stock loader's choice of buffer type leads to for this weight (it asks the extra buffer types in order).
// experts: it is a weight of MUL_MAT_ID.
stock_kernel stock_kernel_for(const ggml_tensor * weight, bool experts);

// Rows per unit of stock_repack: a multiple of every interleave.
constexpr int64_t STOCK_REPACK_ROWS = 32;

// Brings rows [row, row + n) of one matrix at `data` from the file's into the kernel's layout, in place. scratch: n rows.
// row is a multiple of STOCK_REPACK_ROWS, n is STOCK_REPACK_ROWS or the matrix's rest.
void stock_repack(const stock_kernel & kernel, const ggml_tensor * weight, uint8_t * data, int64_t row, int64_t n, uint8_t * scratch);

// The same for rows [0, n), of which the last group may be a short one. Nothing to do where the layouts are one.
void stock_repack_rows(const stock_kernel & kernel, const ggml_tensor * weight, uint8_t * data, int64_t n);

// ggml's work size of op on the repacked layout; false: ggml's own plan for op holds
bool stock_work_size(const stock_kernel & kernel, int n_threads, const ggml_tensor * op, size_t & size);

// MUL_MAT with rows [row, row + n) of the weight, which lie at data. Entered by all threads.
void stock_mul_mat(const stock_kernel & kernel, const ggml_compute_params * params, const ggml_tensor * op, const void * data,
                   int64_t row, int64_t n);

// GET_ROWS of a table whose n rows lie at `rows`. Entered by all threads.
void stock_get_rows(const ggml_compute_params * params, const ggml_tensor & op, const void * rows, int64_t n);

// MUL_MAT_ID with the experts that have an address in table[n_expert]. Entered by all threads.
// again: the call before was of the same kernel and input, and nothing has used the work buffer since, which has the input converted.
void stock_mul_mat_id(const stock_kernel & kernel, const ggml_compute_params * params, const ggml_tensor * op, const void * const * table,
                      bool again);

// the i0-th of the experts that token i1 of a MUL_MAT_ID passes through
inline int32_t expert_at(const ggml_tensor * ids, int64_t i0, int64_t i1) {
    return *(const int32_t *) ((const char *) ids->data + i1 * ids->nb[1] + i0 * ids->nb[0]);
}
