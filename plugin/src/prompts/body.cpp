#include "prompts/body.h"

#include <algorithm>
#include <cstring>

prompt_body::prompt_body(const llama_kv_range & range, size_t first, size_t n) : planes(range.planes), n_tokens(n) {
    for (size_t i = 0; i < n; i++) {
        const size_t cell = range.cells[first + i];
        if (!runs.empty() && runs.back().cell + runs.back().n == cell) {
            runs.back().n++;
        } else {
            runs.push_back({ i, cell, 1 });
        }
    }
    begins.push_back(0);
    for (const llama_kv_plane & plane : planes) {
        begins.push_back(begins.back() + plane.n_rows * n * plane.cell_bytes);
    }
}

template <typename F> void prompt_body::each_of_row(const llama_kv_plane & plane, size_t row, size_t offset, size_t size, F & f) const {
    uint8_t *    data = plane.data + row * plane.row_bytes;
    const size_t end  = offset + size;
    for (const run & r : runs) {
        const size_t begin = r.token * plane.cell_bytes;
        const size_t from  = std::max(offset, begin);
        const size_t to    = std::min(end, begin + r.n * plane.cell_bytes);
        if (from < to) {
            f(data + r.cell * plane.cell_bytes + (from - begin), to - from);
        }
    }
}

template <typename F> void prompt_body::each(uint64_t offset, uint64_t size, F f) const {
    const uint64_t end = offset + size;
    size_t         p   = (size_t) (std::upper_bound(begins.begin(), begins.end(), offset) - begins.begin()) - 1;
    while (offset < end) {
        const llama_kv_plane & plane     = planes[p];
        const size_t           row_bytes = n_tokens * plane.cell_bytes;
        const uint64_t         in_plane  = offset - begins[p];
        const size_t           row       = in_plane / row_bytes;
        const size_t           in_row    = in_plane % row_bytes;
        const size_t           n         = std::min<uint64_t>(end - offset, row_bytes - in_row);
        each_of_row(plane, row, in_row, n, f);
        offset += n;
        if (offset == begins[p + 1]) {
            p++;
        }
    }
}

void prompt_body::take(uint64_t offset, uint64_t size, uint8_t * to) const {
    each(offset, size, [&to](const uint8_t * at, size_t n) {
        memcpy(to, at, n);
        to += n;
    });
}

void prompt_body::put(uint64_t offset, uint64_t size, const uint8_t * from) const {
    each(offset, size, [&from](uint8_t * at, size_t n) {
        memcpy(at, from, n);
        from += n;
    });
}

void prompt_body::clear() const {
    each(0, bytes(), [](uint8_t * at, size_t n) { memset(at, 0, n); });
}
