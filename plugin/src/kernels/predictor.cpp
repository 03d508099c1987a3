#include "kernels/predictor.h"

void predictor::project(const uint8_t * x, size_t x_bytes, int64_t n_tokens, int ith, int nth, float * projected) const {
    for (uint32_t r = (uint32_t) ith; r < rank; r += (uint32_t) nth) {
        const uint8_t * row = in_rows.data() + r * in.row_bytes;
        for (int64_t t = 0; t < n_tokens; t++) {
            projected[t * rank + r] = in.dot(row, x + (size_t) t * x_bytes);
        }
    }
}

void predictor::select(const uint8_t * projected, size_t projected_bytes, int64_t n_tokens, uint32_t first, uint32_t last,
                       std::vector<uint32_t> & active, uint16_t * tokens) const {
    for (uint32_t i = first; i < last; i++) {
        const uint8_t * row  = out_rows.data() + i * out.row_bytes;
        uint32_t        need = 0;
        for (int64_t t = 0; t < n_tokens && (tokens || need == 0); t++) {
            if (out.dot(row, projected + (size_t) t * projected_bytes) + bias[i] > 0.0f) {
                need |= 1u << t % 16;
            }
        }
        if (need) {
            active.push_back(i);
        }
        if (tokens) {
            tokens[i] = (uint16_t) need;
        }
    }
}
