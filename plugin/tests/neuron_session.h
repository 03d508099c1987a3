// What the programs on neurons share: files of random bytes, and a session of three layers of bundles on them.
#pragma once

#include "check.h"
#include "session.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

constexpr uint32_t N_LAYERS = 3;
constexpr uint32_t N_EMBD   = 80;
constexpr uint32_t N_FF     = 700; // of all experts; no multiple of a run

struct layout {
    bool     split;
    bool     gated;
    uint32_t n_expert = 0;
};

// a file of random bytes whose tail can be taken away and put back as it was
class shard {
  public:
    shard(uint64_t bytes, uint64_t seed) : data(bytes) {
        const char * folder = getenv("TMPDIR");
        std::string  name   = std::string(folder ? folder : "/tmp") + "/llama-flash-neurons-XXXXXX";
        fd                  = mkstemp(&name[0]);
        CHECK(fd >= 0, "%s: %s", name.c_str(), strerror(errno));
        unlink(name.c_str());
        random_source random(seed);
        for (auto & byte : data) {
            byte = (uint8_t) random.below(256);
        }
        CHECK(write(fd, data.data(), data.size()) == (ssize_t) bytes, "%s", strerror(errno));
        CHECK(fstat(fd, &as_written) == 0, "%s", strerror(errno));
    }

    ~shard() { close(fd); }

    shard(const shard &)             = delete;
    shard & operator=(const shard &) = delete;

    void cut(uint64_t bytes) { CHECK(ftruncate(fd, (off_t) bytes) == 0, "%s", strerror(errno)); }

    void mend() {
        CHECK(pwrite(fd, data.data(), data.size(), 0) == (ssize_t) data.size(), "%s", strerror(errno));
        CHECK(fsync(fd) == 0, "%s", strerror(errno));
        const struct timespec times[2] = { as_written.st_atim, as_written.st_mtim };
        CHECK(futimens(fd, times) == 0, "%s", strerror(errno));
    }

    std::vector<uint8_t> data;
    int                  fd;
    struct stat          as_written;
};

class store {
  public:
    store(layout how_, uint32_t io_engine, uint32_t mode, uint32_t window, double share, uint64_t seed) : how(how_) {
        const uint64_t row    = N_EMBD * sizeof(float);
        const uint64_t record = (how.gated ? 3 : 2) * row;
        for (uint32_t k = 0; k < 2; k++) { // the last layer is in another shard
            shards.push_back(std::make_unique<shard>(5000 + N_LAYERS * (N_FF * record + 96), seed + k));
        }
        llama_flash_error  err;
        llama_flash_params params = {};
        params.io_engine          = io_engine;
        params.read_bytes         = 16384;
        s                         = llama_flash_session::create(params, &err);
        CHECK(s, "%s", err.message);
        weights.resize(N_LAYERS * FFN_PARTS);
        for (uint32_t il = 0; il < N_LAYERS; il++) {
            llama_flash_bundle b = {};
            b.layer              = (int32_t) (2 * il + 1); // layers between have none
            b.n_ff               = N_FF / std::max(1u, how.n_expert);
            b.n_expert           = how.n_expert;
            b.n_expert_used      = how.n_expert;
            b.n_embd             = N_EMBD;
            b.split              = how.split;
            b.record_bytes       = record;
            b.gate               = { how.gated ? GGML_TYPE_F32 : -1, 0, 0 };
            b.up                 = { GGML_TYPE_F32, 0, how.gated ? row : 0 };
            b.down               = { GGML_TYPE_F32, 0, record - row };
            CHECK(s->add_bundle(b, &err) == LLAMA_FLASH_OK, "%s", err.message);
            CHECK(s->add_bundle(b, &err) == LLAMA_FLASH_E_INVALID, "the same layer twice");
        }
        const char * names[] = { "gate", "up", "down" };
        for (uint32_t il = 0; il < N_LAYERS; il++) {
            for (size_t p = how.gated ? 0 : 1; p < FFN_PARTS; p++) {
                ggml_tensor & w = weights[il * FFN_PARTS + p];
                w               = {};
                w.type          = GGML_TYPE_F32;
                w.ne[2]         = std::max(1u, how.n_expert);
                w.ne[0]         = p == 2 ? N_FF / w.ne[2] : N_EMBD;
                w.ne[1]         = p == 2 ? N_EMBD : N_FF / w.ne[2];
                w.ne[3]         = 1;
                w.nb[0]         = sizeof(float);
                for (int d = 1; d < 4; d++) {
                    w.nb[d] = w.nb[d - 1] * (size_t) w.ne[d - 1];
                }
                w.data = &w; // an address of its own
                snprintf(w.name, sizeof(w.name), "blk.%u.ffn_%s%s.weight", 2 * il + 1, names[p], how.n_expert ? "_exps" : "");
                CHECK(s->bind(&w, shard_of(il).fd, offset_of(il)), "%s", w.name);
            }
        }
        CHECK(s->end_binding(&err) == LLAMA_FLASH_OK, "%s", err.message);
        llama_flash_neuron_params neurons = { mode, window, 32, 300, 1, 0 };
        CHECK(s->set_neurons(neurons, &err) == LLAMA_FLASH_OK, "%s", err.message);
        give(0.0);
        random_source random(seed);
        s->begin_op("all is read once: what is put back can then be told from what was changed");
        for (uint32_t il = 0; il < N_LAYERS; il++) {
            s->neurons.stream_begin(s->bundles[il], s->bundles[il].n_pinned, FFN_RUN_ROWS, false);
            CHECK(pass(il, s->bundles[il].n_pinned, s->bundles[il].n_neurons, false, random), "%s", s->reads.error().message);
        }
        s->end_op();
        give(share);
    }

    ~store() { s->unref(); }

    store(const store &)             = delete;
    store & operator=(const store &) = delete;

    void give(double share) {
        llama_flash_error              err;
        const llama_flash_requirements needs = s->requirements();
        const uint64_t                 bytes = needs.min_memory + (uint64_t) (share * (double) needs.neuron_bytes);
        CHECK(s->set_memory(bytes, &err) == LLAMA_FLASH_OK, "%s", err.message);
        const llama_flash_memory & m = s->memory;
        CHECK(m.slots + m.pinned + m.stream + m.bookkeeping + m.resident <= bytes, "%llu of %llu bytes given",
              (unsigned long long) (m.slots + m.pinned + m.stream + m.bookkeeping + m.resident), (unsigned long long) bytes);
    }

    shard &  shard_of(uint32_t il) { return *shards[il + 1 == N_LAYERS]; }
    uint64_t offset_of(uint32_t il) const { return 4096 + 32 * (il + 1) + il * N_FF * (how.gated ? 3 : 2) * N_EMBD * sizeof(float); }

    const uint8_t * in_file(uint32_t il, ffn_part p, uint32_t i) {
        return s->bundles[il].in_bundle(shard_of(il).data.data() + offset_of(il), p, i);
    }

    void land() {
        if (s->neurons.begin_landing()) {
            s->neurons.land([&](const flash_bundle & b, uint32_t i, const uint8_t * slot, const bundle_stream * stream) {
                CHECK(i < b.n_neurons && slot && stream->bytes > 0, "neuron %u", i);
            });
            s->neurons.end_landing();
        }
    }

    // what is found is the file's
    uint32_t check(uint32_t il, uint32_t i) {
        const flash_bundle & b    = s->bundles[il];
        const uint8_t *      data = s->neurons.find(b, i);
        for (size_t p = 0; data && p < FFN_PARTS; p++) {
            const bundle_part & part = b.parts[p];
            CHECK(!part.cached || memcmp(data + part.slot_offset, in_file(il, (ffn_part) p, i), part.row_bytes) == 0, "layer %u neuron %u part %zu", il, i, p);
        }
        return data != nullptr;
    }

    uint32_t check_all() {
        uint32_t there = 0;
        for (uint32_t il = 0; il < N_LAYERS; il++) {
            for (uint32_t i = 0; i < N_FF; i++) {
                there += check(il, i);
            }
        }
        return there;
    }

    // one evaluation; false: a read failed
    bool demand(uint32_t il, const std::vector<uint32_t> & list, uint32_t n_tokens, bool unseen = false) {
        flash_bundle & b = s->bundles[il];
        b.active         = list;
        s->clock.advance(b.tokens, n_tokens);
        s->reads.count_as_checked(unseen ? b.file : nullptr); // a change that comes between the check and the reads
        s->neurons.use(b, n_tokens);
        s->neurons.demand(b, list.data(), list.size(), true);
        for (;;) {
            size_t left = 0;
            for (uint32_t i : list) {
                left += s->neurons.find(b, i) == nullptr;
            }
            if (left == 0 || s->failed()) {
                break;
            }
            CHECK(s->neurons.under_way(), "%zu neurons that nobody reads", left);
            s->neurons.pump();
            s->reads.settle(true);
            land();
        }
        return !s->failed();
    }

    // one pass over a layer, or over some of its experts; false: a read failed
    bool pass(uint32_t il, bool ahead, bool keep, random_source & random) {
        flash_bundle & b = s->bundles[il];
        if (how.n_expert == 0) {
            s->neurons.stream_begin(b, b.n_pinned, FFN_RUN_ROWS, ahead);
            return pass(il, b.n_pinned, b.n_neurons, keep, random);
        }
        experts.clear();
        while (experts.empty()) {
            for (uint32_t e = 0; e < how.n_expert; e++) {
                if (random.chance(50)) {
                    experts.push_back(e);
                }
            }
        }
        s->neurons.stream_experts(b, experts, FFN_RUN_ROWS);
        for (uint32_t e : experts) {
            if (!pass(il, e * b.n_ff, (e + 1) * b.n_ff, keep, random)) {
                return false;
            }
        }
        return true;
    }

    bool pass(uint32_t il, uint32_t first, uint32_t end, bool keep, random_source & random) {
        flash_bundle & b = s->bundles[il];
        for (uint32_t done = first; done < end;) {
            const neuron_store::run * run = s->neurons.stream_next();
            if (!run) {
                CHECK(s->failed(), "layer %u: no run", il);
                return false;
            }
            s->neurons.check_run(0, run->count);
            if (!s->neurons.is_run_sound()) {
                return false;
            }
            CHECK(run->first == done && run->count > 0 && done + run->count <= end, "layer %u: run [%u, +%u), expected from %u", il, run->first, run->count, done);
            for (uint32_t k = 0; k < run->count; k++) {
                for (size_t p = 0; p < FFN_PARTS; p++) {
                    if (b.parts[p].cached) {
                        CHECK(memcmp(run->data[p] + k * run->stride[p], in_file(il, (ffn_part) p, done + k), b.parts[p].row_bytes) == 0,
                              "layer %u, row %u, part %zu", il, done + k, p);
                    }
                }
            }
            if (keep) {
                std::vector<uint32_t> uses(FFN_RUN_ROWS);
                for (auto & n : uses) {
                    n = (uint32_t) random.below(20);
                }
                s->neurons.keep(b, *run, uses.data(), s->neurons.share_of(run->first, run->count), 20, b.tokens);
            }
            done += run->count;
            s->neurons.stream_release();
        }
        return true;
    }

    layout                              how;
    std::vector<std::unique_ptr<shard>> shards;
    std::vector<ggml_tensor>            weights;
    std::vector<uint32_t>               experts; // that a pass is over
    llama_flash_session *               s = nullptr;
};

inline std::vector<uint32_t> every(uint32_t step, uint32_t first, uint32_t end) {
    std::vector<uint32_t> list;
    for (uint32_t i = first; i < end; i += step) {
        list.push_back(i);
    }
    return list;
}
