// What the device gives to reads like those of decoding: same reader, same I/O engines, any chunk size and depth.
#include "llama_flash.h"

#include "base/status.h"
#include "io/reader.h"
#include "memory/mapping.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <random>
#include <unistd.h>
#include <vector>

namespace {

constexpr uint64_t MOST_MEMORY = 32u << 20; // of all destinations: what arrives is not looked at, so reads may share one
constexpr uint32_t MOST_DEPTH  = 4096;

using steady = std::chrono::steady_clock;

struct descriptor {
    int fd;
    ~descriptor() {
        if (fd >= 0) {
            close(fd);
        }
    }
};

uint64_t ns_since(steady::time_point start) {
    return (uint64_t) std::chrono::duration_cast<std::chrono::nanoseconds>(steady::now() - start).count();
}

int32_t fail_read(llama_flash_error * err, const char * path, int32_t error, uint64_t offset, uint64_t size) {
    flash_fail(err, LLAMA_FLASH_E_READ, "cannot read %s: %s", path, why_failed(error).c_str());
    if (err) {
        err->sys_errno = error;
        err->offset    = offset;
        err->size      = size;
        strncpy(err->file, path, sizeof(err->file) - 1);
    }
    return LLAMA_FLASH_E_READ;
}

std::unique_ptr<flash_file> open_for_reads(const char * path, uint32_t chunk, llama_flash_error * err) {
    descriptor opened = { open(path, O_RDONLY | O_CLOEXEC) };
    if (opened.fd < 0) {
        fail_read(err, path, errno, 0, chunk);
        return nullptr;
    }
    return flash_file::reopen(opened.fd, err);
}

void note_latencies(std::vector<uint64_t> & latencies, llama_flash_probe & out) {
    for (uint64_t ns : latencies) {
        out.latency_ns += ns;
    }
    out.latency_ns /= out.reads;
    auto p99 = latencies.begin() + (ptrdiff_t) ((out.reads - 1) * 99 / 100);
    std::nth_element(latencies.begin(), p99, latencies.end());
    out.latency_p99_ns = *p99;
}

// the reads to be made
struct random_reads {
    uint32_t chunk;    // bytes of each
    uint32_t depth;    // under way at once
    uint64_t n_chunks; // of the file
    uint64_t n_places; // chunks that `memory` holds

    uint8_t * memory;
};

// Makes them until duration_ns have passed and none is under way. false: one has failed, `done` says how.
bool keep_reading(reader & reads, const flash_file & file, const random_reads & r, uint64_t duration_ns, llama_flash_probe & out, reader::done & done) {
    std::mt19937_64                 random(r.chunk ^ ((uint64_t) r.depth << 32));
    std::vector<steady::time_point> begun(r.depth);
    std::vector<uint64_t>           latencies;

    uint32_t under_way = 0;
    auto     ask       = [&](uint32_t tag) {
        begun[tag] = steady::now();
        reads.read(file, random() % r.n_chunks * r.chunk, r.chunk, r.memory + tag % r.n_places * r.chunk, tag);
        out.in_flight = std::max(out.in_flight, ++under_way);
    };
    const auto start = steady::now();
    for (uint32_t tag = 0; tag < r.depth; tag++) {
        ask(tag);
    }
    while (reads.next(done, true)) {
        under_way--;
        if (done.error != 0) {
            return false;
        }
        out.bytes += r.chunk;
        latencies.push_back(ns_since(begun[done.tag]));
        if (ns_since(start) < duration_ns) {
            ask(done.tag);
        }
    }
    out.ns    = ns_since(start);
    out.reads = latencies.size();
    note_latencies(latencies, out);
    return true;
}

int32_t probe(const char * path, uint32_t chunk, uint32_t duration_ms, llama_flash_params params, llama_flash_probe & out, llama_flash_error * err) {
    params.io_depth   = params.io_depth ? params.io_depth : 32;
    params.read_bytes = chunk;
    if (chunk == 0 || chunk % FLASH_SECTOR != 0 || chunk > 1u << 30 || params.io_depth > MOST_DEPTH) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "probe_reads: a chunk of %u bytes (expected a multiple of %u up to 1 GiB), or %u reads in flight (at most %u)",
                          chunk, (uint32_t) FLASH_SECTOR, params.io_depth, MOST_DEPTH);
    }
    auto file = open_for_reads(path, chunk, err);
    if (!file) {
        return LLAMA_FLASH_E_READ;
    }
    random_reads r = { chunk, params.io_depth, file->size / chunk, 0, nullptr };
    if (r.n_chunks == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "probe_reads: %s has %llu bytes, fewer than one chunk of %u", path, (unsigned long long) file->size, chunk);
    }
    r.n_places = std::min<uint64_t>(r.depth, std::max<uint64_t>(1, MOST_MEMORY / chunk));

    // as slots and rings are: a large read into small pages would be split by what a request may list
    const mapping memory = mapping::allocate(r.n_places * chunk);
    if (!memory.data) {
        return flash_fail(err, LLAMA_FLASH_E_MEMORY, "probe_reads: no memory for %llu chunks%s", (unsigned long long) r.n_places,
                          limits_of(ENOMEM).c_str());
    }
    memset(memory.data, 0, r.n_places * chunk); // page faults are not the device's
    r.memory   = memory.data;
    auto reads = reader::create(params, err); // destroyed before the memory it reads to
    if (!reads) {
        return LLAMA_FLASH_E_INVALID;
    }
    reader::done done;
    if (!keep_reading(*reads, *file, r, (uint64_t) duration_ms * 1000000, out, done)) {
        return fail_read(err, path, done.error, done.error_offset, chunk);
    }
    out.direct    = file->direct;
    out.io_engine = reads->engine_kind();
    return LLAMA_FLASH_OK;
}

} // namespace

int32_t llama_flash_probe_reads(const char * path, uint32_t chunk, uint32_t duration_ms, const llama_flash_params * params, llama_flash_probe * out,
                                llama_flash_error * err) {
    if (!path || !out) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "probe_reads: no path or no result");
    }
    *out = {};
    return guarded(err, [&] { return probe(path, chunk, duration_ms, params ? *params : llama_flash_params{}, *out, err); });
}
