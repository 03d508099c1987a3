// Single rows of every type: values as ggml converts them, dot products, weighted sums, and columns shared out once each.
#include "check.h"
#include "kernels/sparse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t N = 1280; // a multiple of every block

std::vector<float> random_floats(random_source & random, int64_t n) {
    std::vector<float> x((size_t) n);
    for (auto & v : x) {
        v = (float) random.below(2001) / 1000.0f - 1.0f;
    }
    return x;
}

// quantising to it takes seconds: any bytes will do
bool has_a_grid(ggml_type type) {
    return strncmp(ggml_type_name(type), "iq", 2) == 0;
}

std::vector<uint8_t> quantised(ggml_type type, const std::vector<float> & x) {
    std::vector<uint8_t> row(ggml_row_size(type, (int64_t) x.size()));
    std::vector<float>   importance(x.size(), 1.0f);
    if (has_a_grid(type)) {
        random_source random(row.size());
        for (auto & byte : row) {
            byte = (uint8_t) random.below(256);
        }
        return row;
    }
    ggml_quantize_chunk(type, x.data(), row.data(), 0, 1, (int64_t) x.size(), importance.data());
    return row;
}

void values_are_those_of_ggml(ggml_type type, random_source & random) {
    const std::vector<uint8_t> row = quantised(type, random_floats(random, N));
    std::vector<float>         expected(N);
    if (type == GGML_TYPE_F32) {
        memcpy(expected.data(), row.data(), row.size());
    } else {
        ggml_get_type_traits(type)->to_float(row.data(), expected.data(), N);
    }
    const int64_t block = ggml_blck_size(type);
    for (int step = 0; step < 50; step++) {
        const int64_t      first = (int64_t) random.below((uint64_t) (N / block)) * block;
        const int64_t      n     = (1 + (int64_t) random.below((uint64_t) ((N - first) / block))) * block;
        std::vector<float> actual((size_t) n + 1, -7.0f);
        row_to_float(type, row.data(), first, n, actual.data());
        CHECK(memcmp(actual.data(), expected.data() + first, (size_t) n * sizeof(float)) == 0, "%s: columns [%lld, %lld) differ", ggml_type_name(type),
              (long long) first, (long long) (first + n));
        CHECK(actual[(size_t) n] == -7.0f, "%s: written beyond the end", ggml_type_name(type));
    }
}

void dot_products_are_near_the_exact_ones(ggml_type type, random_source & random) {
    const row_kernel kernel(type, N);
    CHECK(kernel.row_bytes == ggml_row_size(type, N), "%s: a row of %zu bytes", ggml_type_name(type), kernel.row_bytes);
    const std::vector<uint8_t> row = quantised(type, random_floats(random, N));
    const std::vector<float>   x   = random_floats(random, N);
    std::vector<uint8_t>       converted(kernel.x_bytes + 1, 0x5a);
    kernel.convert(x.data(), converted.data());
    CHECK(converted.back() == 0x5a, "%s: the activation is longer than it says", ggml_type_name(type));
    std::vector<float> values(N);
    row_to_float(type, row.data(), 0, N, values.data());
    double exact = 0.0;
    double size  = 0.0;
    for (int64_t i = 0; i < N; i++) {
        exact += (double) values[(size_t) i] * x[(size_t) i];
        size += std::fabs((double) values[(size_t) i] * x[(size_t) i]);
    }
    const double actual = kernel.dot(row.data(), converted.data());
    CHECK(std::fabs(actual - exact) < 0.01 * size + 1e-6, "%s: %f, expected %f", ggml_type_name(type), actual, exact);
}

void sums_add_one_product_per_element() {
    random_source random(3);
    for (int64_t n : { 1, 7, 31, 32, 96, 256 }) {
        std::vector<float>       sum   = random_floats(random, n + 1);
        const std::vector<float> x     = random_floats(random, n);
        const std::vector<float> begin = sum;
        add_scaled(sum.data(), x.data(), 0.37f, n);
        for (int64_t i = 0; i < n; i++) { // with one rounding or with two
            const float two = begin[(size_t) i] + 0.37f * x[(size_t) i];
            CHECK(std::fabs(sum[(size_t) i] - two) <= 1e-6f, "element %lld of %lld: %g, expected %g", (long long) i, (long long) n, sum[(size_t) i], two);
        }
        CHECK(sum[(size_t) n] == begin[(size_t) n], "written beyond %lld elements", (long long) n);
    }
}

// an element's bits do not depend on how many stand beside it: the share of a thread
void sums_do_not_depend_on_where_they_are_cut() {
    random_source            random(4);
    const std::vector<float> x = random_floats(random, 256);
    const std::vector<float> y = random_floats(random, 256);
    for (int64_t cut = 32; cut < 256; cut += 32) {
        std::vector<float> whole = y;
        std::vector<float> parts = y;
        add_scaled(whole.data(), x.data(), -1.7f, 256);
        add_scaled(parts.data(), x.data(), -1.7f, cut);
        add_scaled(parts.data() + cut, x.data() + cut, -1.7f, 256 - cut);
        CHECK(memcmp(whole.data(), parts.data(), 256 * sizeof(float)) == 0, "cut at %lld", (long long) cut);
    }
}

void each_column_is_one_threads() {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K }) {
        const int64_t block = ggml_blck_size(type);
        for (int64_t n = block; n <= 40 * block && n <= 6000; n += block) {
            for (int nth : { 1, 2, 3, 8, 61 }) {
                int64_t next = 0;
                for (int ith = 0; ith < nth; ith++) {
                    int64_t first;
                    int64_t last;
                    sum_columns(type, n, ith, nth, first, last);
                    CHECK(first == next && last >= first, "%s, %lld columns: thread %d of %d has [%lld, %lld), expected from %lld", ggml_type_name(type),
                          (long long) n, ith, nth, (long long) first, (long long) last, (long long) next);
                    CHECK(first % block == 0 || first == n, "%s: %lld is within a block", ggml_type_name(type), (long long) first);
                    next = last;
                }
                CHECK(next == n, "%s: %lld of %lld columns", ggml_type_name(type), (long long) next, (long long) n);
            }
        }
    }
}

} // namespace

int main() {
    ggml_cpu_init(); // its tables
    random_source random(1);
    int           n_types = 0;
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        if (!row_type_supported(type)) {
            continue;
        }
        values_are_those_of_ggml((ggml_type) type, random);
        if (!has_a_grid((ggml_type) type)) {
            dot_products_are_near_the_exact_ones((ggml_type) type, random);
        }
        n_types++;
    }
    CHECK(n_types >= 20, "only %d types", n_types);
    CHECK(!row_type_supported(-1) && !row_type_supported(GGML_TYPE_COUNT), "types that do not exist");
    sums_add_one_product_per_element();
    sums_do_not_depend_on_where_they_are_cut();
    each_column_is_one_threads();
    printf("sparse: ok\n");
    return 0;
}
