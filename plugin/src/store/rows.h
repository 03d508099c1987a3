// GET_ROWS on flash tensors: embedding tables, of which a token needs a row. Rows are read when they are asked for and not kept.
#pragma once

#include "memory/mapping.h"
#include "io/read_queue.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct ggml_compute_params;
struct ggml_tensor;
struct flash_tensor;
struct llama_flash_session;

// room for the rows of a wave: where they are read to, in whole sectors, and side by side, as the kernel wants them
struct row_buffer : read_owner {
    explicit row_buffer(read_queue & queue_) : queue(queue_) {}

    void ended(uint32_t row, const reader::done & done, file_state state) override;

    read_queue & queue;
    mapping  memory;
    size_t   span  = 0; // bytes of whole sectors that hold any row
    size_t   bytes = 0; // of the longest row
    uint32_t rows  = 0; // of a wave

    std::vector<int32_t> numbers;     // of the wave's distinct rows
    std::vector<int32_t> ids;         // by row of the op's output: place in `numbers`
    uint32_t             pending = 0; // reads under way
    file_state           state   = file_state::same; // of their file, when they had arrived
    std::string          table;       // whose rows they are
    int64_t              first   = 0; // of the op's rows, the wave's
    bool                 more    = false;

    static constexpr size_t MOST = 1u << 20; // bytes, unless one row takes more

    // A table with rows of so many bytes is going to be used.
    void add(size_t row_bytes);

    size_t memory_bytes() const { return rows * (span + bytes); }

    uint8_t * read_to(size_t i) const { return memory.data + i * span; }
    uint8_t * row(size_t i, size_t row_bytes) const { return memory.data + rows * span + i * row_bytes; }
};

// Entered by all threads of the pool. op->src[0] is the tensor, a matrix. On failure the session has an error, op's data is undefined.
void flash_get_rows(llama_flash_session & s, flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op);
