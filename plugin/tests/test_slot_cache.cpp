// slot_cache against a reference that keeps each class as a plain list: random takes, touches, reads and drops.
#include "cache.h"
#include "check.h"

#include <algorithm>
#include <list>
#include <set>
#include <vector>

namespace {

struct held {
    int32_t  slot;
    uint32_t record;
    uint64_t stamp;
    bool     reading;
};

struct reference_class {
    std::set<int32_t> empty;
    std::list<held>   order; // least recently used first
};

struct reference {
    std::vector<reference_class> classes;

    explicit reference(const std::vector<uint32_t> & slots_per_class) {
        int32_t next = 0;
        for (uint32_t n : slots_per_class) {
            classes.emplace_back();
            for (uint32_t i = 0; i < n; i++) {
                classes.back().empty.insert(next++);
            }
        }
    }

    uint32_t used() const {
        size_t n = 0;
        for (const auto & c : classes) {
            n += c.order.size();
        }
        return (uint32_t) n;
    }

    // a held slot of any class, or nullptr
    held * any(random_source & random, reference_class *& owner) {
        uint64_t n = used();
        if (n == 0) {
            return nullptr;
        }
        n = random.below(n);
        for (auto & c : classes) {
            if (n < c.order.size()) {
                owner = &c;
                return &*std::next(c.order.begin(), (ptrdiff_t) n);
            }
            n -= c.order.size();
        }
        return nullptr;
    }
};

void compare(const slot_cache & cache, const reference & expected, uint64_t seed, int step) {
    CHECK(cache.used() == expected.used(), "seed %llu step %d: %u slots used, expected %u", (unsigned long long) seed, step,
          cache.used(), expected.used());
    for (const auto & c : expected.classes) {
        for (const held & h : c.order) {
            CHECK(cache.record_in(h.slot) == h.record, "seed %llu step %d: slot %d holds %u, expected %u", (unsigned long long) seed,
                  step, h.slot, cache.record_in(h.slot), h.record);
        }
    }
}

void take(slot_cache & cache, reference & expected, uint32_t size_class, uint32_t record, uint64_t stamp, bool evict, uint64_t seed, int step) {
    reference_class & c = expected.classes[size_class];
    int32_t           evicted;
    const int32_t     slot = cache.take(size_class, record, stamp, evict, &evicted);

    if (!c.empty.empty()) {
        CHECK(c.empty.count(slot) == 1, "seed %llu step %d: class %u has empty slots, but %d is none of them", (unsigned long long) seed, step,
              size_class, slot);
        CHECK(evicted == slot_cache::NONE, "seed %llu step %d: record %d lost its slot for nothing", (unsigned long long) seed, step, evicted);
        c.empty.erase(slot);
    } else if (!evict || c.order.empty() || c.order.front().reading || c.order.front().stamp == stamp) {
        CHECK(slot == slot_cache::NONE, "seed %llu step %d: slot %d was not to be had", (unsigned long long) seed, step, slot);
        CHECK(evicted == slot_cache::NONE, "seed %llu step %d: record %d lost its slot to nobody", (unsigned long long) seed, step, evicted);
        return;
    } else {
        const held & oldest = c.order.front();
        CHECK(slot == oldest.slot, "seed %llu step %d: slot %d, but %d is the least recently used", (unsigned long long) seed, step, slot,
              oldest.slot);
        CHECK(evicted == (int32_t) oldest.record, "seed %llu step %d: evicted %d, expected %u", (unsigned long long) seed, step, evicted,
              oldest.record);
        c.order.pop_front();
    }
    c.order.push_back({ slot, record, stamp, false });
}

void random_operations(uint64_t seed) {
    random_source         random(seed);
    std::vector<uint32_t> slots_per_class(1 + random.below(4));
    for (auto & n : slots_per_class) {
        n = (uint32_t) random.below(9); // a class may have none
    }
    slot_cache cache;
    cache.configure({ 3 }); // configured anew: nothing of it may stay
    int32_t evicted;
    cache.take(0, 99, 1, false, &evicted);
    cache.configure(slots_per_class);
    reference expected(slots_per_class);
    for (uint32_t c = 0; c < slots_per_class.size(); c++) {
        CHECK(cache.n_slots(c) == slots_per_class[c], "class %u has %u slots, expected %u", c, cache.n_slots(c), slots_per_class[c]);
    }

    uint64_t stamp       = 1;
    uint32_t next_record = 0;
    for (int step = 0; step < 2000; step++) {
        reference_class * owner = nullptr;
        held *            h     = nullptr;
        switch (random.below(8)) {
            case 0: // the next op
                stamp++;
                break;
            case 1:
            case 2:
                if ((h = expected.any(random, owner))) {
                    cache.touch(h->slot, stamp);
                    held moved  = *h;
                    moved.stamp = stamp;
                    owner->order.remove_if([&](const held & other) { return other.slot == moved.slot; });
                    owner->order.push_back(moved);
                }
                break;
            case 3:
                if ((h = expected.any(random, owner))) {
                    h->reading = random.chance(40);
                    cache.set_reading(h->slot, h->reading);
                }
                break;
            case 4:
                if (random.chance(50) && (h = expected.any(random, owner))) {
                    const int32_t slot = h->slot;
                    cache.drop(slot);
                    owner->order.remove_if([&](const held & other) { return other.slot == slot; });
                    owner->empty.insert(slot);
                }
                break;
            default:
                take(cache, expected, (uint32_t) random.below(slots_per_class.size()), next_record++, stamp, random.chance(80), seed, step);
        }
        compare(cache, expected, seed, step);
    }
}

void an_op_cannot_evict_what_it_uses() {
    slot_cache cache;
    cache.configure({ 2, 1 });
    int32_t       evicted;
    const int32_t a = cache.take(0, 10, 1, true, &evicted);
    const int32_t b = cache.take(0, 11, 1, true, &evicted);
    CHECK(a != b && a != slot_cache::NONE && b != slot_cache::NONE, "slots %d and %d", a, b);
    CHECK(cache.take(0, 12, 1, true, &evicted) == slot_cache::NONE, "both slots are in use by op 1");

    // op 2 uses a: b goes, then nothing is left
    cache.touch(a, 2);
    CHECK(cache.take(0, 12, 2, true, &evicted) == b && evicted == 11, "evicted %d, expected 11", evicted);
    CHECK(cache.take(0, 13, 2, true, &evicted) == slot_cache::NONE, "both slots are in use by op 2");
    CHECK(cache.take(1, 14, 2, true, &evicted) != slot_cache::NONE && evicted == slot_cache::NONE, "another class has room of its own");
}

void a_read_under_way_keeps_its_slot() {
    slot_cache cache;
    cache.configure({ 1 });
    int32_t       evicted;
    const int32_t slot = cache.take(0, 10, 1, true, &evicted);
    cache.set_reading(slot, true);
    CHECK(cache.take(0, 11, 2, true, &evicted) == slot_cache::NONE, "the device still writes to slot %d", slot);
    cache.set_reading(slot, false);
    CHECK(cache.take(0, 11, 2, true, &evicted) == slot && evicted == 10, "evicted %d, expected 10", evicted);
}

} // namespace

int main() {
    an_op_cannot_evict_what_it_uses();
    a_read_under_way_keeps_its_slot();
    for (uint64_t seed = 0; seed < 200; seed++) {
        random_operations(seed);
    }
    printf("slot_cache: ok\n");
    return 0;
}
