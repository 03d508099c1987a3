// Experts and panels: which records there are, where each is, and what their two stores have in common.
//
// Numbers of records and tensors run over both kinds, in the order in which the tensors were bound: caches, traces and warm starts
// know them by these.
#pragma once

#include "base/instruments.h"
#include "base/sector.h"
#include "io/read_queue.h"
#include "kernels/shadow.h"
#include "memory/layout.h"
#include "memory/mapping.h"
#include "memory/ring.h"

#include "ggml.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// An op of up to this many tokens is decoding (speculation included): it may evict; a longer one is a prompt and may not. Of experts
// it is more where so many sequences generate at the same time (record_table::few_tokens); neurons of more tokens pass by as a whole.
constexpr int64_t DECODE_TOKENS = 16;

enum class record_state : uint8_t {
    absent,  // on flash only
    reading, // a read into its place is under way
    raw,     // arrived, in the file's layout
    ready,   // in the kernel's layout
};

enum class record_place : uint8_t { none,
                                    slot,
                                    ring,
                                    pinned };

struct flash_record {
    uint64_t     offset; // in the file
    uint8_t *    data;   // where it is or is being read to; nullptr if absent
    uint64_t     used;   // experts: number of the last token that used it + 1, 0: none
    uint32_t     tensor; // index in record_table::tensors
    uint32_t     bytes;
    uint32_t     row; // first row of the matrix (panels)
    uint32_t     rows;
    int32_t      index;    // slot or ring entry
    uint32_t     checksum; // of its bytes in the file; 0: none is known
    record_place place;
    record_state state;
    byte_check   check;   // to be done before it is computed on
    bool         fetched; // read for an op that has not asked for it yet
    bool         warmed;  // read by warm() or ahead of a router, and no op has asked for it yet

    // it can be computed on, once it is checked and repacked
    bool is_there() const { return state == record_state::ready || state == record_state::raw; }

    // bytes of the whole sectors that hold it
    uint64_t span() const { return flash_sector_ceil(offset + bytes) - flash_sector_floor(offset); }
};

struct flash_tensor {
    std::string           name;
    ggml_tensor           weight; // copy of the bound tensor: type, shape, strides
    const flash_file *    file;
    uint64_t              offset; // of the tensor in the file
    stock_kernel          kernel;
    uint32_t              number; // index in record_table::tensors
    uint32_t              first_record;
    uint32_t              n_records;   // experts, or panels of this matrix
    uint32_t              n_pinned;    // panels [0, n_pinned) are pinned, side by side at `home`
    uint32_t              size_class;  // experts: class of slots
    uint32_t              group;       // experts: tensors of one layer that share their ids
    uint64_t              tokens;      // number of the last token computed
    uint64_t              order;       // when it was first used, counted over the session's ops; 0: not yet
    uint8_t *             home;        // panels: reserved addresses, congruent with offset
    int32_t               home_memory; // in panel_store's homes, if there is a home
    bool                  is_experts;
    bool                  by_rows;       // rows are picked by number
    bool                  only_rows;     // and nothing else is done: it has no records
    std::vector<uint32_t> row_checksums; // by row, of its first read; 0: it was not read yet
    bool                  same_input;    // experts: of its layer's first tensor, as was seen in the pass before
};

struct record_table {
    std::vector<flash_tensor>          tensors;
    std::vector<flash_record>          records;
    std::vector<std::vector<uint32_t>> groups;      // tensors by group
    std::vector<uint32_t>              class_bytes; // slot size by class
    uint32_t                           n_expert_max = 0;
    int64_t                            few_tokens   = DECODE_TOKENS; // of an op that may evict experts

    // Of all tensors that are bound. panel_bytes: of a panel, about.
    int32_t make_records(uint64_t panel_bytes, llama_flash_error * err);

    // Tables, classes, experts and panels of the needs.
    void note_needs(memory_needs & n) const;

  private:
    int32_t add_records(flash_tensor & t, uint64_t panel_bytes, llama_flash_error * err);
};

// Counts tokens. The last layer sees only those whose output is asked for: its clock follows the others'.
struct token_clock {
    uint64_t now = 0; // the most that anyone has seen

    // n tokens more for one whose clock is `tokens`
    void advance(uint64_t & tokens, uint64_t n) {
        tokens = std::max(tokens + n, now);
        now    = tokens;
    }
};

// What experts and panels have in common: reads of records, and a ring through which they stream. Thread 0's, under the session's lock.
class record_store : public read_owner {
  public:
    record_store(record_table & table_, read_queue & reads_, instruments & notes_, const memory_needs & needs_) : table(table_), reads(reads_), notes(notes_), needs(needs_) {}

    flash_record &       record(uint32_t index) { return table.records[index]; }
    const flash_record & record(uint32_t index) const { return table.records[index]; }

    bool check_file(const flash_record & r);           // false (and failed): its file changed since it was bound
    bool check_record(flash_record & r, uint32_t sum); // does r.check; false (and failed): its bytes are not what they were

    // room in the ring; false: it is full
    bool to_ring(uint32_t index);
    void release(uint32_t index); // a ring record has been computed
    void drop_ring();             // empties the ring; waits for reads into it

    // The ring within its memory: no longer than so many bytes, the rest of its pages is given back; at least so many.
    void shorten_ring(uint64_t bytes);
    void lengthen_ring(uint64_t bytes);

    const ring & stream() const { return through; }

  protected:
    ~record_store() = default;

    // starts the read of a record that has a place
    void start(uint32_t index);
    void set_absent(flash_record & r); // it is on flash only

    // The read has ended. false: the record is not to be used, and it is noted why.
    bool note_arrival(uint32_t index, const reader::done & done, file_state state);

    // memory of so many bytes for the ring; false: the kernel refused
    bool make_ring(uint64_t bytes);

    record_table &       table;
    read_queue &         reads;
    instruments &        notes;
    const memory_needs & needs;
    ring                 through;
    mapping              ring_memory;
};
