#include "memory/ring.h"

void ring::configure(uint8_t * memory_, size_t bytes, uint32_t max_entries) {
    memory     = memory_;
    size       = bytes;
    head       = 0;
    high_water = 0;
    first      = 0;
    n_entries  = 0;
    entries.assign(max_entries, entry{ 0, 0, 0, false });
}

void ring::resize(size_t bytes) {
    size       = bytes;
    head       = 0;
    high_water = high_water < bytes ? high_water : bytes;
}

int32_t ring::take(size_t bytes, uint32_t record) {
    if (bytes > size || n_entries == entries.size()) {
        return NONE;
    }
    size_t begin = head;
    if (n_entries == 0) {
        begin = 0;
    } else {
        const size_t tail = entries[first].begin;
        if (head > tail) { // free: [head, size) and [0, tail)
            if (size - head < bytes) {
                if (tail < bytes) {
                    return NONE;
                }
                begin = 0;
            }
        } else if (tail - head < bytes) { // free: [head, tail); head == tail: full
            return NONE;
        }
    }
    const uint32_t i = (uint32_t) ((first + n_entries) % entries.size());
    entries[i]       = { begin, begin + bytes, record, false };
    head             = begin + bytes;
    high_water       = head > high_water ? head : high_water;
    n_entries++;
    return (int32_t) i;
}

void ring::release(int32_t i) {
    entries[(size_t) i].released = true;
    while (n_entries && entries[first].released) {
        first = (uint32_t) ((first + 1) % entries.size());
        n_entries--;
    }
}
