// GET_ROWS on flash tensors.
#pragma once

#include "ops/gate.h"
#include "store/rows.h"

struct ggml_compute_params;
struct ggml_tensor;

// A wave of rows is read by thread 0, then the stock kernel converts them, with all threads: what it sees is a small table of these rows.
class row_op {
  public:
    row_op(op_gate & gate_, read_queue & reads_, row_store & rows_) : gate(gate_), reads(reads_), rows(rows_) {}

    // Entered by all threads of the pool. op->src[0] is the tensor, a matrix. On failure the session has an error, op's data is undefined.
    void run(flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op);

  private:
    void compute(const flash_tensor & t, const ggml_compute_params * params, const ggml_tensor * op) const;

    op_gate &    gate;
    read_queue & reads;
    row_store &  rows;
    int64_t      first = 0; // of the op's rows, the wave's
    bool         stop  = false;
};
