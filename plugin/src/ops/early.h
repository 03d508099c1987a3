// A part of a layer's second op (up beside gate, with the same input) is computed early: while the first op waits for reads, experts of
// the second that are in slots are computed into rows of ours. When the second op begins, it copies these rows and leaves the experts out.
#pragma once

#include "store/experts.h"

#include "ggml.h"

#include <cstdint>
#include <vector>

class early_rows {
  public:
    void reserve(uint32_t n_experts) { done.assign(n_experts, 0); }

    // An op on t of few tokens begins, the session's op number `stamp`: what was computed for it goes to its output, and its experts
    // are no longer among `waiting` (records).
    void hand_over(flash_tensor & t, ggml_tensor * op, uint64_t stamp, std::vector<uint32_t> & waiting);

    // Notes whether it is the first of its layer, so that something can be computed early for the second.
    void begin(const record_table & table, const flash_tensor & t, const ggml_tensor * op, uint64_t stamp);

    // While op number `stamp` waits: calls f(tensor, record) for each of the `experts` that the second will find in a slot. false: none.
    template <typename F> bool find(expert_store & store, const record_table & table, const std::vector<uint32_t> & experts, uint64_t stamp, F f) {
        if (!usable || next_stamp != stamp + 1) {
            return false;
        }
        const flash_tensor & t   = table.tensors[tensor];
        bool                 any = false;
        for (uint32_t e : experts) {
            const flash_record & r = table.records[t.first_record + e];
            if (done[e] != next_stamp && r.place == record_place::slot && r.is_there()) {
                done[e] = next_stamp;
                any     = true;
                store.hold(t.first_record + e);
                f(t, t.first_record + e);
            }
        }
        return any;
    }

    // the op that computes them
    ggml_tensor * op() { return &first; }
    uint32_t      second() const { return tensor; } // its tensor

  private:
    uint32_t              tensor     = 0;       // the second op's
    uint64_t              next_stamp = 0;       // and its number in the session's ops
    const ggml_tensor *   input      = nullptr; // what the first op has for src[1] and src[2]
    const ggml_tensor *   ids        = nullptr;
    bool                  usable     = false;
    ggml_tensor           first      = {}; // the first op, but that it writes to `out`
    std::vector<float>    out;
    std::vector<uint64_t> done; // by expert: number of the op that it was computed for
};
