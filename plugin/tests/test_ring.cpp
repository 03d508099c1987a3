// ring against a reference: entries alive never share a byte, leave in order, and room that must be there is given.
#include "check.h"
#include "memory/ring.h"

#include <cstring>
#include <deque>
#include <vector>

namespace {

struct live {
    int32_t  entry;
    size_t   begin;
    size_t   size;
    uint32_t record;
    bool     released;
};

// Is there contiguous room between the newest entry and the oldest one, going round?
bool has_room(const std::deque<live> & alive, size_t capacity, uint32_t max_entries, size_t bytes) {
    if (bytes > capacity || alive.size() == max_entries) {
        return false;
    }
    if (alive.empty()) {
        return true;
    }
    const size_t tail = alive.front().begin;
    const size_t head = alive.back().begin + alive.back().size;
    if (alive.back().begin >= tail) { // not gone round
        return capacity - head >= bytes || tail >= bytes;
    }
    return tail - head >= bytes;
}

// A ring, and what is known to be in it.
class observed_ring {
  public:
    explicit observed_ring(random_source & random) : capacity(1 + random.below(4096)), max_entries((uint32_t) (1 + random.below(24))), memory(capacity) {
        r.configure(memory.data(), capacity, max_entries);
        CHECK(r.empty() && r.oldest() == ring::NONE && r.touched() == 0, "a new ring");
    }

    void take(size_t bytes) {
        const uint32_t record = next_record++;
        const bool     room   = has_room(alive, capacity, max_entries, bytes);
        const int32_t  entry  = r.take(bytes, record);
        CHECK((entry != ring::NONE) == room, "%zu bytes of %zu: entry %d, room %d", bytes, capacity, entry, room);
        if (!room) {
            n_full++;
            return;
        }
        n_taken++;
        const size_t begin = (size_t) (r.address(entry) - memory.data());
        CHECK(begin + bytes <= capacity, "[%zu, %zu) of %zu", begin, begin + bytes, capacity);
        for (const live & other : alive) {
            CHECK(other.entry != entry, "entry %d given out twice", entry);
            CHECK(begin >= other.begin + other.size || other.begin >= begin + bytes, "[%zu, %zu) overlaps [%zu, %zu)", begin, begin + bytes,
                  other.begin, other.begin + other.size);
        }
        n_wrapped += !alive.empty() && begin < alive.back().begin;
        memset(r.address(entry), (int) (record % 251), bytes);
        alive.push_back({ entry, begin, bytes, record, false });
        high_water = begin + bytes > high_water ? begin + bytes : high_water;
        CHECK(r.touched() == high_water, "%zu bytes touched, expected %zu", r.touched(), high_water);
    }

    // the entry that is number i of those alive, unless it has been released already
    void release(size_t i) {
        live & chosen = alive[i];
        if (chosen.released) {
            return;
        }
        for (size_t k = 0; k < chosen.size; k++) {
            CHECK(r.address(chosen.entry)[k] == chosen.record % 251, "record %u was overwritten", chosen.record);
        }
        r.release(chosen.entry);
        chosen.released = true;
        while (!alive.empty() && alive.front().released) {
            alive.pop_front();
        }
    }

    // shorter, or longer again
    void resize(size_t bytes) {
        r.resize(bytes);
        capacity   = bytes;
        high_water = high_water < bytes ? high_water : bytes;
        CHECK(r.bytes() == bytes && r.touched() == high_water, "%zu bytes, %zu touched", r.bytes(), r.touched());
    }

    void check() const {
        CHECK(r.empty() == alive.empty(), "%zu entries alive", alive.size());
        const int32_t oldest = alive.empty() ? ring::NONE : alive.front().entry;
        CHECK(r.oldest() == oldest, "oldest is %d, expected %d", r.oldest(), oldest);
        for (const live & l : alive) {
            CHECK(r.record_in(l.entry) == l.record, "entry %d", l.entry);
        }
    }

    size_t           capacity;
    const uint32_t   max_entries;
    std::deque<live> alive;
    uint64_t         n_taken   = 0;
    uint64_t         n_full    = 0;
    uint64_t         n_wrapped = 0;

  private:
    std::vector<uint8_t> memory;
    ring                 r;
    uint32_t             next_record = 0;
    size_t               high_water  = 0;
};

void random_operations(uint64_t seed) {
    random_source random(seed);
    observed_ring r(random);
    const size_t  most    = r.capacity;
    const size_t  typical = 1 + random.below(r.capacity);
    for (int step = 0; step < 3000; step++) {
        now_trying = { seed, step };
        if (random.chance(55)) {
            r.take(random.chance(10) ? 1 + random.below(r.capacity + 2) : 1 + random.below(typical));
        } else if (!r.alive.empty()) {
            // mostly in order, as records are computed; sometimes not, as reads fail
            r.release(random.chance(70) ? 0 : random.below(r.alive.size()));
        }
        if (r.alive.empty() && random.chance(5)) {
            r.resize(1 + random.below(most));
        }
        r.check();
    }
    CHECK(r.n_taken > 100 && r.n_full > 0, "this says nothing: %llu taken, %llu refused, %llu wrapped", (unsigned long long) r.n_taken,
          (unsigned long long) r.n_full, (unsigned long long) r.n_wrapped);
}

void a_full_ring_refuses_and_goes_round() {
    uint8_t memory[100];
    ring    r;
    r.configure(memory, sizeof(memory), 8);
    CHECK(r.take(101, 0) == ring::NONE, "more than there is");
    const int32_t a = r.take(40, 1);
    const int32_t b = r.take(60, 2);
    CHECK(a != ring::NONE && b != ring::NONE && r.take(1, 3) == ring::NONE, "full to the last byte");
    r.release(b);
    CHECK(r.take(1, 3) == ring::NONE, "b's room is not free before a's");
    r.release(a);
    CHECK(r.empty(), "both released");

    const int32_t c = r.take(70, 4);
    const int32_t d = r.take(20, 5);
    r.release(c);
    CHECK(r.take(71, 6) == ring::NONE, "10 bytes at the end, 70 at the start");
    const int32_t e = r.take(70, 6);
    CHECK(r.address(e) == memory, "goes round to the start");
    CHECK(r.take(1, 7) == ring::NONE, "head has met tail: full, not empty");
    r.release(d);
    CHECK(r.oldest() == e && r.take(30, 8) != ring::NONE, "free behind e once d is released");
}

void a_ring_without_memory_refuses() {
    ring r;
    CHECK(r.take(1, 0) == ring::NONE, "not configured");
    r.configure(nullptr, 0, 16);
    CHECK(r.take(1, 0) == ring::NONE && r.empty(), "no memory");
}

} // namespace

int main() {
    a_full_ring_refuses_and_goes_round();
    a_ring_without_memory_refuses();
    for (uint64_t seed = 0; seed < 300; seed++) {
        random_operations(seed);
    }
    printf("ring: ok\n");
    return 0;
}
