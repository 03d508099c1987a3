// Panels: pinned at a home of their matrix, or streaming through a ring in the order in which they are used, which is learnt from the
// first pass.
#pragma once

#include "store/records.h"

#include <cstdint>
#include <vector>

class panel_store : public record_store {
  public:
    using record_store::record_store;

    void ended(uint32_t index, const reader::done & done, file_state state) override;

    // Reads ahead in the order of use, as far as the ring has room; false: nothing was begun.
    bool pump();

    // Brings the reads in line with an op on t, the session's op number `stamp`: its first streamed panel is the oldest in the ring, or
    // the next to be read.
    void seek(flash_tensor & t, uint64_t stamp);

    // Waits for the panel; false: the session has failed.
    bool bring(uint32_t index);

    token_clock clock; // panels are used by every token, so it is not the experts'

    // memory, between two ops

    const char * make(const memory_layout & to, uint64_t & bytes); // as expert_store::make
    bool         read_pinned();                                    // false: failed
    void         drop_all();
    void         note_layout(memory_layout & l) const;
    void         fit(memory_layout & to) const;
    bool         give_back_one(const memory_layout & to); // the last pinned panel of the tensor that has the most too many
    bool         take_one(const memory_layout & to);      // the first that streams, of the one that lacks most; false: none, or failed
    void         give_back_pages();

  private:
    bool make_home(flash_tensor & t, uint64_t least);
    bool pin_next(flash_tensor & t);
    bool check_now(flash_record & r); // does r.check here
    void learn_again();
    void seek_from(uint32_t index);

    uint32_t upcoming() const;
    void     streams_again(uint32_t index);
    void     streams_no_more(uint32_t index);

    std::vector<uint32_t> order; // unpinned panels in order of use
    bool                  order_known = false;
    size_t                next        = 0; // to fetch, in `order`
    std::vector<mapping>  homes;
};
