// weight_loader with each I/O engine on a real file: any range to any address, and what cannot be read is said.
#include "check.h"
#include "io/load.h"
#include "temporary_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <unistd.h>
#include <vector>

namespace {

constexpr uint64_t FILE_BYTES = (21u << 20) + 1234; // more pieces than are in flight; ends within a sector
constexpr uint8_t  GUARD      = 0xa5;

void any_range_to_any_address(weight_loader & loader, const flash_file & file, int fd) {
    random_source random(1);
    for (uint32_t i = 0; i < 60; i++) {
        const uint64_t most   = i % 3 == 0 ? 20u << 20 : i % 3 == 1 ? 2u << 20
                                                                    : 5000;
        const uint64_t offset = random.chance(30) ? flash_sector_floor(random.below(FILE_BYTES)) : random.below(FILE_BYTES);
        const uint64_t bytes  = std::min(1 + random.below(most), FILE_BYTES - offset);
        const size_t   before = 64 + random.below(64);

        std::vector<uint8_t> memory(before + bytes + 64, GUARD);
        std::vector<uint8_t> expected(bytes);
        CHECK(pread(fd, expected.data(), bytes, (off_t) offset) == (ssize_t) bytes, "%s", strerror(errno));
        reader::done failed;
        CHECK(loader.read(file, offset, bytes, memory.data() + before, failed), "%s", strerror(failed.error));
        CHECK(memcmp(memory.data() + before, expected.data(), bytes) == 0, "[%llu, +%llu) differs from the file", (unsigned long long) offset,
              (unsigned long long) bytes);
        CHECK(std::all_of(memory.begin(), memory.begin() + (ptrdiff_t) before, [](uint8_t b) { return b == GUARD; }) &&
                  std::all_of(memory.end() - 64, memory.end(), [](uint8_t b) { return b == GUARD; }),
              "bytes around [%llu, +%llu) were written", (unsigned long long) offset, (unsigned long long) bytes);
    }
}

void a_range_beyond_the_end_fails(weight_loader & loader, const flash_file & file) {
    std::vector<uint8_t> memory(12u << 20);
    for (uint64_t offset : { FILE_BYTES - (11u << 20), FILE_BYTES - 5, FILE_BYTES + 8192 }) {
        reader::done failed = {};
        CHECK(!loader.read(file, offset, memory.size(), memory.data(), failed), "there are no such bytes");
        CHECK(failed.error == ENODATA && failed.error_offset >= flash_sector_floor(FILE_BYTES - 5), "error %d at %llu", failed.error,
              (unsigned long long) failed.error_offset);
    }
    reader::done failed = {};
    CHECK(loader.read(file, 5, 3u << 20, memory.data(), failed), "what failed before is no error of the next");
}

std::unique_ptr<weight_loader> make_loader(llama_flash_io_engine engine, uint32_t piece_bytes) {
    llama_flash_params params = {};
    params.io_engine          = engine;
    params.io_depth           = 3;
    params.read_bytes         = piece_bytes;
    llama_flash_error err     = {};
    auto              loader  = weight_loader::create(params, &err);
    CHECK(loader || (engine == LLAMA_FLASH_IO_URING && err.message[0]), "%s", err.message);
    if (!loader) {
        printf("left out: %s\n", err.message);
    }
    return loader;
}

} // namespace

int main() {
    temporary_file    source(FILE_BYTES);
    llama_flash_error err  = {};
    auto              file = flash_file::reopen(source.fd, &err);
    CHECK(file, "%s", err.message);
    for (llama_flash_io_engine engine : { LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_IO_URING }) {
        for (uint32_t piece_bytes : { 0u, 65536u }) {
            if (auto loader = make_loader(engine, piece_bytes)) {
                any_range_to_any_address(*loader, *file, source.fd);
                a_range_beyond_the_end_fails(*loader, *file);
            }
        }
    }
    return 0;
}
