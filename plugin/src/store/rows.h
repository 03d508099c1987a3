// Rows of embedding tables, of which a token needs one. They are read when they are asked for and not kept.
#pragma once

#include "memory/mapping.h"
#include "store/records.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;

// room for the rows of a wave: where they are read to, in whole sectors, and side by side, as the kernel wants them
class row_store : public read_owner {
  public:
    explicit row_store(read_queue & reads_, instruments & notes_) : reads(reads_), notes(notes_) {}

    void ended(uint32_t row, const reader::done & done, file_state state) override;

    // A table with rows of so many bytes is going to be used.
    void add(size_t row_bytes);

    // of the room for all tables
    size_t memory_bytes() const { return rows * (span + longest); }

    const char * make(uint64_t & bytes); // as expert_store::make
    void         drop_all() { memory = mapping(); }

    // Reads a wave: the rows of t that `ids` names from place `first` on, as far as there is room. false: the session has failed.
    bool read(flash_tensor & t, const ggml_tensor * ids, int64_t first);

    // the wave that has been read

    const std::vector<int32_t> & places() const { return ids; } // by row of the op's output: the row's number in data()
    size_t                       n() const { return numbers.size(); }
    const uint8_t *              data(size_t row_bytes) const { return row(0, row_bytes); }
    bool                         more() const { return another; } // wave follows

  private:
    static constexpr size_t MOST = 1u << 20; // bytes, unless one row needs more

    bool list(const flash_tensor & t, const ggml_tensor * wanted, int64_t first);
    bool gather(flash_tensor & t);

    uint8_t * read_to(size_t i) const { return memory.data + i * span; }
    uint8_t * row(size_t i, size_t row_bytes) const { return memory.data + rows * span + i * row_bytes; }

    read_queue &         reads;
    instruments &        notes;
    mapping              memory;
    size_t               span    = 0; // bytes of whole sectors that hold any row
    size_t               longest = 0; // bytes of the longest row
    uint32_t             rows    = 0; // of a wave
    std::vector<int32_t> numbers;     // of the wave's distinct rows
    std::vector<int32_t> ids;
    uint32_t             pending = 0;                // reads under way
    file_state           state   = file_state::same; // of their file, when they had arrived
    std::string          table;                      // whose rows they are
    bool                 another = false;
};
