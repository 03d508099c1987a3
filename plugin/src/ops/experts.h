// MUL_MAT_ID on flash tensors.
#pragma once

#include "ops/early.h"
#include "ops/lookahead.h"
#include "ops/waves.h"
#include "store/experts.h"
#include "store/panels.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

class expert_op {
  public:
    expert_op(op_gate & gate_, read_queue & reads_, instruments & notes_, record_table & table_, const memory_needs & needs_, token_clock & clock_,
              expert_store & experts_, panel_store & panels_) : gate(gate_), reads(reads_), notes(notes_), table(table_), needs(needs_), clock(clock_), experts(experts_), panels(panels_),
                                                                wave(gate_, reads_, notes_, table_), look(table_, reads_, notes_, experts_) {}

    // Room for what an op shares, so that nothing is allocated while decoding.
    void reserve(const llama_flash_params & params);
    void forget();
    void add_router(const std::string & tensor, router_values values) { look.give(tensor, std::move(values)); }

    // Entered by all threads of the pool. op->src[0] is the tensor. On failure the session has an error, op's data is undefined.
    void run(flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op);

  private:
    struct this_run;

    // Of the experts that wait to be computed, how many are in DRAM or on their way.
    struct there_count {
        size_t ring    = 0;
        size_t slots   = 0;
        size_t reading = 0;
        size_t wish    = 0; // as many of one kind make a wave
    };

    void        first_wave(flash_tensor & t, ggml_tensor * op);
    void        next_wave(const flash_tensor & t, bool decode);
    bool        list(const flash_tensor & t, const ggml_tensor * ids);
    void        note_order(flash_tensor & t);
    void        hold_what_is_there(const flash_tensor & t);
    bool        comes_later(const flash_tensor & t, const flash_tensor & other) const;
    bool        to_slot(const flash_tensor & t, uint32_t index, bool decode);
    bool        fetch_own(const flash_tensor & t, bool decode);
    bool        fetch_siblings(const flash_tensor & t, bool decode);
    uint32_t    count_of_rank(size_t rank);
    bool        pump();
    void        add_to_wave(const flash_tensor & t, uint32_t index);
    there_count count_there(bool decode) const;
    uint64_t    half_ring() const { return experts.stream().bytes() / 2; } // is computed, while the other half is read to
    void        set_wave(const flash_tensor & t, bool decode);
    bool        set_early_wave();
    void        fetch_expected();

    op_gate &            gate;
    read_queue &         reads;
    instruments &        notes;
    record_table &       table;
    const memory_needs & needs;
    token_clock &        clock;
    expert_store &       experts;
    panel_store &        panels;

    waves      wave;
    early_rows early;
    lookahead  look;

    std::vector<const void *> addresses;         // [experts], of this wave
    bool                      now_early = false; // the wave is for the layer's second op
    std::vector<uint32_t>     waiting;           // records that are still to be computed
    std::vector<uint32_t>     schedule;          // experts to stream, in order
    size_t                    scheduled = 0;     // so many of them have been dealt with
    std::vector<uint64_t>     seen;              // by expert: number of the op that last asked for it
    std::vector<uint32_t>     count;             // by expert: tokens of the op that use it
    std::vector<uint32_t>     counts;            // of the distinct ones
    std::vector<uint32_t>     distinct;
};
