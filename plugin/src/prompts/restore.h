// Reads blocks of a prompt from their files into the engine's caches: several pieces in flight, and what has arrived is checked and
// copied by threads of its own while the others are under way.
#pragma once

#include "io/reader.h"
#include "llama_flash.h"
#include "memory/mapping.h"
#include "prompts/body.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

class prompt_restore {
  public:
    static constexpr uint64_t HEAD   = FLASH_SECTOR;
    static constexpr uint64_t SUMS   = 16;       // bytes at the end of the head: bytes of the body, checksums of body and head
    static constexpr uint64_t PIECE  = 1u << 20; // of a body; a multiple of CHECKSUM_PIECE
    static constexpr uint32_t PLACES = 12;       // pieces in memory

    static std::unique_ptr<prompt_restore> create(const llama_flash_params & params, llama_flash_error * err);
    ~prompt_restore();

    // To be read to `to`. head: what the file must begin with. A file that cannot be opened for reads, or has another size, counts as
    // damaged.
    void add(int fd, const uint8_t * head, prompt_body to);

    // Memory that will be written to: in huge pages, until all is read. at_once: from the first block on, all of it, so that its pages are
    // asked for by all threads, before they copy.
    void prepare(uint8_t * begin, uint8_t * end, bool at_once);

    // Reads them all. Returns how many of the first ones are whole and right; what was written of the others is for the caller to clear.
    size_t run();

    const prompt_body & body(size_t number) const { return blocks[number].to; }

  private:
    struct block {
        std::unique_ptr<flash_file> file;
        const uint8_t *             head;
        prompt_body                 to;
        bool                        good;
        uint32_t                    wanted; // sum of the body, as the head says
        uint32_t                    sum;    // as it is
    };

    struct piece {
        size_t   block;
        uint64_t begin; // in the body
        uint64_t size;
    };

    prompt_restore() = default;

    bool      next_piece(piece & out);
    uint8_t * place(uint32_t number) const { return memory.data + number * (PIECE + HEAD); }
    void      start(uint32_t number);
    void      read_all();
    void      work();
    void      settle(uint32_t number);
    bool      right_head(block & b, const uint8_t * data) const;

    mapping                 memory; // where pieces arrive
    std::unique_ptr<reader> reads;  // goes before the memory that it reads to
    std::vector<block>      blocks;
    piece                   pieces[PLACES];
    piece                   upcoming = { 0, 0, 0 };

    using bytes_of = std::pair<uint8_t *, uint8_t *>; // begin and end

    std::vector<bytes_of> prepared;
    std::vector<bytes_of> untouched; // to be asked for
    std::atomic<size_t>   next_untouched{ 0 };

    std::mutex              mutex; // of what follows, and of good, wanted and sum
    std::condition_variable arrived_some;
    std::condition_variable freed_some;
    std::deque<uint32_t>    arrived; // places, in the order of their arrival
    std::vector<uint32_t>   empty;
    bool                    ended = false;
};
