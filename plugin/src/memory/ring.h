// A FIFO arena in DRAM: room is taken at the head and released at the tail. For records that stream through.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

class ring {
  public:
    static constexpr int32_t NONE = -1;

    // memory of `bytes` bytes, at most max_entries taken at once; memory is not owned
    void configure(uint8_t * memory, size_t bytes, uint32_t max_entries);

    // Its bytes from now on, no more than its memory has; it is empty. What is beyond them counts as untouched.
    void resize(size_t bytes);

    // Room for `bytes` contiguous bytes: an entry, or NONE if the ring is full.
    int32_t take(size_t bytes, uint32_t record);

    // The entry's room is free once all older entries have been released, too.
    void release(int32_t entry);

    uint8_t * address(int32_t entry) const { return memory + entries[(size_t) entry].begin; }

    uint32_t record_in(int32_t entry) const { return entries[(size_t) entry].record; }

    size_t bytes() const { return size; }

    bool empty() const { return n_entries == 0; }

    // oldest entry not yet released, NONE if empty
    int32_t oldest() const { return n_entries ? (int32_t) first : NONE; }

    // bytes from the start that have ever been taken
    size_t touched() const { return high_water; }

  private:
    struct entry {
        size_t   begin;
        size_t   end;
        uint32_t record;
        bool     released;
    };

    uint8_t *          memory     = nullptr;
    size_t             size       = 0;
    size_t             head       = 0; // next byte to take
    size_t             high_water = 0;
    std::vector<entry> entries; // circular
    uint32_t           first     = 0;
    uint32_t           n_entries = 0;
};
