// Neurons of bundles in slots, and the reads that bring them there. Thread 0's, under the session's lock, but for land().
//
// A missing neuron gets a slot at once; neighbours in the file are read together into a ring and copied from there. Which neurons
// stay is the cache's business (memory/cache.h); with a window, a neuron that none of the last `window` tokens used gives up its slot.
#pragma once

#include "base/instruments.h"
#include "io/read_queue.h"
#include "memory/cache.h"
#include "memory/layout.h"
#include "memory/mapping.h"
#include "memory/ring.h"
#include "store/bundle.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

class neuron_store : public read_owner {
  public:
    static constexpr size_t   LONGEST   = 256u << 10; // bytes of a read of single neurons
    static constexpr uint32_t NO_WINDOW = UINT32_MAX;

    // bundles: the session's, by layer; the store says where their parts and records are kept
    neuron_store(read_queue & queue_, instruments & notes_, const memory_needs & needs_, std::vector<flash_bundle> & bundles_) : queue(queue_), notes(notes_), needs(needs_), bundles(bundles_), pinned(queue_) {}

    // memory (neuron_homes.cpp), between two ops

    // What the mode (enum llama_flash_neuron_mode) reads of a record, and where it goes in a slot. What was read is forgotten.
    void lay_out(uint32_t mode);

    // bundles, tables, runs and slots of the needs
    void note_needs(memory_needs & n, uint32_t mode) const;

    // As the layout has it, from empty. What the kernel refused `bytes` for; nullptr: nothing.
    const char * make(const memory_layout & to, const llama_flash_neuron_params & params, uint64_t & bytes);
    bool         read_pinned(); // pinned records, and parts that are resident in the mode; false: failed
    void         drop_all();    // waits for what is under way

    void           note_layout(memory_layout & l) const;
    void           fit(memory_layout & to) const;                                    // to what there are addresses for
    bool           give_back_one(const memory_layout & to, bool move, bool & stuck); // as expert_store's: a run of pinned records, or a slot
    bool           add_slots(const memory_layout & to);                              // some, where there are fewer
    flash_bundle * to_pin(const memory_layout & to);                                 // one that has fewer pinned records; nullptr: none
    bool           pin_run(flash_bundle & b);                                        // one more; false: the kernel refused, or failed
    void           give_back_pages();

    // A new evaluation of the bundle by n_tokens tokens, the last of which is number b.tokens: notes the use of its active set.
    void use(const flash_bundle & b, uint32_t n_tokens);

    // Sees to it that the listed neurons (ascending; at most n_slots()) are in slots or on their way, and holds them there.
    // count: this is the evaluation's first demand for them.
    void demand(const flash_bundle & b, const uint32_t * list, size_t n, bool count);

    // Reads the listed neurons if slots can be had; not held. For an evaluation that is expected soon.
    void expect(const flash_bundle & b, const uint32_t * list, size_t n);

    // The same, at most may_come() neurons and warm_bytes() of sectors, into empty slots only; false: there is none left.
    bool   warm(const flash_bundle & b, const uint32_t * list, size_t n);
    size_t warm_bytes() const { return ring_bytes / 2; }

    // How many neurons may still be read ahead of demands: the next demand must find slots.
    uint32_t may_come() const { return n_slots() / 4 - std::min(n_slots() / 4, n_coming); }

    // Neurons in slots, by their numbers among the session's, with their scores.
    template <typename F> void each(F f) const {
        for (uint32_t neuron = 0; neuron < slot_of.size(); neuron++) {
            if (slot_of[neuron] >= 0) {
                f(neuron, cache.score(neuron));
            }
        }
    }

    llama_flash_place place_of(const flash_bundle & b, uint32_t neuron) const {
        if (neuron < b.n_pinned) {
            return LLAMA_FLASH_PINNED;
        }
        const int32_t slot = slot_of[b.first + neuron];
        return slot < 0 ? LLAMA_FLASH_IN_FILE : pending[(size_t) slot] > 0 ? LLAMA_FLASH_COMING
                                                                           : LLAMA_FLASH_IN_SLOT;
    }

    // number of the last token that used a neuron of the session's + 1, 0: none
    uint64_t used_by(uint32_t neuron) const { return last_use[neuron]; }

    // Checksums, by neuron and stream. What each was read as when it was read first; 0: it was not.
    uint32_t & checksum_of(const flash_bundle & b, uint32_t neuron, const bundle_stream & stream) {
        return checksums[first_checksum[b.index] + neuron * b.streams.size() + (size_t) (&stream - b.streams.data())];
    }

    // Releases what demand() held.
    void release() { cache.end_op(); }

    // Starts scheduled reads as far as the ring has room.
    void pump();

    // The neuron's cached bytes; nullptr while it is not there.
    const uint8_t * find(const flash_bundle & b, uint32_t neuron) const {
        if (neuron < b.n_pinned) {
            return b.home + neuron * b.record_bytes + b.streams[0].base;
        }
        const int32_t slot = slot_of[b.first + neuron];
        return slot >= 0 && pending[(size_t) slot] == 0 ? slots + (size_t) slot * slot_bytes : nullptr;
    }

    // reads that have ended wait here until their neurons are copied

    // after an error the read's neurons lose their slots; that is the session's error only if one of them has been demanded
    void ended(uint32_t index, const reader::done & done, file_state state) override;

    // Any thread: takes neurons of arrived reads one by one and copies them; calls f(bundle, neuron, slot data, stream) for each.
    template <typename F> void land(F f) {
        for (;;) {
            const int64_t i = next_item.fetch_add(1, std::memory_order_relaxed);
            if (i >= (int64_t) landing.size()) {
                return;
            }
            landing_item & item = landing[(size_t) i];
            const read &   r    = reads[item.read];
            uint8_t *      dst  = copy(r, item.item);
            item.sound          = is_sound(*r.bundle, r.items[item.item].neuron, *r.stream, dst + r.stream->slot_offset, r.state);
            if (item.sound) {
                f(*r.bundle, r.items[item.item].neuron, dst, r.stream);
            }
        }
    }

    bool begin_landing(); // thread 0: gathers what has arrived; false: nothing
    // Thread 0: after all threads are through land(). Neurons whose bytes are not those of their first read lose their slots; if
    // they have been demanded, the session has failed.
    void end_landing();
    bool under_way() const { return n_started > 0 || !scheduled.empty(); } // demanded or expected, and not yet landed

    // whole runs of records, for evaluations that use all neurons: in order, through the same ring

    struct run {
        uint32_t        first; // neurons [first, first + count)
        uint32_t        count;
        const uint8_t * data[FFN_PARTS];   // of neuron `first`; nullptr: not read
        size_t          stride[FFN_PARTS]; // from one neuron to the next
    };

    // The next runs to be asked for begin with neuron `first` of b, `rows` at a time, to its end; then, if `ahead`, those of
    // the bundle after it. resident: to fill the parts that are not cached, else for those that are.
    void        stream_begin(const flash_bundle & b, uint32_t first, uint32_t rows, bool ahead, bool resident = false);
    // The same for some experts (ascending; the list stays until the last run is released); no run goes beyond one's end.
    void        stream_experts(const flash_bundle & b, const std::vector<uint32_t> & experts, uint32_t rows);
    // Waits for the next run; nullptr: the session has failed. To be released with stream_release() once computed.
    const run * stream_next();
    void        stream_release();
    // Any thread: checks rows [first, last) of the run that stream_next() has given, for is_run_sound().
    void        check_run(uint32_t first, uint32_t last);
    bool        is_run_sound(); // thread 0, after all have checked; false: the session has failed
    file_state  run_state() const { return reads[runs.front()].state; }
    // Ends reading ahead; waits for what is under way.
    void        stream_end();

    bool streaming() const { return !runs.empty(); }

    // Slots for `count` neurons from number `first` of a bundle on, if all neurons get the same share of them.
    uint32_t share_of(uint32_t first, uint32_t count) const {
        return (uint32_t) ((uint64_t) n_slots() * (first + count) / slot_of.size() - (uint64_t) n_slots() * first / slot_of.size());
    }

    // Copies the run's most used neurons into empty slots, `most` of them; uses: by row of the run, of n_tokens tokens the last of
    // which is number `now`.
    void keep(const flash_bundle & b, const run & r, const uint32_t * uses, uint32_t most, uint32_t n_tokens, uint64_t now);

    uint32_t n_empty() const { return cache.n_slots(0) - cache.used(); }

    // After a failed op: waits for what is under way, and drops what has not landed.
    void drop_reads();

    // Drops every neuron that is in a slot; no op is in progress.
    void drop_kept();

    uint32_t n_slots() const { return cache.n_slots(0); }

    const uint8_t * slot_memory() const { return slots; }

    // A moving limit. No op is in progress; the slots' memory has room for n.
    void add_slots(uint32_t n);
    bool retire_slot(bool move); // the last one, see slot_cache::retire; false: a read into it is under way
    void settle();               // waits for reads of neurons and copies what has come

    uint32_t used() const { return cache.used(); }
    size_t   touched() const { return neuron_ring.touched(); }

    uint64_t bytes_used() const { return (uint64_t) needs.neuron_slot * used(); } // of slots

  private:
    struct item {
        uint32_t neuron;
        int32_t  slot;
    };

    struct read {
        const flash_bundle *  bundle;
        const bundle_stream * stream; // nullptr: a run
        run                   whole;
        uint8_t *             data;  // where the first item's bytes, or the run's, begin
        int32_t               entry; // in the ring
        uint32_t              jobs;  // the reader has not yet ended
        bool                  ahead; // none of its neurons has been demanded yet
        bool                  failed;
        file_state            state; // of the file, when it had arrived
        std::vector<item>     items;
    };

    struct landing_item {
        uint32_t read;
        uint32_t item;
        bool     sound; // its bytes are what they were
    };

    // records that go to their home, not to slots
    struct home_reads : read_owner {
        explicit home_reads(read_queue & queue_) : queue(queue_) {}
        void         ended(uint32_t bundle, const reader::done & done, file_state state) override;
        read_queue & queue;
    };

    struct use_note {
        uint32_t neuron;
        uint64_t token;
    };

    void      configure(uint32_t n_neurons, uint32_t n_slots, size_t bytes);
    bool      make_home(flash_bundle & b, uint64_t least);
    void      read_home(const flash_bundle & b, uint32_t first, uint32_t n);
    bool      fill_resident(const flash_bundle & b);
    bool      check_pinned(const flash_bundle & b, uint32_t first, uint32_t n);
    bool      check_file(const flash_bundle & b) { return queue.check_file(*b.file, b.name, b.offset, b.tensor_bytes()); }
    void      forget_checksums();
    bool      nobody_asked(const read & r) const;
    uint32_t  new_read(const flash_bundle & b, const bundle_stream * stream);
    void      free_read(uint32_t index);
    bool      start(uint32_t index);
    void      schedule(const flash_bundle & b, bool ahead);
    void      cancel_ahead();
    void      expire(uint64_t now);
    bool      take(uint32_t neuron, bool evict = true);
    void      drop(uint32_t neuron);
    void      hold_only(const flash_bundle & b, const uint32_t * list, size_t n);
    void      note_here(int32_t slot);
    void      drop_failed(const flash_bundle & b, const item & i);
    uint8_t * copy(const read & r, uint32_t item) const;
    bool      start_run();
    void      go_on(const flash_bundle & b, uint32_t end, uint32_t count);
    void      stream_after(const flash_bundle & b);
    void      let_land();
    bool      is_sound(const flash_bundle & b, uint32_t neuron, const bundle_stream & stream, const uint8_t * data, file_state state);
    void      fail_neuron(const flash_bundle & b, uint32_t neuron, const bundle_stream & stream);

    read_queue &                queue;
    instruments &               notes;
    const memory_needs &        needs;
    std::vector<flash_bundle> & bundles;
    home_reads                  pinned;
    uint32_t                    window    = NO_WINDOW;
    uint32_t                    merge_gap = 0; // bytes not wanted that a read may cover to reach the next neuron

    mapping               slots_mapped;
    mapping               ring_mapped;
    std::vector<mapping>  homes; // resident parts and pinned records
    slot_cache            cache;
    ring                  neuron_ring;
    size_t                ring_bytes = 0;
    uint8_t *             slots      = nullptr;
    size_t                slot_bytes = 0;
    std::vector<int32_t>  slot_of;   // by neuron of all bundles
    std::vector<uint8_t>  pending;   // by slot: streams still to come
    std::vector<uint8_t>  asked_for; // by slot: its neuron has been demanded since its read began
    std::vector<uint64_t> last_use;  // by neuron: token number + 1, 0: never
    std::deque<use_note>  uses;      // with a window: oldest first

    std::vector<item>         wanted; // missing neurons that have just got slots
    std::deque<read>          reads;  // pool; addresses stay
    std::vector<uint32_t>     free_reads;
    std::deque<uint32_t>      scheduled; // demanded, not yet started
    std::deque<uint32_t>      scheduled_ahead;
    std::vector<uint32_t>     done; // arrived, to be landed
    std::vector<uint32_t>     landing_reads;
    std::vector<landing_item> landing;
    std::atomic<int64_t>      next_item{ 0 };
    std::vector<uint32_t>     checksums;      // threads write those of different neurons
    std::vector<size_t>       first_checksum; // by bundle
    std::atomic<int64_t>      unsound{ -1 };  // of the run: row times FFN_PARTS, plus the stream
    uint32_t                  n_started = 0;  // reads of neurons in the ring
    uint32_t                  n_coming  = 0;  // slots whose neuron is not there yet

    // streaming
    const flash_bundle *          stream_bundle   = nullptr; // of the next run to schedule
    uint32_t                      stream_first    = 0;
    uint32_t                      stream_rows     = 0;
    bool                          stream_ahead    = false;
    bool                          stream_resident = false;
    const std::vector<uint32_t> * stream_list     = nullptr; // experts; nullptr: all of the bundle
    size_t                        stream_expert   = 0;       // of the list
    std::deque<uint32_t>          runs;                      // started and not yet released, in order
};
