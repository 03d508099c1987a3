// MUL_MAT on flash tensors.
#pragma once

#include "ops/waves.h"
#include "store/experts.h"
#include "store/panels.h"

#include <cstdint>

class panel_op {
  public:
    panel_op(op_gate & gate, read_queue & reads, instruments & notes_, record_table & table_, expert_store & experts_, panel_store & panels_) : stamp(gate.stamp), notes(notes_), table(table_), experts(experts_), panels(panels_), wave(gate, reads, notes_, table_) {}

    // Entered by all threads of the pool. op->src[0] is the tensor. On failure the session has an error, op's data is undefined.
    void run(flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op);

  private:
    struct this_run;

    void first_wave(flash_tensor & t, const ggml_tensor * op);
    void next_panel(const flash_tensor & t);

    const uint64_t & stamp;
    instruments &    notes;
    record_table &   table;
    expert_store &   experts;
    panel_store &    panels;
    waves            wave;

    uint32_t     next = 0;       // panel of the tensor
    const void * data = nullptr; // what to compute now
    int64_t      row  = 0;
    int64_t      rows = 0;
};
