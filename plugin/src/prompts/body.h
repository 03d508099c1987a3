// A block's state as it lies in a file, and where each of its bytes is in the engine's caches. The order is: layer by layer K and then V;
// of each the rows, if it lies there in rows (V, transposed); of each row the tokens.
#pragma once

#include "llama-ext.h"

#include <cstddef>
#include <cstdint>
#include <vector>

class prompt_body {
  public:
    // the tokens `first` to first + n - 1 of the range, which must outlive it
    prompt_body(const llama_kv_range & range, size_t first, size_t n);

    uint64_t bytes() const { return begins.back(); }

    // copies bytes [offset, offset + size) of the body
    void take(uint64_t offset, uint64_t size, uint8_t * to) const;
    void put(uint64_t offset, uint64_t size, const uint8_t * from) const;
    void clear() const; // all of them become 0

  private:
    struct run {
        size_t token;
        size_t cell;
        size_t n;
    };

    template <typename F> void each(uint64_t offset, uint64_t size, F f) const;
    template <typename F> void each_of_row(const llama_kv_plane & plane, size_t row, size_t offset, size_t size, F & f) const;

    const std::vector<llama_kv_plane> & planes;
    size_t                              n_tokens;
    std::vector<run>                    runs;   // of cells that lie side by side
    std::vector<uint64_t>               begins; // of each plane in the body, and of what would follow
};
