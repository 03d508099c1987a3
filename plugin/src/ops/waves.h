// An op runs in waves: thread 0 finds out which records are there, all threads repack and compute those, thread 0 waits for more.
//
//   thread 0: begin, first wave ---+        +--- release, next wave ---+        +--- end
//   all:                        barrier  compute  barrier           barrier  compute  barrier
//
// What thread 0 writes between two barriers is what the others read after the second. Each row of the output is computed whole by
// one call of a stock kernel, so waves do not change a bit of it.
//
// What is computed, in which waves, and what is read when, is the op's to say. It has
//   first(), next()  thread 0: set `any` and `more`, and add() the wave's records; first() may find that the op has failed
//   compute()        all threads
//   pages_are_there() thread 0: after what was read to for the first time got its pages
//   read_ahead()     thread 0, at the end of an op that has not failed: the device has work until the next op
//   release()        thread 0, at the end
#pragma once

#include "ops/gate.h"
#include "store/records.h"

#include "ggml-cpu-impl.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

class waves {
  public:
    waves(op_gate & gate_, read_queue & reads_, instruments & notes_, record_table & table_) : gate(gate_), reads(reads_), notes(notes_), table(table_) {}

    void reserve(size_t n_records);

    // A record that has arrived is computed in this wave: it is checked, repacked and, if it came through the ring, released after it.
    void add(uint32_t index);

    // What is read to memory for the first time waits for its pages, which the kernel has to zero: all threads ask for them, while the
    // device is given the reads into those that are there.
    void add_fresh(const flash_record & r);
    bool waits_for_pages() const { return !fresh.empty(); }

    bool                 any  = false;   // the wave has something to compute
    bool                 more = false;   // another follows
    const flash_record * read = nullptr; // a record of the op's tensor that it has waited for

    // Entered by all threads of the pool.
    template <typename Op> void run(Op & op, record_store & store, const flash_tensor & t, const ggml_compute_params * params) {
        const bool leader = params->ith == 0;
        if (leader) {
            begin(t);
            if (!reads.failed()) {
                op.first();
            }
            share_out();
        }
        for (;;) {
            ggml_barrier(params->threadpool);
            if (stop) {
                ggml_barrier(params->threadpool); // all have seen it before the leader lets another op in
                break;
            }
            if (!fresh.empty()) {
                populate(params);
                if (leader) {
                    fresh.clear();
                    op.pages_are_there();
                }
                ggml_barrier(params->threadpool);
            }
            if (!checking.empty() && !check(store, params)) {
                ggml_barrier(params->threadpool);
                break;
            }
            const bool another = more;
            if (any) {
                repack_all(params);
                op.compute();
            }
            ggml_barrier(params->threadpool);
            if (leader) {
                end_wave(store);
                if (another) {
                    op.next();
                    share_out();
                }
            }
            if (!another) {
                break;
            }
        }
        if (leader) {
            if (end(store)) {
                op.read_ahead();
            }
            op.release();
            gate.end_op();
        }
    }

  private:
    void begin(const flash_tensor & t);
    void share_out();
    void populate(const ggml_compute_params * params);
    bool check(record_store & store, const ggml_compute_params * params);
    void repack_all(const ggml_compute_params * params);
    void repack();
    void end_wave(record_store & store);
    bool end(record_store & store);

    op_gate &      gate;
    read_queue &   reads;
    instruments &  notes;
    record_table & table;

    bool                                         stop = false; // the op has failed
    std::vector<uint32_t>                        streamed;     // ring records of this wave, released after it
    std::vector<uint32_t>                        arrived;      // records of this wave that need repacking
    std::vector<int64_t>                         repack_ends;  // running count of row groups in `arrived`
    std::atomic<int64_t>                         repack_next{ 0 };
    std::vector<uint32_t>                        checking;   // records of this wave whose bytes are to be checked
    std::vector<int64_t>                         check_ends; // running count of pieces in `checking`
    std::vector<uint32_t>                        check_sums; // of their pieces
    std::atomic<int64_t>                         check_next{ 0 };
    std::vector<std::pair<uint8_t *, uint8_t *>> fresh; // in a huge page each: what is to be read to for the first time
    std::atomic<size_t>                          fresh_next{ 0 };
};
