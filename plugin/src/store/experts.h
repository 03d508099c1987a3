// Experts in slots, or streaming through a ring. Which of them stay is the cache's business (memory/cache.h).
#pragma once

#include "memory/cache.h"
#include "store/records.h"

#include <cstdint>
#include <utility>
#include <vector>

class expert_store : public record_store {
  public:
    using record_store::record_store;

    void ended(uint32_t index, const reader::done & done, file_state state) override;

    // Notes that `count` of an op's n_tokens tokens, the last of which is number t.tokens, use expert e.
    void use(flash_tensor & t, uint32_t e, uint32_t n_tokens, uint32_t count);

    // Not evicted before end_op(), if it is in a slot.
    void hold(uint32_t index) {
        if (record(index).place == record_place::slot) {
            cache.hold(record(index).index);
        }
    }

    // Gives an absent expert a slot and starts its read; false: there is none to be had. evict: of another expert, if need be.
    bool fetch_to_slot(uint32_t index, bool evict);

    // The same through the ring; false: it is full.
    bool fetch_to_ring(uint32_t index);

    // releases what the op held
    void end_op() { cache.end_op(); }

    // The slot of an expert that is being read: whether nothing has been read to it before, so that its pages may not be there yet. Once.
    bool note_first_read(uint32_t index) { return std::exchange(slot_fresh[(size_t) record(index).index], 0); }

    uint32_t n_slots(uint32_t size_class) const { return cache.n_slots(size_class); }
    uint32_t n_empty(uint32_t size_class) const { return cache.n_empty(size_class); }
    uint32_t used() const { return cache.used(); }
    uint64_t bytes_used(const llama_flash_memory & memory) const; // of slots that have an expert, about

    // warm start: experts in slots with their scores, and reading one into an empty slot (false: there is none, or it is there)

    template <typename F> void each(F f) const {
        for (uint32_t i = 0; i < table.records.size(); i++) {
            if (record(i).place == record_place::slot) {
                f(i, cache.score(i));
            }
        }
    }

    bool warm(uint32_t index);

    // memory, between two ops

    // As the layout has it, from empty. What the kernel refused `bytes` for; nullptr: nothing.
    const char * make(const memory_layout & to, uint64_t & bytes);

    void drop_all();  // no read is under way
    void drop_kept(); // what is in slots and in the ring is on flash only
    void note_layout(memory_layout & l) const;
    void fit(memory_layout & to) const; // to what there are addresses for

    // One slot less, where there are more than in the layout; stuck: there are, but reads into them are under way. move: what it has
    // goes to another slot if that is worth it.
    bool give_back_one(const memory_layout & to, bool move, bool & stuck);
    bool take_one(const memory_layout & to); // one more, where there are fewer
    void give_back_pages();                  // memory beyond the last slot of each class

  private:
    void to_slot(uint32_t index, int32_t slot);

    slot_cache             cache;
    std::vector<uint8_t *> slot_data;   // by slot
    std::vector<uint8_t>   slot_fresh;  // by slot: nothing has been read to it
    std::vector<mapping>   slot_memory; // by class
};
