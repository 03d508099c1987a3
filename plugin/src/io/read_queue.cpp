#include "io/read_queue.h"

#include "base/status.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

bool read_queue::open(const llama_flash_params & params, llama_flash_error * err) {
    reads = reader::create(params, err);
    if (reads) {
        reads->report_to(watch);
    }
    return reads != nullptr;
}

bool read_queue::settle(bool wait) {
    done.clear();
    for (reader::done one; reads->next(one, wait && done.empty());) {
        done.push_back(one);
    }
    const flash_file * looked = nullptr; // after all of its reads had ended
    file_state         state  = file_state::same;
    for (reader::done & one : done) {
        if (one.file != looked) {
            looked = one.file;
            state  = looked->look();
        }
        if (one.error == 0 && state == file_state::changed) {
            one.error = ESTALE;
            changed   = true;
        }
        one.owner->ended(one.tag, one, state);
    }
    bytes_read = reads->bytes;
    n_reads    = reads->reads;
    retries    = reads->retries;
    return !done.empty() || !reads->idle();
}

bool read_queue::check_file(const flash_file & file, const std::string & tensor, uint64_t offset, uint64_t size) {
    if (&file == checked) {
        return true;
    }
    if (file.look() != file_state::changed) { // if it only may have changed, bytes are checked when they have arrived
        checked = &file;
        return true;
    }
    changed = true;
    fail_read(file, tensor, ESTALE, offset, size);
    return false;
}

void read_queue::fail(const llama_flash_error & e) {
    errors++;
    if (!has_failed) {
        refuse(e);
    }
}

void read_queue::refuse(const llama_flash_error & e) {
    first = e;
    has_failed.store(true, std::memory_order_release);
}

void read_queue::fail_op(int32_t code, const std::string & tensor, const char * what) {
    llama_flash_error e;
    flash_fail(&e, code, "tensor %s: %s", tensor.c_str(), what);
    snprintf(e.tensor, sizeof(e.tensor), "%s", tensor.c_str());
    fail(e);
}

void read_queue::fail_read(const flash_file & file, const std::string & tensor, int32_t sys_errno, uint64_t offset, uint64_t size, const char * why) {
    llama_flash_error e;
    flash_fail(&e, LLAMA_FLASH_E_READ, "cannot read tensor %s from %s at offset %llu (%llu bytes): %s", tensor.c_str(), file.path.c_str(),
               (unsigned long long) offset, (unsigned long long) size, why);
    e.sys_errno = sys_errno;
    e.offset    = offset;
    e.size      = size;
    snprintf(e.file, sizeof(e.file), "%s", file.path.c_str());
    snprintf(e.tensor, sizeof(e.tensor), "%s", tensor.c_str());
    fail(e);
}

// of a read that has ended with this error; ESTALE: its bytes are not to be used
static const char * why_not_read(int32_t error) {
    switch (error) {
        case ENODATA: return "the file ends before it";
        case ESTALE:  return "the file changed since it was loaded: load the model again";
        default:      return strerror(error);
    }
}

void read_queue::fail_read(const flash_file & file, const std::string & tensor, int32_t sys_errno, uint64_t offset, uint64_t size) {
    fail_read(file, tensor, sys_errno, offset, size, why_not_read(sys_errno));
}

void read_queue::fail_bytes(const flash_file & file, const std::string & tensor, uint64_t offset, uint64_t size, uint32_t known) {
    changed = true;
    fail_read(file, tensor, ESTALE, offset, size,
              known ? "the file changed since it was loaded, though its modification time was put back: load the model again"
                    : "the file may have changed since it was loaded (its status time did, its modification time did not), and these bytes were "
                      "not read before: load the model again");
}

void read_queue::tell(llama_flash_stats & stats) const {
    stats.bytes_read = bytes_read;
    stats.bytes_used = bytes_used;
    stats.reads      = n_reads;
    stats.retries    = retries;
    stats.wait_ns    = wait_ns;
    stats.errors     = errors;
    stats.io_engine  = reads->engine_kind();
}
