#include "ops/panels.h"

// Sets what to compute next: a streamed panel.
void panel_op::next_panel(const flash_tensor & t) {
    const uint32_t index = t.first_record + next++;
    flash_record & r     = table.records[index];
    wave.any             = false;
    if (!panels.bring(index)) {
        return;
    }
    wave.add(index);
    wave.more = next < t.n_records;
    wave.read = &r;
    data      = r.data;
    row       = r.row;
    rows      = r.rows;
    notes.stats.panel_reads++;
}

// The pinned run, or the first panel that streams.
void panel_op::first_wave(flash_tensor & t, const ggml_tensor * op) {
    panels.seek(t, stamp);
    panels.pump();
    panels.clock.advance(t.tokens, (uint64_t) ggml_nrows(op->src[1]));
    next = t.n_pinned;
    if (t.n_pinned == 0) {
        next_panel(t);
        return;
    }
    const flash_record & last = table.records[t.first_record + t.n_pinned - 1];
    data                      = t.home;
    row                       = 0;
    rows                      = last.row + last.rows;
    wave.any                  = true;
    wave.more                 = t.n_pinned < t.n_records;
    notes.stats.panel_hits += t.n_pinned;
}

// one op, as one of the pool's threads sees it
struct panel_op::this_run {
    panel_op &                  o;
    flash_tensor &              t;
    const ggml_compute_params * params;
    ggml_tensor *               op;

    void first() { o.first_wave(t, op); }
    void compute() { stock_mul_mat(t.kernel, params, op, o.data, o.row, o.rows); }
    void next() {
        o.panels.pump();
        o.next_panel(t);
    }
    void pages_are_there() {} // a ring's are there soon
    void read_ahead() { o.panels.pump(); }
    void release() { o.experts.end_op(); } // experts whose reads have ended meanwhile
};

void panel_op::run(flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op) {
    this_run run = { *this, t, params, op };
    wave.run(run, panels, t, params);
}
