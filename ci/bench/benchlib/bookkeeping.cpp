// What decoding does beside reading and computing, for bookkeeping.py to count: which records are in which slots.
//
//   bookkeeping LAYERS EXPERTS USED TENSORS SHARE TOKENS
//
// Each token uses USED of a layer's EXPERTS in each of its TENSORS, the popular ones more often; slots hold a SHARE (percent) of all.
#include "memory/cache.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

uint64_t state = 88172645463325252ull;

uint32_t random_below(uint32_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t) ((state >> 11) % n);
}

struct work {
    slot_cache            cache;
    std::vector<int32_t>  slot_of; // by record
    std::vector<uint32_t> ids;     // layers x used, of a token
    uint32_t              layers, experts, used, tensors;
    uint64_t              misses = 0;
};

void choose(work & w) {
    w.ids.clear();
    for (uint32_t layer = 0; layer < w.layers; layer++) {
        const size_t begin = w.ids.size();
        while (w.ids.size() < begin + w.used) {
            // the least of two: the lower half is used three times as often
            const uint32_t a = random_below(w.experts), b = random_below(w.experts), e = a < b ? a : b;
            bool           known = false;
            for (size_t i = begin; i < w.ids.size(); i++) {
                known = known || w.ids[i] == e;
            }
            if (!known) {
                w.ids.push_back(e);
            }
        }
    }
}

} // namespace

// what is counted; its name is what callgrind looks for
extern "C" __attribute__((noinline)) void decode_token(work & w, uint64_t now) {
    for (uint32_t layer = 0; layer < w.layers; layer++) {
        for (uint32_t tensor = 0; tensor < w.tensors; tensor++) {
            const uint32_t   first = (layer * w.tensors + tensor) * w.experts;
            const uint32_t * ids   = w.ids.data() + (size_t) layer * w.used;
            for (uint32_t i = 0; i < w.used; i++) {
                w.cache.use(first + ids[i], now, 1, 1);
            }
            for (uint32_t i = 0; i < w.used; i++) {
                if (w.slot_of[first + ids[i]] != slot_cache::NONE) {
                    w.cache.hold(w.slot_of[first + ids[i]]);
                }
            }
            for (uint32_t i = 0; i < w.used; i++) {
                const uint32_t record = first + ids[i];
                if (w.slot_of[record] != slot_cache::NONE) {
                    continue;
                }
                int32_t       evicted;
                const int32_t slot = w.cache.take(0, record, true, &evicted);
                w.misses++;
                if (evicted != slot_cache::NONE) {
                    w.slot_of[(size_t) evicted] = slot_cache::NONE;
                }
                w.slot_of[record] = slot;
            }
            w.cache.end_op();
        }
    }
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: bookkeeping LAYERS EXPERTS USED TENSORS SHARE TOKENS\n");
        return 2;
    }
    work w;
    w.layers               = (uint32_t) atoi(argv[1]);
    w.experts              = (uint32_t) atoi(argv[2]);
    w.used                 = (uint32_t) atoi(argv[3]);
    w.tensors              = (uint32_t) atoi(argv[4]);
    const uint32_t records = w.layers * w.tensors * w.experts;
    w.cache.configure({ (uint32_t) ((uint64_t) records * (uint64_t) atoi(argv[5]) / 100) }, records);
    w.slot_of.assign(records, slot_cache::NONE);
    const int tokens = atoi(argv[6]);
    for (int i = 0; i < tokens; i++) {
        choose(w);
        decode_token(w, (uint64_t) i + 1);
    }
    printf("%llu\n", (unsigned long long) w.misses);
    return 0;
}
