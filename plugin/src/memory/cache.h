// Which record is in which slot, and which one has to go: least frequently used with ageing, O(1). Knows neither ggml nor files
// nor memory.
//
// A record's score is the number of its uses, each halved for every half-life (in tokens) since. Scores are kept for all records, in
// slots or not. On the logarithmic scale on which all scores fall at the same rate, ageing is a moving origin: slots lie in
// circular buckets by their score's logarithm, and the slot to evict from is the oldest in the lowest bucket that is not empty.
//
// Records of one size class share the class's slots. A slot that the op in progress uses, or that is being read into, is held:
// in no bucket, so that its record cannot be evicted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

class slot_cache {
  public:
    static constexpr int32_t NONE = -1;
    // tokens; chosen on recorded traces, see docs/measurements/2026-11-21-eviction.md
    static constexpr double  EXPERTS_HALF_LIFE = 34.0;
    static constexpr double  NEURONS_HALF_LIFE = 4.0;

    // slots_per_class: slot numbers run through the classes in order; scores start at nothing
    void configure(const std::vector<uint32_t> & slots_per_class, size_t n_records, double half_life = EXPERTS_HALF_LIFE);

    // `record` was used by `count` of `n_tokens` tokens, the last of which is token number `now` (tokens never run backwards
    // for one record). To be called before take() or hold().
    void use(uint32_t record, uint64_t now, uint32_t n_tokens, uint32_t count);

    // A slot of `size_class` for `record`, held: an empty one, or, if `evict`, the one with the lowest score. NONE if there is
    // no such slot. *evicted: the record that lost its slot, NONE if the slot was empty.
    int32_t take(uint32_t size_class, uint32_t record, bool evict, int32_t * evicted);

    // Its record is not evicted before end_op(). What this op holds counts as used in the order of its calls, whenever reads arrive.
    void hold(int32_t slot);

    // while true the slot is held beyond end_op()
    void set_reading(int32_t slot, bool reading) { slots[(size_t) slot].reading = reading; }

    // releases what the op held
    void end_op();

    // the slot is empty again
    void drop(int32_t slot);

    // One slot more for the class: its next one by address (the class's n_slots() before the call tells which).
    int32_t add(uint32_t size_class);

    // One slot less: the class's last one by address. move: what it holds goes to an empty slot, or to that of the record with the
    // lowest score; else it is evicted, unless it is held.
    struct retired {
        bool    done;    // false: it or what could make room for it is held; nothing has changed
        int32_t slot;    // the slot that is gone
        int32_t moved;   // the slot that has what it held; NONE: nothing, or it is `evicted`
        int32_t evicted; // the record that lost its place; NONE: none
    };
    retired retire(uint32_t size_class, bool move = true);

    uint32_t record_in(int32_t slot) const { return slots[(size_t) slot].record; }

    // slots of the class, those retired left out
    uint32_t n_slots(uint32_t size_class) const { return classes[size_class].count; }

    uint32_t n_empty(uint32_t size_class) const { return classes[size_class].n_empty; }

    uint32_t used() const { return n_used; }

    // logarithm of the record's score, comparable with others at any time; for tests
    double score(uint32_t record) const { return scores[record]; }

  private:
    static constexpr int64_t BUCKETS    = 256;
    static constexpr double  PER_OCTAVE = 4.0; // buckets

    struct slot {
        uint32_t record;
        uint32_t size_class;
        int32_t  newer; // in its bucket; in the empty list: the next empty slot
        int32_t  older;
        int32_t  at;     // in `holding`, if held
        int64_t  bucket; // counted from the beginning of time; below `lowest`: in the lowest bucket
        bool     held;
        bool     reading;
        bool     used;   // has a record
        bool     gone;   // retired
        bool     listed; // in the empty list, where a retired slot stays until it is passed over
    };

    struct list {
        int32_t newest = NONE;
        int32_t oldest = NONE;
    };

    struct size_class_state {
        uint32_t             count      = 0;
        uint32_t             n_empty    = 0;
        int32_t              empty      = NONE; // head of the empty list
        int32_t              last_empty = NONE; // its end, if it has a head
        int64_t              lowest     = 0;    // number of the lowest bucket there is
        std::vector<int32_t> members;           // by address: the first `count` are in use, the rest is retired
        list                 buckets[BUCKETS];
        uint64_t             occupied[BUCKETS / 64] = {};
    };

    list     join(const list & older, const list & newer);
    void     raise(size_class_state & c, int64_t lowest);
    void     list_empty(int32_t slot, bool last = false);
    int32_t  pop_empty(size_class_state & c);
    int32_t  lowest_slot(const size_class_state & c) const;
    void     insert(int32_t slot);
    void     remove(int32_t slot);
    void     add_held(int32_t slot);
    uint32_t position(int64_t bucket) const { return (uint32_t) (bucket & (BUCKETS - 1)); }

    std::vector<slot>             slots;
    std::vector<size_class_state> classes;
    std::vector<double>           scores;      // by record: log2 of the score, plus the token number in half-lives
    std::vector<int32_t>          holding;     // held slots, or NONE
    int32_t                       carried = 0; // of these, held since an earlier op
    uint32_t                      n_used  = 0;
    double                        ageing  = 1.0 / EXPERTS_HALF_LIFE; // octaves per token
};
