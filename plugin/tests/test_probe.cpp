// llama_flash_probe_reads with each I/O engine: every chunk is counted, as many are in flight as asked for, errors are said.
#include "check.h"
#include "llama_flash.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>
#include <vector>

namespace {

constexpr uint32_t KIB = 1u << 10;

bool works(llama_flash_io_engine engine, const char * path) {
    llama_flash_params params = {};
    llama_flash_probe  probe  = {};
    params.io_engine          = engine;
    return llama_flash_probe_reads(path, 4096, 1, &params, &probe, nullptr) == LLAMA_FLASH_OK;
}

void check_counts(llama_flash_io_engine engine, const char * path) {
    for (uint32_t chunk : { 4 * KIB, 64 * KIB, 1024 * KIB }) {
        for (uint32_t depth : { 1u, 3u, 32u }) {
            llama_flash_params params = {};
            llama_flash_probe  probe  = {};
            llama_flash_error  err    = {};
            params.io_engine          = engine;
            params.io_depth           = depth;
            CHECK(llama_flash_probe_reads(path, chunk, 5, &params, &probe, &err) == LLAMA_FLASH_OK, "%s", err.message);
            CHECK(probe.reads >= depth && probe.bytes == probe.reads * chunk, "%llu reads, %llu bytes", (unsigned long long) probe.reads,
                  (unsigned long long) probe.bytes);
            CHECK(probe.in_flight == depth, "%u of %u in flight", probe.in_flight, depth);
            CHECK(probe.io_engine == (uint32_t) engine, "engine %u", probe.io_engine);
            CHECK(probe.latency_ns > 0 && probe.latency_ns <= probe.ns && probe.latency_p99_ns <= probe.ns, "latency %llu, p99 %llu of %llu ns",
                  (unsigned long long) probe.latency_ns, (unsigned long long) probe.latency_p99_ns, (unsigned long long) probe.ns);
        }
    }
}

void check_errors(const char * path, const char * folder) {
    llama_flash_params params = {};
    llama_flash_probe  probe  = {};
    llama_flash_error  err    = {};
    CHECK(llama_flash_probe_reads("/no/such/file", 4096, 1, nullptr, &probe, &err) == LLAMA_FLASH_E_READ && err.sys_errno == ENOENT, "%s", err.message);
    CHECK(strcmp(err.file, "/no/such/file") == 0, "%s", err.file);
    CHECK(llama_flash_probe_reads(folder, 4096, 1, nullptr, &probe, &err) == LLAMA_FLASH_E_READ && err.sys_errno == EISDIR, "%s", err.message);
    CHECK(llama_flash_probe_reads(path, 1000, 1, nullptr, &probe, &err) == LLAMA_FLASH_E_INVALID, "%s", err.message);
    CHECK(llama_flash_probe_reads(path, 0, 1, nullptr, &probe, &err) == LLAMA_FLASH_E_INVALID, "%s", err.message);
    CHECK(llama_flash_probe_reads(path, 1u << 30, 1, nullptr, &probe, &err) == LLAMA_FLASH_E_INVALID, "%s", err.message);
    params.io_depth = 1u << 20;
    CHECK(llama_flash_probe_reads(path, 4096, 1, &params, &probe, &err) == LLAMA_FLASH_E_INVALID, "%s", err.message);
    CHECK(llama_flash_probe_reads(nullptr, 4096, 1, nullptr, &probe, nullptr) == LLAMA_FLASH_E_INVALID, "a path is needed");
    CHECK(llama_flash_probe_reads(path, 4096, 1, nullptr, nullptr, nullptr) == LLAMA_FLASH_E_INVALID, "a place for the result is needed");
}

} // namespace

int main() {
    const char * folder = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    std::string  name   = std::string(folder) + "/llama-flash-probe-XXXXXX";
    const int    fd     = mkstemp(&name[0]);
    CHECK(fd >= 0, "%s: %s", name.c_str(), strerror(errno));
    unlink(name.c_str());
    const std::vector<uint8_t> data((3u << 20) + 1234, 0x5a); // its end is in no chunk
    CHECK(write(fd, data.data(), data.size()) == (ssize_t) data.size(), "%s", strerror(errno));
    const std::string path = "/proc/self/fd/" + std::to_string(fd);

    CHECK(works(LLAMA_FLASH_IO_PREAD, path.c_str()), "the pool of threads works everywhere");
    for (auto engine : { LLAMA_FLASH_IO_URING, LLAMA_FLASH_IO_PREAD }) {
        if (works(engine, path.c_str())) {
            check_counts(engine, path.c_str());
        }
    }
    check_errors(path.c_str(), folder);
    close(fd);
    return 0;
}
