// A session's reads: whose they are, whether their files are still the same, and the first thing that went wrong.
//
// Not thread safe but for failed(): used by thread 0 of an op, or between ops, under the session's lock. Knows neither ggml nor records: a
// read has an owner, which is told when it has ended.
#pragma once

#include "base/clock.h"
#include "io/reader.h"
#include "llama_flash.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

class read_owner {
  public:
    // Read `id` has ended, and its file was in this state afterwards. done.error: 0 or an errno; ESTALE: the file has changed. What
    // this means for the session is the owner's to say (read_queue::fail_read, miss).
    virtual void ended(uint32_t id, const reader::done & done, file_state state) = 0;

  protected:
    ~read_owner() = default;
};

class read_queue {
  public:
    bool open(const llama_flash_params & params, llama_flash_error * err);

    // what is waited for, here or by a reader that reports to the same. By any thread; waits for nothing.
    const read_watch & waited_for() const { return watch; }
    read_watch &       waited_for() { return watch; }

    // waits for what is under way; owners are not told
    void close() { reads.reset(); }

    // reads

    // as reader::read; owner: is told that `id` has ended, by settle() or wait()
    void read(read_owner & owner, uint32_t id, const flash_file & file, uint64_t offset, uint64_t size, uint8_t * dst, bool first_of_all = false) {
        reads->read(file, offset, size, dst, id, first_of_all, &owner);
    }

    void submit() { reads->submit(); }
    bool idle() const { return reads->idle(); }

    // Tells the owners of what has ended; wait: of one read at least. false: none was under way.
    bool settle(bool wait);

    // the same in an op, whose threads wait for it
    bool wait() {
        const int64_t t0  = flash_now_ns();
        const bool    any = settle(true);
        wait_ns += (uint64_t) (flash_now_ns() - t0);
        return any;
    }

    // until nothing is under way
    void drain() {
        while (!idle()) {
            settle(true);
        }
    }

    // files

    // false (and failed): the file changed since it was bound. Looks at a file once, until look_again().
    bool check_file(const flash_file & file, const std::string & tensor, uint64_t offset, uint64_t size);
    void look_again() { checked = nullptr; }

    // for tests: as if it had been looked at
    void count_as_checked(const flash_file * file) { checked = file; }

    // a file was seen to have changed, in the call that has failed
    bool file_changed() const { return changed; }

    // errors

    // the first error stays until it is forgotten
    void fail(const llama_flash_error & e);

    // tensor: what the op was on, or the read for
    void fail_op(int32_t code, const std::string & tensor, const char * what);
    void fail_read(const flash_file & file, const std::string & tensor, int32_t sys_errno, uint64_t offset, uint64_t size);

    // bytes are not those of their first read; known: the checksum of these, 0: there is none, so that they may have changed
    void fail_bytes(const flash_file & file, const std::string & tensor, uint64_t offset, uint64_t size, uint32_t known);

    // while a model is bound: the last error stands, and bind_end reports it
    void refuse(const llama_flash_error & e);

    // a read has failed that no op has asked for: it is counted, and the session goes on
    void miss() { errors++; }

    bool                      failed() const { return has_failed.load(std::memory_order_acquire); }
    const llama_flash_error & error() const { return first; }
    void                      forget_error() {
        has_failed = false;
        changed    = false;
    }

    // counters

    void used(uint64_t bytes) { bytes_used += bytes; }
    void tell(llama_flash_stats & stats) const;

  private:
    void fail_read(const flash_file & file, const std::string & tensor, int32_t sys_errno, uint64_t offset, uint64_t size, const char * why);

    read_watch                watch;
    std::unique_ptr<reader>   reads;
    std::vector<reader::done> done;
    const flash_file *        checked = nullptr; // known to be unchanged, for this op
    bool                      changed = false;
    std::atomic<bool>         has_failed{ false };
    llama_flash_error         first      = {};
    uint64_t                  bytes_read = 0; // as far as reads have ended, with the next two
    uint64_t                  n_reads    = 0;
    uint64_t                  retries    = 0;
    uint64_t                  bytes_used = 0; // of what was read
    uint64_t                  wait_ns    = 0;
    uint64_t                  errors     = 0;
};
