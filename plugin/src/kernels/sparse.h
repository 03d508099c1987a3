// Arithmetic on single rows of any ggml type: dot products with an activation, and weighted sums of rows.
#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// Dot products of rows of one type and length. The activation is first converted to the type's dot type.
struct row_kernel {
    ggml_type         type       = GGML_TYPE_F32;
    int64_t           n          = 0; // elements of a row
    size_t            row_bytes  = 0;
    size_t            x_bytes    = 0; // of a converted activation
    ggml_vec_dot_t    vec_dot    = nullptr;
    ggml_from_float_t from_float = nullptr; // nullptr: the dot type is float

    row_kernel() = default;
    row_kernel(ggml_type type, int64_t n);

    // x_bytes bytes; x: n floats
    void convert(const float * x, uint8_t * out) const;

    // in the order in which the stock engine's product of many columns sums, where it has one for single rows
    float dot(const uint8_t * row, const uint8_t * x) const;
};

// Whether rows of this type, a ggml_type or any other number, can be computed on.
bool row_type_supported(int32_t type);

// Columns that a weighted sum deals in at once: a multiple of every type's block.
constexpr int64_t SUM_COLUMNS = 256;

// Columns [first, last) that thread ith of nth sums; boundaries are multiples of `type`'s block.
void sum_columns(ggml_type type, int64_t n, int ith, int nth, int64_t & first, int64_t & last);

// Converts elements [first, first + n) of a row to float; first is a multiple of the type's block, n too or the row's rest.
void row_to_float(ggml_type type, const uint8_t * row, int64_t first, int64_t n, float * out);

// sum[0, n) += weight * x[0, n)
void add_scaled(float * sum, const float * x, float weight, int64_t n);
