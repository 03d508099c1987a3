// What ops and stores count and trace while it happens, for those who watch. Nothing is decided by it.
#pragma once

#include "base/trace.h"
#include "llama_flash.h"

#include <cstdint>

struct instruments {
    llama_flash_stats stats = {}; // reads are counted by read_queue
    trace_buffer      trace;
    uint32_t          first_bundle                    = 0; // number in traces of the first bundle: tensors come before
    uint64_t          reuse[LLAMA_FLASH_REUSE_TOKENS] = {};

    // `before` tokens were computed before the one that uses a record now; used: number of the last one that did + 1, 0: none
    void count_reuse(uint64_t before, uint64_t used) {
        const uint64_t distance = before + 2 - used;
        reuse[used > 0 && distance < LLAMA_FLASH_REUSE_TOKENS ? distance : 0]++;
    }
};
