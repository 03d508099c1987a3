// Which record is in which slot: least recently used, O(1). Knows neither ggml nor files nor memory.
//
// Records of one size class share the class's slots. A slot is locked while the op that touched it last is running
// (its stamp is the current one) or while a read into it is under way; locked slots are not given away.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

class slot_cache {
  public:
    static constexpr int32_t NONE = -1;

    // slots_per_class: slot numbers run through the classes in order
    void configure(const std::vector<uint32_t> & slots_per_class);

    // A slot of `size_class` for `record`: an empty one, or, if `evict`, the least recently used one that is not locked.
    // NONE if there is no such slot. *evicted: the record that lost its slot, NONE if the slot was empty.
    int32_t take(uint32_t size_class, uint32_t record, uint64_t stamp, bool evict, int32_t * evicted);

    // now the most recently used, and locked for the op with this stamp
    void touch(int32_t slot, uint64_t stamp);

    void set_reading(int32_t slot, bool reading) { slots[(size_t) slot].reading = reading; }

    // the slot is empty again
    void drop(int32_t slot);

    uint32_t record_in(int32_t slot) const { return slots[(size_t) slot].record; }

    uint32_t n_slots(uint32_t size_class) const { return classes[size_class].count; }

    uint32_t used() const { return n_used; }

  private:
    struct slot {
        uint32_t record;
        uint32_t size_class;
        int32_t  newer; // towards the most recently used; in the empty list: the next empty slot
        int32_t  older;
        uint64_t stamp;
        bool     reading;
    };

    struct list {
        int32_t  newest;
        int32_t  oldest;
        int32_t  empty; // head of the empty list
        uint32_t count;
    };

    void link_newest(int32_t slot);
    void unlink(int32_t slot);

    std::vector<slot> slots;
    std::vector<list> classes;
    uint32_t          n_used = 0;
};
