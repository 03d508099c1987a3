// slot_cache against a reference that keeps plain lists: random uses, takes, holds, reads and drops.
#include "check.h"
#include "memory/cache.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <vector>

namespace {

// as in cache.h
constexpr int64_t BUCKETS     = 256;
constexpr double  PER_OCTAVE  = 4.0;
constexpr double  SCALE_BEGIN = 16.0;

struct reference_class {
    std::set<int32_t>                       empty;
    std::map<int64_t, std::vector<int32_t>> buckets; // slots that may go, oldest first
    int64_t                                 lowest = 0;

    void insert(int32_t slot, double score) {
        const double  x      = (score + SCALE_BEGIN) * PER_OCTAVE;
        const int64_t bucket = x > (double) lowest ? (int64_t) x : lowest;
        if (bucket >= lowest + BUCKETS) {
            lowest = bucket - BUCKETS + 1;
            std::vector<int32_t> fallen;
            while (!buckets.empty() && buckets.begin()->first <= lowest) {
                const auto & slots = buckets.begin()->second;
                fallen.insert(fallen.end(), slots.begin(), slots.end());
                buckets.erase(buckets.begin());
            }
            if (!fallen.empty()) {
                buckets[lowest] = fallen;
            }
        }
        buckets[bucket].push_back(slot);
    }

    void remove(int32_t slot) {
        for (auto it = buckets.begin(); it != buckets.end(); ++it) {
            auto found = std::find(it->second.begin(), it->second.end(), slot);
            if (found != it->second.end()) {
                it->second.erase(found);
                if (it->second.empty()) {
                    buckets.erase(it);
                }
                return;
            }
        }
        CHECK(false, "slot %d is in no bucket of the reference", slot);
    }
};

struct held_slot {
    uint32_t record;
    uint32_t size_class;
    bool     held;
    bool     reading;
    bool     carried; // held since an earlier op
};

struct reference {
    std::vector<reference_class> classes;
    std::map<int32_t, held_slot> used;
    std::vector<int32_t>         holding;
    std::vector<long double>     uses; // by record: each use times 2^(token / half life)
};

void check_all(const slot_cache & cache, const reference & expected) {
    CHECK(cache.used() == expected.used.size(), "%u slots used, expected %zu", cache.used(), expected.used.size());
    for (const auto & entry : expected.used) {
        CHECK(cache.record_in(entry.first) == entry.second.record, "slot %d holds %u, expected %u",
              entry.first, cache.record_in(entry.first), entry.second.record);
    }
    for (uint32_t c = 0; c < expected.classes.size(); c++) {
        CHECK(cache.n_empty(c) == expected.classes[c].empty.size(), "class %u has %u empty slots, expected %zu", c,
              cache.n_empty(c), expected.classes[c].empty.size());
    }
}

void take(slot_cache & cache, reference & expected, uint32_t size_class, uint32_t record, bool evict) {
    reference_class & c = expected.classes[size_class];
    int32_t           evicted;
    const int32_t     slot = cache.take(size_class, record, evict, &evicted);
    if (!c.empty.empty()) {
        CHECK(c.empty.erase(slot) == 1, "class %u has empty slots, but %d is none of them", size_class, slot);
        CHECK(evicted == slot_cache::NONE, "record %d lost its slot for nothing", evicted);
    } else if (!evict || c.buckets.empty()) {
        CHECK(slot == slot_cache::NONE, "slot %d was not to be had", slot);
        CHECK(evicted == slot_cache::NONE, "record %d lost its slot to nobody", evicted);
        return;
    } else {
        const int32_t victim = c.buckets.begin()->second.front();
        CHECK(slot == victim, "slot %d was taken, expected %d", slot, victim);
        CHECK(evicted == (int32_t) expected.used[victim].record, "evicted %d, expected %u", evicted,
              expected.used[victim].record);
        c.remove(victim);
    }
    expected.used[slot] = { record, size_class, true, false, false };
    expected.holding.push_back(slot);
}

void end_op(slot_cache & cache, reference & expected) {
    cache.end_op();
    std::vector<int32_t> still;
    for (int32_t slot : expected.holding) {
        held_slot & h = expected.used[slot];
        if (h.reading) {
            h.carried = true;
            still.push_back(slot);
        } else {
            h.held    = false;
            h.carried = false;
            expected.classes[h.size_class].insert(slot, cache.score(h.record));
        }
    }
    expected.holding = still;
}

constexpr uint32_t N_RECORDS = 60;

reference configured(slot_cache & cache, const std::vector<uint32_t> & slots_per_class) {
    cache.configure({ 3 }, 100); // configured anew: nothing of it may stay
    int32_t evicted;
    cache.take(0, 99, false, &evicted);
    cache.configure(slots_per_class, N_RECORDS);

    reference expected;
    expected.uses.assign(N_RECORDS, 0.0L);
    int32_t first = 0;
    for (uint32_t c = 0; c < slots_per_class.size(); c++) {
        CHECK(cache.n_slots(c) == slots_per_class[c], "class %u has %u slots, expected %u", c, cache.n_slots(c), slots_per_class[c]);
        expected.classes.emplace_back();
        for (uint32_t i = 0; i < slots_per_class[c]; i++) {
            expected.classes.back().empty.insert(first++);
        }
    }
    return expected;
}

void use(slot_cache & cache, reference & expected, uint32_t record, uint64_t now, uint32_t n_tokens, uint32_t count) {
    cache.use(record, now, n_tokens, count);
    for (uint32_t k = 0; k < n_tokens; k++) {
        expected.uses[record] += (long double) count / n_tokens * exp2l((long double) ((double) now - k) / slot_cache::EXPERTS_HALF_LIFE);
    }
    const double score = (double) log2l(expected.uses[record]);
    CHECK(std::fabs(cache.score(record) - score) < 1e-6 * (1 + std::fabs(score)), "score %f, expected %f", cache.score(record), score);
}

void hold(slot_cache & cache, reference & expected, int32_t slot) {
    cache.hold(slot);
    held_slot & h = expected.used[slot];
    if (!h.held) {
        expected.classes[h.size_class].remove(slot);
        h.held = true;
        expected.holding.push_back(slot);
    } else if (h.carried) { // as if its read had come before
        h.carried = false;
        expected.holding.erase(std::find(expected.holding.begin(), expected.holding.end(), slot));
        expected.holding.push_back(slot);
    }
}

void drop(slot_cache & cache, reference & expected, int32_t slot) {
    cache.drop(slot);
    const held_slot & h = expected.used[slot];
    reference_class & c = expected.classes[h.size_class];
    if (h.held) {
        expected.holding.erase(std::find(expected.holding.begin(), expected.holding.end(), slot));
    } else {
        c.remove(slot);
    }
    c.empty.insert(slot);
    expected.used.erase(slot);
}

void random_operations(unsigned long long seed) {
    random_source         random(seed);
    std::vector<uint32_t> slots_per_class(1 + random.below(3));
    for (auto & n : slots_per_class) {
        n = (uint32_t) random.below(9); // a class may have none
    }
    slot_cache cache;
    reference  expected = configured(cache, slots_per_class);

    // leaps in time make the buckets go round
    const uint64_t leap = random.chance(50) ? 3 : 400;
    uint64_t       now  = 0;
    for (int step = 0; step < 1500; step++) {
        now_trying = { seed, step };
        if (expected.used.empty() || random.chance(40)) {
            const uint32_t record   = (uint32_t) random.below(N_RECORDS);
            const uint32_t n_tokens = (uint32_t) (random.chance(70) ? 1 : 1 + random.below(40));
            const uint32_t count    = (uint32_t) (1 + random.below(n_tokens));
            now += n_tokens + random.below(leap);
            use(cache, expected, record, now, n_tokens, count);

            int32_t there = slot_cache::NONE;
            for (const auto & entry : expected.used) {
                there = entry.second.record == record ? entry.first : there;
            }
            if (there == slot_cache::NONE) {
                take(cache, expected, (uint32_t) (record % slots_per_class.size()), record, random.chance(80));
            } else {
                hold(cache, expected, there);
            }
        } else if (random.chance(30)) {
            end_op(cache, expected);
        } else {
            auto it = std::next(expected.used.begin(), (ptrdiff_t) random.below(expected.used.size()));
            if (random.chance(85)) { // only what is held can be read into
                it->second.reading = it->second.held && random.chance(40);
                cache.set_reading(it->first, it->second.reading);
            } else {
                drop(cache, expected, it->first);
            }
        }
        check_all(cache, expected);
    }
}

void an_op_cannot_evict_what_it_uses() {
    slot_cache cache;
    cache.configure({ 2, 1 }, 20);
    int32_t       evicted;
    const int32_t a = cache.take(0, 10, true, &evicted);
    const int32_t b = cache.take(0, 11, true, &evicted);
    CHECK(a != b && a != slot_cache::NONE && b != slot_cache::NONE, "slots %d and %d", a, b);
    CHECK(cache.take(0, 12, true, &evicted) == slot_cache::NONE, "the op uses both slots");
    cache.end_op();
    cache.hold(a);
    CHECK(cache.take(0, 12, true, &evicted) == b && evicted == 11, "evicted %d, expected 11", evicted);
    CHECK(cache.take(0, 13, true, &evicted) == slot_cache::NONE, "the next op uses both slots");
    CHECK(cache.take(1, 14, true, &evicted) != slot_cache::NONE && evicted == slot_cache::NONE, "another class has room of its own");
}

void a_read_under_way_keeps_its_slot() {
    slot_cache cache;
    cache.configure({ 1 }, 20);
    int32_t       evicted;
    const int32_t slot = cache.take(0, 10, true, &evicted);
    cache.set_reading(slot, true);
    cache.end_op();
    CHECK(cache.take(0, 11, true, &evicted) == slot_cache::NONE, "the device still writes to slot %d", slot);
    cache.set_reading(slot, false);
    cache.end_op();
    CHECK(cache.take(0, 11, true, &evicted) == slot && evicted == 10, "evicted %d, expected 10", evicted);
}

void the_seldom_used_one_goes_and_old_uses_fade() {
    slot_cache cache;
    cache.configure({ 2 }, 20);
    int32_t evicted;
    for (uint64_t now = 1; now <= 10; now++) { // record 0: ten uses, then none
        cache.use(0, now, 1, 1);
    }
    cache.take(0, 0, true, &evicted);
    cache.use(1, 12, 1, 1);
    cache.take(0, 1, true, &evicted);
    cache.end_op();
    cache.use(2, 13, 1, 1);
    const int32_t slot = cache.take(0, 2, true, &evicted);
    CHECK(evicted == 1, "evicted %d: the last used one, but used once", evicted);
    cache.end_op();
    for (uint64_t now = 414; now < 417; now++) {
        cache.use(2, now, 1, 1);
        cache.hold(slot);
        cache.end_op();
    }
    cache.use(3, 420, 1, 1);
    cache.take(0, 3, true, &evicted);
    CHECK(evicted == 0, "evicted %d: ten uses of long ago count for little", evicted);
}

void what_is_half_empty_shrinks_for_nothing() {
    slot_cache cache;
    cache.configure({ 8 }, 20);
    cache.add(0);
    for (uint32_t record = 0; record < 4; record++) {
        int32_t evicted;
        cache.use(record, 1, 1, 1);
        CHECK(cache.take(0, record, true, &evicted) == (int32_t) record, "empty slots are taken by address");
    }
    cache.end_op();
    for (int32_t slot = 8; slot >= 4; slot--) {
        const slot_cache::retired r = cache.retire(0);
        CHECK(r.done && r.slot == slot && r.moved == slot_cache::NONE && r.evicted == slot_cache::NONE, "slot %d was in use", r.slot);
    }
}

} // namespace

int main() {
    what_is_half_empty_shrinks_for_nothing();
    an_op_cannot_evict_what_it_uses();
    a_read_under_way_keeps_its_slot();
    the_seldom_used_one_goes_and_old_uses_fade();
    for (uint64_t seed = 0; seed < 100; seed++) {
        random_operations(seed);
    }
    printf("slot_cache: ok\n");
    return 0;
}
