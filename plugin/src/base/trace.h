// What ops ask of the cache, in the order in which they ask: a bounded buffer that is drained between decodes. Under the session's lock.
#pragma once

#include "llama_flash.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

class trace_buffer {
  public:
    bool on() const { return capacity > 0; }

    // capacity: 0 ends the trace. Entries that were not drained are dropped.
    void start(size_t most) {
        capacity = 0; // if there is no memory for the new one, there is none
        entries.clear();
        entries.shrink_to_fit();
        entries.reserve(most);
        capacity = most;
        n_lost   = 0;
    }

    void note(const llama_flash_trace_entry & e) {
        if (entries.size() < capacity) {
            entries.push_back(e);
        } else {
            n_lost++;
        }
    }

    // Moves the oldest to `out`; lost: entries that found no room since the last call.
    size_t drain(llama_flash_trace_entry * out, size_t most, uint64_t & lost) {
        const size_t n = std::min(most, entries.size());
        std::copy_n(entries.begin(), n, out);
        entries.erase(entries.begin(), entries.begin() + (ptrdiff_t) n);
        lost   = n_lost;
        n_lost = 0;
        return n;
    }

  private:
    std::vector<llama_flash_trace_entry> entries;
    size_t                               capacity = 0; // 0: off
    uint64_t                             n_lost   = 0;
};
