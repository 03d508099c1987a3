// Low-rank predictors against their definition: out * (in * x) + bias > 0, for any of the tokens, whatever the number of threads.
#include "check.h"
#include "kernels/predictor.h"

#include <cmath>
#include <vector>

namespace {

std::vector<float> random_floats(random_source & random, size_t n) {
    std::vector<float> x(n);
    for (auto & v : x) {
        v = (float) random.below(2001) / 1000.0f - 1.0f;
    }
    return x;
}

std::vector<uint8_t> rows_of(ggml_type type, const std::vector<float> & x, int64_t n_rows, int64_t n) {
    std::vector<uint8_t> rows(ggml_row_size(type, n) * (size_t) n_rows);
    ggml_quantize_chunk(type, x.data(), rows.data(), 0, n_rows, n, nullptr);
    return rows;
}

std::vector<uint8_t> converted(const row_kernel & kernel, const std::vector<float> & x, int64_t n_tokens) {
    std::vector<uint8_t> out((size_t) n_tokens * kernel.x_bytes);
    for (int64_t t = 0; t < n_tokens; t++) {
        kernel.convert(x.data() + t * kernel.n, out.data() + (size_t) t * kernel.x_bytes);
    }
    return out;
}

constexpr int64_t N_EMBD = 96;

// a: [rank][N_EMBD], c: [n_ff][rank], x: [tokens][N_EMBD]; tokens: for whom each neuron was chosen
void chosen_for_those_who_need_them(ggml_type type, const predictor & p, const std::vector<float> & a, const std::vector<float> & c,
                                    const std::vector<float> & x, int64_t n_tokens, const std::vector<uint32_t> & first_active,
                                    const std::vector<uint16_t> & tokens) {
    const uint32_t    n_ff = (uint32_t) tokens.size();
    const uint32_t    rank = p.rank;
    std::vector<char> chosen(n_ff);
    for (uint32_t i : first_active) {
        CHECK(i < n_ff && !chosen[i], "neuron %u of %u", i, n_ff);
        chosen[i] = 1;
    }
    for (uint32_t i = 0; i < n_ff; i++) {
        CHECK((tokens[i] != 0) == (bool) chosen[i], "neuron %u is chosen for nobody", i);
    }
    for (uint32_t i = 0; i < n_ff; i++) {
        const double doubt = type == GGML_TYPE_F32 ? 1e-3 : 3.0; // rounded weights and activations
        for (int64_t t = 0; t < n_tokens; t++) {
            double sum = p.bias[i];
            for (uint32_t r = 0; r < rank; r++) {
                double projected = 0.0;
                for (int64_t k = 0; k < N_EMBD; k++) {
                    projected += (double) a[(size_t) (r * N_EMBD + k)] * x[(size_t) (t * N_EMBD + k)];
                }
                sum += c[(size_t) i * rank + r] * projected;
            }
            const bool own = tokens[i] >> t & 1;
            CHECK(std::fabs(sum) < doubt || (sum > 0.0) == own, "neuron %u, token %d: %f, chosen %d", i, (int) t, sum, own);
        }
    }
}

void selects_by_its_definition(ggml_type type, uint32_t rank, uint32_t n_ff, int64_t n_tokens, uint64_t seed) {
    random_source            random(seed);
    const std::vector<float> a = random_floats(random, (size_t) (rank * N_EMBD));
    const std::vector<float> c = random_floats(random, (size_t) n_ff * rank);
    const std::vector<float> x = random_floats(random, (size_t) (n_tokens * N_EMBD));

    predictor p;
    p.rank     = rank;
    p.in       = row_kernel(type, N_EMBD);
    p.out      = row_kernel(type, rank);
    p.in_rows  = rows_of(type, a, rank, N_EMBD);
    p.out_rows = rows_of(type, c, n_ff, rank);
    p.bias     = random_floats(random, n_ff);

    std::vector<uint32_t> first_active;
    std::vector<uint16_t> tokens(n_ff);
    for (int nth : { 1, 2, 3, 5 }) {
        std::vector<float>         projected((size_t) n_tokens * rank, NAN);
        const std::vector<uint8_t> in = converted(p.in, x, n_tokens);
        for (int ith = 0; ith < nth; ith++) {
            p.project(in.data(), p.in.x_bytes, n_tokens, ith, nth, projected.data());
        }
        std::vector<uint32_t>      active;
        const std::vector<uint8_t> out = converted(p.out, projected, n_tokens);
        for (int ith = 0; ith < nth; ith++) {
            const uint32_t first = n_ff * (uint32_t) ith / (uint32_t) nth;
            const uint32_t last  = n_ff * ((uint32_t) ith + 1) / (uint32_t) nth;
            p.select(out.data(), p.out.x_bytes, n_tokens, first, last, active, tokens.data());
        }
        if (nth == 1) {
            first_active = active;
        }
        CHECK(active == first_active, "%d threads choose otherwise", nth);

        std::vector<uint32_t> any;
        p.select(out.data(), p.out.x_bytes, n_tokens, 0, n_ff, any, nullptr);
        CHECK(any == active, "a choice depends on whether it is asked whose it is (%d threads)", nth);
    }

    chosen_for_those_who_need_them(type, p, a, c, x, n_tokens, first_active, tokens);
    CHECK(!first_active.empty() && first_active.size() < n_ff, "%zu of %u neurons", first_active.size(), n_ff);
}

} // namespace

int main() {
    ggml_cpu_init();
    uint64_t seed = 0;
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (uint32_t n_ff : { 64u, 100u, 333u }) {
            for (int64_t n_tokens : { 1, 4 }) {
                selects_by_its_definition(type, 32, n_ff, n_tokens, seed++);
            }
        }
    }
    printf("predictor: ok\n");
    return 0;
}
