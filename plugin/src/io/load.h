// Weights that stay in DRAM, read while the model is loaded: past the page cache, several pieces in flight while one is copied. (The
// engine's loader reads one piece after the other, into memory that it asks for anew each time.)
#pragma once

#include "io/reader.h"
#include "memory/mapping.h"

#include <cstddef>
#include <cstdint>
#include <memory>

class weight_loader {
  public:
    static std::unique_ptr<weight_loader> create(const llama_flash_params & params, llama_flash_error * err);

    // from now on what is waited for is told there
    void report_to(read_watch & watch) { reads->report_to(watch); }

    // Reads `size` bytes at `offset` of the file to dst, wherever that is. false: a read failed, and `failed` says which.
    bool read(const flash_file & file, uint64_t offset, uint64_t size, uint8_t * dst, reader::done & failed);

  private:
    static constexpr uint64_t PIECE  = 1u << 20; // bytes; pieces end at multiples of it in the file
    static constexpr uint32_t PIECES = 8;        // in flight

    weight_loader() = default;

    mapping                 memory; // where pieces arrive: the weight need not be congruent with the file
    std::unique_ptr<reader> reads;  // goes before the memory that it reads to
};
