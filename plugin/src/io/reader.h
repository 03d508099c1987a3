// Asynchronous reads past the page cache: aligned pieces of a span of a file, into memory that is congruent with it.
//
// A job is one record. It is read in pieces, all in flight at once. Short reads and EINTR are continued here; what an I/O engine
// (io_uring or a pool of pread threads) reports is only "this piece returned that".
//
// Not thread safe: the session serialises its callers. The reader knows neither ggml nor which record a job is for.
#pragma once

#include "base/sector.h"
#include "io/checksum.h"
#include "io/read_watch.h"
#include "llama_flash.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

// A GGUF file (or shard) open for direct reads. The descriptor is owned.
class flash_file {
  public:
    // reopens the open file `fd` for direct reads; falls back to cached reads where the file system has no O_DIRECT
    static std::unique_ptr<flash_file> reopen(int fd, llama_flash_error * err);
    ~flash_file();

    flash_file(const flash_file &)             = delete;
    flash_file & operator=(const flash_file &) = delete;

    // What became of it since reopen(), or since the last look. By one thread at a time.
    file_state look() const;

    // without waiting for anything; the file cannot be read any more
    void close();

    int         fd     = -1;
    uint64_t    size   = 0; // bytes
    uint64_t    device = 0;
    uint64_t    inode  = 0;
    bool        direct = false; // O_DIRECT in force
    std::string path;

  private:
    flash_file() = default;

    // of what fstat and the descriptor's name say
    struct status {
        int64_t     mtime_s;
        int64_t     mtime_ns;
        int64_t     ctime_s;
        int64_t     ctime_ns;
        uint64_t    size;
        uint64_t    links;
        uint32_t    mode;
        uint32_t    user;
        uint32_t    group;
        std::string name;
    };

    bool status_now(status & now) const; // all but the name

    status             opened = {};
    mutable status     seen   = {}; // at the last look
    mutable file_state state  = file_state::same;
};

class read_owner; // read_queue.h

struct read_job;

struct read_piece {
    int          fd;
    uint64_t     offset; // multiple of FLASH_SECTOR
    uint32_t     size;   // bytes asked of the device, multiple of FLASH_SECTOR
    uint32_t     need;   // bytes that must arrive (less than size at the end of the file)
    uint8_t *    dst;
    int64_t      result; // bytes read or -errno, set by the I/O engine
    uint32_t     tries;  // times in a row that it ended without a byte, for no fault of the device
    read_job *   job;
    read_piece * next;  // lists of the I/O engine and of the reader
    read_piece * older; // of those under way
    read_piece * younger;
};

struct read_job {
    uint32_t           tag;     // the caller's number for it
    uint32_t           pending; // pieces not yet ended
    int32_t            error;   // first errno, ENODATA for a file that ended too early; 0
    uint64_t           error_offset;
    const flash_file * file;
    read_owner *       owner;
    read_job *         next;
};

// What carries pieces to the device. start() and finished() are called by one thread at a time.
class io_engine {
  public:
    virtual ~io_engine() = default;

    virtual llama_flash_io_engine kind() const = 0;

    // takes a piece; the device may see it only after flush()
    virtual void start(read_piece * piece) = 0;
    virtual void flush()                   = 0;

    // A piece that has ended, or nullptr: if wait > 0, only when none is under way. Where it must wait, it may do so until
    // as many as `wait` have ended.
    virtual read_piece * finished(uint32_t wait) = 0;
};

std::unique_ptr<io_engine> make_uring_engine(uint32_t depth, std::string & why_not);
std::unique_ptr<io_engine> make_pread_engine(uint32_t threads, std::string & why_not);

class reader {
  public:
    static std::unique_ptr<reader> create(const llama_flash_params & params, llama_flash_error * err);
    ~reader();

    // Queues a read of `size` bytes at `offset` of `file` to dst, where dst is congruent with offset modulo FLASH_SECTOR and the
    // sectors around [dst, dst + size) are ours to overwrite. first_of_all: before what is queued. tag, owner: given back with it.
    void read(const flash_file & file, uint64_t offset, uint64_t size, uint8_t * dst, uint32_t tag, bool first_of_all = false,
              read_owner * owner = nullptr);

    // Hands queued pieces to the device, as many as its depth allows.
    void submit();

    struct done {
        uint32_t           tag;
        int32_t            error; // 0 or errno
        uint64_t           error_offset;
        const flash_file * file;
        read_owner *       owner;
    };

    // The next job that has ended. If `wait`, blocks until one has (of small ones a few), and returns false only if none is under way.
    bool next(done & out, bool wait);

    bool idle() const { return in_flight == 0 && !queue_head; }

    // from now on what next() waits for is told there
    void report_to(read_watch & to) { watch = &to; }

    llama_flash_io_engine engine_kind() const { return engine->kind(); }

    uint64_t bytes   = 0; // asked of the device
    uint64_t reads   = 0; // pieces that have ended
    uint64_t retries = 0;

  private:
    reader() = default;

    static constexpr uint32_t MAX_TRIES  = 1000;
    static constexpr uint64_t WAIT_BYTES = 256u << 10; // of small reads so much is waited for at once: to wake takes as long as one

    void         reserve(size_t n_jobs, size_t n_pieces);
    read_piece * new_piece();
    read_job *   new_job();
    void         requeue(read_piece * piece);
    uint32_t     worth_waking() const;
    read_piece * wait();
    void         note_started(read_piece * piece);
    void         note_ended(read_piece * piece);
    bool         settle(read_piece * piece); // true if its job has ended with it

    std::unique_ptr<io_engine> engine;
    uint32_t                   depth           = 0;
    uint32_t                   piece_size      = 0;
    uint32_t                   in_flight       = 0;
    uint64_t                   bytes_in_flight = 0;

    read_watch * watch    = nullptr;
    read_piece * oldest   = nullptr; // under way
    read_piece * youngest = nullptr;

    read_piece * queue_head = nullptr;
    read_piece * queue_tail = nullptr;

    // pools: grown when a burst is larger than any before, never in steady state
    std::deque<read_piece> pieces;
    std::deque<read_job>   jobs;
    read_piece *           free_pieces = nullptr;
    read_job *             free_jobs   = nullptr;
};
