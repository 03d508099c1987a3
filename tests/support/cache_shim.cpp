// C interface to slot_cache and ring, for test_cache_properties.py.
#include "memory/cache.h"
#include "memory/ring.h"

#include <vector>

// addresses only: a ring never touches its memory
static uint8_t ring_memory[1 << 16];

extern "C" {

slot_cache * cache_new(const uint32_t * slots_per_class, uint32_t n_classes, size_t n_records) {
    auto * cache = new slot_cache();
    cache->configure(std::vector<uint32_t>(slots_per_class, slots_per_class + n_classes), n_records);
    return cache;
}

void cache_free(slot_cache * cache) {
    delete cache;
}

void cache_use(slot_cache * cache, uint32_t record, uint64_t now, uint32_t n_tokens, uint32_t count) {
    cache->use(record, now, n_tokens, count);
}

int32_t cache_take(slot_cache * cache, uint32_t size_class, uint32_t record, bool evict, int32_t * evicted) {
    return cache->take(size_class, record, evict, evicted);
}

void cache_hold(slot_cache * cache, int32_t slot) {
    cache->hold(slot);
}

void cache_end_op(slot_cache * cache) {
    cache->end_op();
}

double cache_score(const slot_cache * cache, uint32_t record) {
    return cache->score(record);
}

void cache_set_reading(slot_cache * cache, int32_t slot, bool reading) {
    cache->set_reading(slot, reading);
}

void cache_drop(slot_cache * cache, int32_t slot) {
    cache->drop(slot);
}

int32_t cache_add(slot_cache * cache, uint32_t size_class) {
    return cache->add(size_class);
}

bool cache_retire(slot_cache * cache, uint32_t size_class, bool move, int32_t * slot, int32_t * moved, int32_t * evicted) {
    const slot_cache::retired r = cache->retire(size_class, move);
    *slot                       = r.slot;
    *moved                      = r.moved;
    *evicted                    = r.evicted;
    return r.done;
}

uint32_t cache_record_in(const slot_cache * cache, int32_t slot) {
    return cache->record_in(slot);
}

uint32_t cache_used(const slot_cache * cache) {
    return cache->used();
}

ring * ring_new(size_t bytes, uint32_t max_entries) {
    auto * r = new ring();
    r->configure(ring_memory, bytes <= sizeof(ring_memory) ? bytes : 0, max_entries);
    return r;
}

void ring_free(ring * r) {
    delete r;
}

int32_t ring_take(ring * r, size_t bytes, uint32_t record) {
    return r->take(bytes, record);
}

void ring_give(ring * r, int32_t entry) {
    r->release(entry);
}

// bytes from the start of its memory
size_t ring_address(const ring * r, int32_t entry) {
    return (size_t) (r->address(entry) - ring_memory);
}

uint32_t ring_record_in(const ring * r, int32_t entry) {
    return r->record_in(entry);
}

int32_t ring_oldest(const ring * r) {
    return r->oldest();
}
}
