// reader with each I/O engine on a real file: what arrives is what pread gives, nothing around it is touched, errors are said.
#include "check.h"
#include "io/reader.h"
#include "temporary_file.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

constexpr uint64_t FILE_BYTES = (3u << 20) + 1234; // ends within a sector
constexpr uint8_t  GUARD      = 0xa5;

// memory congruent with [offset, offset + bytes) of a file, a guarded sector on either side
class destination {
  public:
    destination(uint64_t offset_, uint64_t bytes_) : offset(offset_), bytes(bytes_) {
        span   = flash_sector_ceil(offset + bytes) - flash_sector_floor(offset);
        memory = (uint8_t *) aligned_alloc(FLASH_SECTOR, span + 2 * FLASH_SECTOR);
        CHECK(memory, "no memory");
        memset(memory, GUARD, span + 2 * FLASH_SECTOR);
    }

    ~destination() { free(memory); }

    destination(const destination &)             = delete;
    destination & operator=(const destination &) = delete;

    uint8_t * data() const { return memory + FLASH_SECTOR + offset % FLASH_SECTOR; }

    void check_guards() const {
        for (uint64_t i = 0; i < FLASH_SECTOR; i++) {
            CHECK(memory[i] == GUARD, "byte %llu before the sectors of [%llu, +%llu) was written", (unsigned long long) (FLASH_SECTOR - i),
                  (unsigned long long) offset, (unsigned long long) bytes);
            CHECK(memory[FLASH_SECTOR + span + i] == GUARD, "byte %llu after the sectors of [%llu, +%llu) was written",
                  (unsigned long long) i, (unsigned long long) offset, (unsigned long long) bytes);
        }
    }

    void check_bytes(int fd) const {
        std::vector<uint8_t> expected(bytes);
        CHECK(pread(fd, expected.data(), bytes, (off_t) offset) == (ssize_t) bytes, "%s", strerror(errno));
        CHECK(memcmp(expected.data(), data(), bytes) == 0, "[%llu, +%llu) differs from the file", (unsigned long long) offset,
              (unsigned long long) bytes);
        check_guards();
    }

    const uint64_t offset;
    const uint64_t bytes;

  private:
    uint64_t  span;
    uint8_t * memory;
};

std::unique_ptr<flash_file> reopen(int fd) {
    llama_flash_error err  = {};
    auto              file = flash_file::reopen(fd, &err);
    CHECK(file, "%s", err.message);
    return file;
}

std::unique_ptr<reader> make_reader(llama_flash_io_engine engine, uint32_t depth, uint32_t threads, uint32_t piece_bytes) {
    llama_flash_params params = {};
    params.io_engine          = engine;
    params.io_depth           = depth;
    params.io_threads         = threads;
    params.read_bytes         = piece_bytes;
    llama_flash_error err     = {};
    auto              r       = reader::create(params, &err);
    CHECK(r, "%s", err.message);
    CHECK(r->engine_kind() == engine, "engine %d, asked for %d", r->engine_kind(), engine);
    return r;
}

void random_reads_give_the_files_bytes(llama_flash_io_engine engine, uint32_t depth, uint32_t piece_bytes, uint64_t seed) {
    random_source  random(seed);
    temporary_file source(FILE_BYTES);
    auto           file = reopen(source.fd);
    CHECK(file->size == FILE_BYTES, "%llu bytes", (unsigned long long) file->size);
    auto r = make_reader(engine, depth, 3, piece_bytes);

    for (int round = 0; round < 3; round++) {
        std::vector<std::unique_ptr<destination>> wanted;
        for (int i = 0; i < 100; i++) {
            const uint64_t most   = random.chance(20) ? 400000 : 20000;
            uint64_t       offset = random.below(FILE_BYTES);
            uint64_t       bytes  = 1 + random.below(most);
            switch (random.below(4)) {
                case 0: // whole sectors
                    offset = flash_sector_floor(offset);
                    bytes  = flash_sector_ceil(bytes);
                    break;
                case 1: // the end of the file
                    offset = FILE_BYTES - std::min(bytes, FILE_BYTES);
                    break;
                default:
                    break;
            }
            bytes = std::min(bytes, FILE_BYTES - offset);
            wanted.push_back(std::make_unique<destination>(offset, bytes));
            r->read(*file, offset, bytes, wanted.back()->data(), (uint32_t) i);
            if (random.chance(20)) {
                r->submit();
            }
        }
        r->submit();

        std::vector<int> ended(wanted.size(), 0);
        size_t           n_ended = 0;
        while (n_ended < wanted.size()) {
            reader::done done;
            const bool   wait = random.chance(50);
            if (!r->next(done, wait)) {
                CHECK(!wait, "%zu of %zu jobs ended, but none is under way", n_ended, wanted.size());
                continue;
            }
            CHECK(done.error == 0, "%s", strerror(done.error));
            CHECK(done.file == file.get() && done.tag < wanted.size() && ended[done.tag]++ == 0, "tag %u", done.tag);
            wanted[done.tag]->check_bytes(source.fd);
            n_ended++;
        }
        CHECK(r->idle(), "all jobs have ended");
        reader::done none;
        CHECK(!r->next(none, true) && !r->next(none, false), "a job that nobody asked for");
        for (const auto & d : wanted) {
            d->check_bytes(source.fd); // nor has a later read written where it should not
        }
    }
    CHECK(r->bytes % FLASH_SECTOR == 0 && r->reads >= 300, "%llu bytes in %llu reads", (unsigned long long) r->bytes,
          (unsigned long long) r->reads);
}

void reads_beyond_the_end_fail_alone(llama_flash_io_engine engine) {
    temporary_file source(FILE_BYTES);
    auto           file = reopen(source.fd);
    auto           r    = make_reader(engine, 4, 2, FLASH_SECTOR);

    struct request {
        uint64_t offset;
        uint64_t bytes;
        bool     good;
    };

    const request requests[] = {
        { 0, 10000, true },
        { FILE_BYTES - 5000, 5000, true },
        { FILE_BYTES - 5000, 5001, false }, // one byte too many
        { FILE_BYTES - 3, 50000, false },
        { FILE_BYTES, 1, false },                       // in the last sector, of which a part exists
        { flash_sector_ceil(FILE_BYTES), 4096, false }, // no byte of it exists
        { FILE_BYTES + (1u << 30), 123, false },
        { 8191, 2, true },
    };
    constexpr uint32_t n = sizeof(requests) / sizeof(requests[0]);
    for (int round = 0; round < 5; round++) {
        std::vector<std::unique_ptr<destination>> wanted;
        for (uint32_t i = 0; i < n; i++) {
            wanted.push_back(std::make_unique<destination>(requests[i].offset, requests[i].bytes));
            r->read(*file, requests[i].offset, requests[i].bytes, wanted[i]->data(), i);
        }
        uint32_t     n_ended = 0;
        reader::done done;
        while (r->next(done, true)) {
            const request & q = requests[done.tag];
            n_ended++;
            if (q.good) {
                CHECK(done.error == 0, "[%llu, +%llu): %s", (unsigned long long) q.offset, (unsigned long long) q.bytes, strerror(done.error));
                wanted[done.tag]->check_bytes(source.fd);
            } else {
                CHECK(done.error == ENODATA, "[%llu, +%llu): error %d", (unsigned long long) q.offset, (unsigned long long) q.bytes, done.error);
                CHECK(done.error_offset >= flash_sector_floor(q.offset) && done.error_offset < q.offset + q.bytes,
                      "error at %llu, asked for [%llu, +%llu)", (unsigned long long) done.error_offset, (unsigned long long) q.offset,
                      (unsigned long long) q.bytes);
                wanted[done.tag]->check_guards();
            }
        }
        CHECK(n_ended == n && r->idle(), "%u of %u jobs ended", n_ended, n);
    }
}

void an_error_of_the_system_is_passed_on(llama_flash_io_engine engine) {
    const int folder = open(".", O_RDONLY | O_DIRECTORY);
    CHECK(folder >= 0, "%s", strerror(errno));
    auto file = reopen(folder);
    close(folder);
    auto        r = make_reader(engine, 8, 2, 1u << 16);
    destination d(5, 100000);
    r->read(*file, d.offset, d.bytes, d.data(), 7);
    reader::done done;
    CHECK(r->next(done, true), "the job must end");
    CHECK(done.tag == 7 && done.error != 0 && done.error != ENODATA && done.file == file.get(), "tag %u, error %d", done.tag, done.error);
    CHECK(!r->next(done, true), "one job, however many of its pieces fail");
}

void an_abandoned_reader_waits_for_the_device(llama_flash_io_engine engine) {
    temporary_file source(FILE_BYTES);
    auto           file = reopen(source.fd);
    for (int round = 0; round < 10; round++) {
        destination d(100, FILE_BYTES - 100);
        auto        r = make_reader(engine, 8, 4, 1u << 16);
        r->read(*file, d.offset, d.bytes, d.data(), 0);
        if (round % 2) {
            r->submit();
        }
        r.reset(); // before d is freed
        d.check_guards();
    }
}

// io_uring cancels what a thread has asked for when the thread ends
void reads_outlive_the_thread_that_asked_for_them(llama_flash_io_engine engine) {
    temporary_file source(FILE_BYTES);
    auto           file = reopen(source.fd);
    auto           r    = make_reader(engine, 32, 2, 1u << 16);
    for (uint32_t round = 0; round < 20; round++) {
        destination d(4000, FILE_BYTES - 4000);
        std::thread([&] {
            r->read(*file, d.offset, d.bytes, d.data(), round);
            r->submit();
        }).join();
        reader::done done;
        CHECK(r->next(done, true) && done.tag == round && done.error == 0, "round %u: %s", round, strerror(done.error));
        d.check_bytes(source.fd);
    }
}

void a_changed_file_is_noticed() {
    temporary_file source(FILE_BYTES);
    auto           file = reopen(source.fd);
    CHECK(file->look() == file_state::same, "nothing happened to it");
    struct stat st;
    fstat(source.fd, &st);
    usleep(20000); // times are as coarse as the kernel's ticks
    CHECK(fchmod(source.fd, 0400) == 0 && file->look() == file_state::touched && file->look() == file_state::touched, "another mode");
    usleep(20000);
    const timespec same[2] = { st.st_atim, st.st_mtim };
    CHECK(futimens(source.fd, same) == 0 && file->look() == file_state::doubtful, "times were put back, nobody knows after what");
    usleep(20000);
    CHECK(fchmod(source.fd, 0600) == 0 && file->look() == file_state::doubtful, "another mode makes nothing certain again");
    const timespec other[2] = { st.st_atim, { st.st_mtim.tv_sec - 1, 0 } };
    CHECK(futimens(source.fd, other) == 0 && file->look() == file_state::changed, "another time stamp");
    CHECK(futimens(source.fd, same) == 0 && file->look() == file_state::doubtful, "as it was, as far as one can see");
    CHECK(ftruncate(source.fd, FILE_BYTES - 1) == 0 && futimens(source.fd, same) == 0 && file->look() == file_state::changed, "a byte less");
}

bool available(llama_flash_io_engine engine) {
    llama_flash_params params = {};
    params.io_engine          = engine;
    llama_flash_error err     = {};
    if (reader::create(params, &err)) {
        return true;
    }
    CHECK(err.code == LLAMA_FLASH_E_INVALID && err.message[0], "an I/O engine that is missing must say why");
    printf("left out: %s\n", err.message);
    return false;
}

} // namespace

// a queue deeper than the kernel allows: io_uring then fails as where it is forbidden or not built in
void an_engine_that_cannot_be_had_is_an_error() {
    llama_flash_params params = {};
    llama_flash_error  err    = {};
    params.io_depth           = 1u << 20;
    params.io_engine          = LLAMA_FLASH_IO_URING;
    CHECK(!reader::create(params, &err) && err.code == LLAMA_FLASH_E_INVALID && strstr(err.message, "io_uring"), "%s", err.message);
    CHECK(!reader::create(params, nullptr), "without a place for the error");

    params.io_engine = LLAMA_FLASH_IO_AUTO;
    auto r           = reader::create(params, &err);
    CHECK(r && r->engine_kind() == LLAMA_FLASH_IO_PREAD, "auto takes the pread pool instead");
}

int main() {
    a_changed_file_is_noticed();
    an_engine_that_cannot_be_had_is_an_error();
    for (llama_flash_io_engine engine : { LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_IO_URING }) {
        if (!available(engine)) {
            continue;
        }
        uint64_t seed = 0;
        for (uint32_t depth : { 1, 3, 32 }) {
            for (uint32_t piece_bytes : { 1, 4096, 12288, 1 << 18 }) {
                random_reads_give_the_files_bytes(engine, depth, piece_bytes, seed++);
            }
        }
        reads_beyond_the_end_fail_alone(engine);
        an_error_of_the_system_is_passed_on(engine);
        an_abandoned_reader_waits_for_the_device(engine);
        reads_outlive_the_thread_that_asked_for_them(engine);
        printf("reader, %s: ok\n", engine == LLAMA_FLASH_IO_PREAD ? "pread" : "io_uring");
    }
    CHECK(available(LLAMA_FLASH_IO_AUTO), "the pread pool is always there");
    return 0;
}
