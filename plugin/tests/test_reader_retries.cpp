// reader when the system disturbs its reads: interrupted and short ones are continued, others end the job.
//
// This program's own pread stands before libc's; the pread pool is the one that calls it.
#include "check.h"
#include "io/reader.h"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace {

enum disturbance { NONE,
                   INTERRUPTED,
                   BUSY,
                   CANCELED,
                   SHORT,
                   SHORT_WITHIN_SECTOR,
                   END,
                   FAILED };

std::atomic<int>      what{ NONE };
std::atomic<uint32_t> left{ 0 }; // reads still to be disturbed
std::atomic<uint32_t> disturbed{ 0 };

} // namespace

extern "C" ssize_t pread(int fd, void * buf, size_t bytes, off_t offset) {
    int kind = what;
    if (kind != NONE) {
        uint32_t n = left;
        while (n > 0 && !left.compare_exchange_weak(n, n - 1)) {
        }
        if (n == 0) {
            kind = NONE;
        } else {
            disturbed++;
        }
    }
    switch (kind) {
        case INTERRUPTED:
            errno = EINTR;
            return -1;
        case BUSY:
            errno = EAGAIN;
            return -1;
        case CANCELED: // io_uring's word for a read whose thread has ended
            errno = ECANCELED;
            return -1;
        case SHORT:
            bytes = bytes > FLASH_SECTOR ? FLASH_SECTOR : bytes;
            break;
        case SHORT_WITHIN_SECTOR: { // as buffered reads may be
            const ssize_t n = syscall(SYS_pread64, fd, buf, bytes, offset);
            return n > (ssize_t) FLASH_SECTOR + 100 ? (ssize_t) FLASH_SECTOR + 100 : n;
        }
        case END:
            return 0;
        case FAILED:
            errno = EIO;
            return -1;
        default:
            break;
    }
    return syscall(SYS_pread64, fd, buf, bytes, offset);
}

namespace {

constexpr uint64_t N = 300000; // bytes of the file

std::unique_ptr<reader> pool(uint32_t depth, uint32_t threads, uint32_t piece_bytes) {
    llama_flash_params params = {};
    params.io_engine          = LLAMA_FLASH_IO_PREAD;
    params.io_depth           = depth;
    params.io_threads         = threads;
    params.read_bytes         = piece_bytes;
    llama_flash_error err;
    auto              r = reader::create(params, &err);
    CHECK(r, "%s", err.message);
    return r;
}

void a_disturbed_read_ends_as_it_should(const flash_file & file, const std::vector<uint8_t> & contents, uint8_t * base, reader & r, uint32_t piece_bytes,
                                        int kind, uint32_t n) {
    const uint64_t offset = 1000;
    const uint64_t bytes  = N - offset;
    memset(base, 0, N);
    const uint64_t retries = r.retries;
    disturbed              = 0;
    left                   = n;
    what                   = kind;
    r.read(file, offset, bytes, base + offset, n);
    reader::done done;
    CHECK(r.next(done, true) && done.tag == n, "kind %d: the job must end", kind);
    what = NONE;
    CHECK(r.idle() && disturbed > 0, "kind %d: %u reads disturbed", kind, disturbed.load());
    if (kind == END || kind == FAILED) {
        CHECK(done.error == (kind == END ? ENODATA : EIO), "kind %d: error %d", kind, done.error);
        return;
    }
    CHECK(done.error == 0, "kind %d: %s", kind, strerror(done.error));
    CHECK(memcmp(base + offset, contents.data() + offset, bytes) == 0, "kind %d: other bytes than the file's", kind);
    const bool shortened = kind == SHORT || kind == SHORT_WITHIN_SECTOR;
    CHECK(r.retries > retries || (shortened && piece_bytes <= FLASH_SECTOR), "kind %d: nothing was continued", kind);
}

void a_system_that_never_gets_round_to_it_is_given_up(const flash_file & file, uint8_t * base) {
    auto r = pool(0, 0, 0);
    left   = UINT32_MAX;
    what   = BUSY;
    r->read(file, 0, N, base, 0);
    reader::done done;
    CHECK(r->next(done, true) && done.error == EAGAIN, "error %d", done.error);
    what = NONE;
}

} // namespace

int main() {
    std::vector<uint8_t> contents(N);
    random_source        random(1);
    for (auto & byte : contents) {
        byte = (uint8_t) random.below(256);
    }
    const char * folder = getenv("TMPDIR");
    std::string  name   = std::string(folder ? folder : "/tmp") + "/llama-flash-retries-XXXXXX";
    const int    fd     = mkstemp(&name[0]);
    CHECK(fd >= 0, "%s: %s", name.c_str(), strerror(errno));
    unlink(name.c_str());
    CHECK(write(fd, contents.data(), N) == (ssize_t) N, "%s", strerror(errno));

    llama_flash_error err  = {};
    auto              file = flash_file::reopen(fd, &err);
    CHECK(file, "%s", err.message);

    std::vector<uint8_t> memory(N + 3 * FLASH_SECTOR);
    uint8_t *            base = memory.data() + (FLASH_SECTOR - (uintptr_t) memory.data() % FLASH_SECTOR);

    for (uint32_t piece_bytes : { 4096, 65536, 1 << 20 }) {
        auto r = pool(4, 3, piece_bytes);
        for (int kind : { INTERRUPTED, BUSY, CANCELED, SHORT, SHORT_WITHIN_SECTOR, END, FAILED }) {
            for (uint32_t n : { 1u, 5u, 20u }) {
                a_disturbed_read_ends_as_it_should(*file, contents, base, *r, piece_bytes, kind, n);
            }
        }
    }
    a_system_that_never_gets_round_to_it_is_given_up(*file, base);

    close(fd);
    printf("reader, disturbed reads: ok\n");
    return 0;
}
