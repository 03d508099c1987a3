// The neurons of a session on real files: random demands, expectations, landings, runs and failures. What is found is the file's.
#include "check.h"
#include "session.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <set>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace {

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
        s->reads.take_as_checked(unseen ? b.file : nullptr); // a change that comes between the check and the reads
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
            s->neurons.stream_give();
        }
        return true;
    }

    layout                              how;
    std::vector<std::unique_ptr<shard>> shards;
    std::vector<ggml_tensor>            weights;
    std::vector<uint32_t>               experts; // that a pass is over
    llama_flash_session *               s = nullptr;
};

std::vector<uint32_t> some(random_source & random, size_t most) {
    std::set<uint32_t> list;
    const size_t       n     = random.below(most + 1);
    const uint32_t     begin = (uint32_t) random.below(N_FF);
    while (list.size() < n) { // neighbours often
        list.insert(random.chance(50) ? (uint32_t) random.below(N_FF) : std::min(N_FF - 1, begin + (uint32_t) random.below(n + 5)));
    }
    return { list.begin(), list.end() };
}

void random_operations(layout how, uint32_t io_engine, uint32_t mode, uint32_t window, double share, uint64_t seed) {
    random_source         random(seed);
    store                 a(how, io_engine, mode, window, share, seed);
    llama_flash_session & s          = *a.s;
    const size_t          most       = std::min<size_t>(N_FF, std::max<size_t>(1, s.neurons.n_slots() / 2));
    uint32_t              n_failures = 0;
    uint32_t              n_cuts     = 0;
    for (int step = 0; step < 150; step++) {
        const uint32_t il   = (uint32_t) random.below(N_LAYERS);
        const bool     fail = random.chance(8);
        const bool     seen = random.chance(50);
        s.begin_op("test");
        if (fail) {
            n_cuts++;
            a.shard_of(il).cut(random.below(a.offset_of(il) + N_FF * 100));
        }
        bool ok = true;
        if (mode != LLAMA_FLASH_NEURONS_OFF && random.chance(65)) {
            const std::vector<uint32_t> list = some(random, most);
            ok                               = a.demand(il, list, 1 + (uint32_t) random.below(3), !seen);
            for (uint32_t i : list) {
                CHECK(!ok || a.check(il, i), "neuron %u was demanded and held", i);
            }
            if (ok && il + 1 < N_LAYERS && random.chance(60)) {
                const std::vector<uint32_t> next = some(random, most);
                s.neurons.expect(s.bundles[il + 1], next.data(), next.size());
            }
            if (random.chance(70)) { // else the evaluation is broken off, or goes on later
                s.neurons.release();
            }
        } else {
            s.reads.take_as_checked(seen ? nullptr : s.bundles[il].file);
            s.neurons.release();
            ok = a.pass(il, random.chance(60), mode != LLAMA_FLASH_NEURONS_OFF && random.chance(50), random);
        }
        if (random.chance(50)) {
            s.reads.settle(false);
            if (!s.failed()) {
                s.neurons.pump();
            }
        }
        s.end_op();
        if (fail) {
            s.reads.drain(); // reads of what is gone end before it is back
            a.shard_of(il).mend();
        }
        CHECK(ok || fail, "seed %llu, step %d: %s", (unsigned long long) seed, step, s.reads.error().message);
        if (s.failed()) {
            llama_flash_error err;
            CHECK(s.take_error(&err) == LLAMA_FLASH_E_READ, "%s", err.message);
            CHECK(!s.neurons.under_way() && !s.neurons.streaming(), "something is under way after the error was taken");
            n_failures++;
        }
        CHECK(a.check_all() <= s.neurons.used() + s.memory.n_neurons_pinned, "more neurons than slots");
        CHECK(s.neurons.used() <= s.neurons.n_slots(), "more slots than there are");
        // memory given anew while reads are under way; what EXACT keeps resident cannot be compared with what it was
        if (random.chance(2) && (mode != LLAMA_FLASH_NEURONS_EXACT || n_cuts == 0)) {
            a.give(share);
        }
    }
    CHECK(n_failures > 0, "seed %llu: nothing failed", (unsigned long long) seed);
}

void a_window_lets_go_of_what_its_tokens_did_not_use() {
    for (uint32_t window : { 0u, 1u, 3u }) {
        store                 a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, window, 0.9, 1);
        llama_flash_session & s = *a.s;
        for (uint32_t token = 0; token < 10; token++) { // token t uses neurons t and t + 1
            s.begin_op("test");
            CHECK(a.demand(0, { token, token + 1 }, 1), "%s", s.reads.error().message);
            s.neurons.release();
            s.end_op();
            for (uint32_t i = 0; i <= token + 1; i++) {
                const uint32_t last = std::min(i, token); // token that used it
                CHECK(a.check(0, i) == (token - last <= window), "window %u, token %u: neuron %u", window, token, i);
            }
        }
    }
}

void what_an_evaluation_held_makes_room_for_its_last_part() {
    store                 a({ false, false }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 0.2, 1);
    llama_flash_session & s     = *a.s;
    const uint32_t        half  = s.neurons.n_slots() / 2;
    auto                  range = [](uint32_t first, uint32_t n) {
        std::vector<uint32_t> list(n);
        for (uint32_t k = 0; k < n; k++) {
            list[k] = first + k;
        }
        return list;
    };
    CHECK(3 * half + 1 < N_FF, "%u slots", s.neurons.n_slots());
    for (uint32_t k = 0; k < 3; k++) { // held is more than there are slots
        s.begin_op("test");
        CHECK(a.demand(0, range(k * half, half), 1), "%s", s.reads.error().message);
        s.end_op();
        for (uint32_t i = 0; i < half; i++) {
            CHECK(a.check(0, k * half + i), "neuron %u", k * half + i);
        }
    }
    s.neurons.release();
}

void pinned_layers_are_passed_over_by_what_reads_ahead() {
    for (double share : { 0.3, 0.5, 0.8, 0.9, 0.95, 0.99 }) {
        store                 a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_OFF, UINT32_MAX, share, 1);
        llama_flash_session & s = *a.s;
        random_source         random(1);
        const uint64_t        begin = s.notes.stats.panel_reads;
        for (int pass = 0; pass < 3; pass++) {
            for (uint32_t il = 0; il < N_LAYERS; il++) {
                s.begin_op("test");
                const uint64_t before = s.notes.stats.panel_reads;
                CHECK(a.pass(il, true, false, random), "%s", s.reads.error().message);
                CHECK(s.notes.stats.panel_reads - before <= 2 * N_LAYERS * (N_FF / FFN_RUN_ROWS + 1), "runs of nothing");
                s.end_op();
            }
        }
        uint64_t streamed = 0; // of a pass
        for (const auto & b : s.bundles) {
            streamed += (b.n_ff - b.n_pinned + FFN_RUN_ROWS - 1) / FFN_RUN_ROWS;
        }
        CHECK(s.notes.stats.panel_reads - begin == 3 * streamed, "share %.2f: %llu runs were read for %llu", share, (unsigned long long) (s.notes.stats.panel_reads - begin),
              (unsigned long long) (3 * streamed));
    }
}

void everything_is_pinned_where_it_fits() {
    store a({ false, true }, LLAMA_FLASH_IO_AUTO, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 3.0, 1);
    CHECK(a.check_all() == N_LAYERS * N_FF && a.s->neurons.n_slots() == 0, "%u slots", a.s->neurons.n_slots());
}

std::vector<uint32_t> every(uint32_t step, uint32_t first, uint32_t end) {
    std::vector<uint32_t> list;
    for (uint32_t i = first; i < end; i += step) {
        list.push_back(i);
    }
    return list;
}

llama_flash_resize resize(llama_flash_session & s, uint64_t bytes, bool urgent = false) {
    llama_flash_error  err;
    llama_flash_resize out;
    CHECK(s.resize(bytes, urgent, out, &err) == LLAMA_FLASH_OK, "%s", err.message);
    return out;
}

void settle(llama_flash_session & s, uint64_t bytes) {
    for (int k = 0; !resize(s, bytes).done; k++) {
        CHECK(k < 100000 && !s.failed(), "the resize does not end: %s", s.reads.error().message);
    }
}

// ops may come after each step from all pinned to slots
void what_was_pinned_can_be_computed_while_it_is_given_back() {
    for (layout how : { layout{ false, true }, layout{ false, true, 2 } }) {
        store                 a(how, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 3.0, 1);
        llama_flash_session & s = *a.s;
        CHECK(s.memory.n_neurons_pinned == N_LAYERS * N_FF && s.neurons.n_slots() == 0, "not all is pinned");
        s.plan_resize(s.requirements().min_memory);
        int  steps = 0;
        bool stuck = false;
        while (s.give_back_one(stuck)) {
            steps++;
            CHECK(s.neurons.n_slots() >= 32, "step %d: %u slots", steps, s.neurons.n_slots());
            for (uint32_t il = 0; il < N_LAYERS; il++) {
                const uint32_t pinned = s.bundles[il].n_pinned;
                CHECK(how.n_expert == 0 || pinned == 0 || pinned == N_FF, "step %d: %u records of experts are pinned", steps, pinned);
                s.begin_op("test");
                const std::vector<uint32_t> list = every(N_FF / 16, 5, N_FF);
                CHECK(a.demand(il, list, 1), "step %d: %s", steps, s.reads.error().message);
                for (uint32_t i : list) {
                    CHECK(a.check(il, i), "neuron %u", i);
                }
                s.neurons.release();
                s.end_op();
            }
        }
        CHECK(steps >= (int) N_LAYERS && !stuck, "%d steps", steps);
    }
}

void what_is_pinned_stays_where_it_fits() {
    store                 a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 1.1, 1);
    llama_flash_session & s     = *a.s;
    const uint64_t        total = s.memory.total;
    for (uint64_t bytes : { s.requirements().max_memory, total, total - 50000 }) {
        settle(s, bytes);
        CHECK(s.memory.n_neurons_pinned == N_LAYERS * N_FF && s.neurons.n_slots() == 0, "%llu are pinned", (unsigned long long) s.memory.n_neurons_pinned);
    }
    settle(s, s.requirements().min_memory);
    CHECK(s.memory.n_neurons_pinned == 0 && s.neurons.n_slots() > 0, "%llu are pinned", (unsigned long long) s.memory.n_neurons_pinned);
}

// of a context with a larger n_ubatch, also after the memory has moved
void a_larger_work_space_stays_counted() {
    store                 a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 0.5, 1);
    llama_flash_session & s      = *a.s;
    auto                  tables = [&] { return s.memory.bookkeeping - s.memory.n_neuron_slots * SLOT_ENTRY; };
    const uint64_t        total  = s.memory.total;
    const uint64_t        before = tables();
    const uint64_t        least  = resize(s, total).least;
    s.ffn_ops.work.reserve(s.bundles, 512);
    s.note_ubatch(512);
    const uint64_t grown = tables() - before;
    CHECK(grown > 0 && resize(s, total).least == least + grown, "the work space is not counted");
    for (uint64_t bytes : { total - total / 8, total }) {
        settle(s, bytes);
        const llama_flash_memory & m = s.memory;
        CHECK(tables() == before + grown, "%llu bytes of tables", (unsigned long long) tables());
        CHECK(m.slots + m.pinned + m.stream + m.bookkeeping + m.resident <= m.total, "more than %llu bytes", (unsigned long long) m.total);
    }
    a.give(0.5); // anew
    CHECK(tables() == before + grown, "%llu bytes of tables", (unsigned long long) tables());
}

void a_resize_that_met_an_error_goes_on() {
    store                 a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_OFF, UINT32_MAX, 0.1, 1);
    llama_flash_session & s    = *a.s;
    const uint64_t        most = s.requirements().max_memory;
    a.shard_of(0).cut(5000);
    llama_flash_resize out = resize(s, most);
    CHECK(s.failed() && !out.done, "pinned what is not there");
    CHECK(!resize(s, most).done, "done, with %llu neurons pinned", (unsigned long long) s.memory.n_neurons_pinned);
    a.shard_of(0).mend();
    llama_flash_error err;
    CHECK(s.take_error(&err) == LLAMA_FLASH_E_READ, "%s", err.message);
    settle(s, most);
    CHECK(s.memory.n_neurons_pinned == N_LAYERS * N_FF && a.check_all() == N_LAYERS * N_FF, "%llu are pinned", (unsigned long long) s.memory.n_neurons_pinned);
}

void an_urgent_resize_stays_urgent() {
    store                 a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 0.5, 1);
    llama_flash_session & s = *a.s;
    for (uint32_t token = 0; token < 4; token++) { // more than there are slots: what is hot lies anywhere
        for (uint32_t il = 0; il < N_LAYERS; il++) {
            s.begin_op("test");
            CHECK(a.demand(il, every(3, token % 3, N_FF), 1), "%s", s.reads.error().message);
            s.neurons.release();
            s.end_op();
        }
    }
    std::vector<const uint8_t *> was;
    for (uint32_t n = 0; n < N_LAYERS * N_FF; n++) {
        was.push_back(s.neurons.find(s.bundles[n / N_FF], n % N_FF));
    }
    const uint64_t bytes = s.memory.total - s.memory.slots / 2;
    s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, "test", "nothing moves before the error is taken");
    resize(s, bytes, true);
    CHECK(!resize(s, bytes, false).done, "it has moved");
    CHECK(s.take_error(nullptr) == LLAMA_FLASH_E_INTERNAL, "another error");
    settle(s, bytes);
    const uint8_t * const end    = s.neurons.slot_memory() + s.neurons.n_slots() * s.needs.neuron_slot;
    uint32_t              stayed = 0;
    for (uint32_t n = 0; n < was.size(); n++) {
        const uint8_t * is = s.neurons.find(s.bundles[n / N_FF], n % N_FF);
        CHECK(is == (was[n] < end ? was[n] : nullptr), "neuron %u was moved, or lost its slot without need", n);
        stayed += is != nullptr;
    }
    CHECK(stayed == s.neurons.n_slots() && stayed > 100, "%u neurons stayed", stayed);
}

void reads_that_nobody_asked_for_fail_quietly() {
    for (bool asked : { false, true }) {
        store                       a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 0.5, 1);
        llama_flash_session &       s    = *a.s;
        const std::vector<uint32_t> list = every(20, 100, 500);
        s.begin_op("test");
        a.shard_of(1).cut(5000);
        s.reads.take_as_checked(s.bundles[1].file); // the change comes after the check
        s.neurons.expect(s.bundles[1], list.data(), list.size());
        if (asked) {
            CHECK(!a.demand(1, list, 1, true), "neurons that are not there");
        }
        s.reads.drain();
        s.end_op();
        a.shard_of(1).mend();
        CHECK(s.failed() == asked, "an error that is nobody's: %s", s.reads.error().message);
        llama_flash_stats stats = {};
        s.reads.tell(stats);
        CHECK(stats.errors > 0, "nothing failed");
        llama_flash_error err;
        CHECK(s.take_error(&err) == (asked ? LLAMA_FLASH_E_READ : LLAMA_FLASH_OK), "%s", err.message);
        s.begin_op("test");
        CHECK(a.demand(1, list, 1), "%s", s.reads.error().message);
        for (uint32_t i : list) {
            CHECK(a.check(1, i), "neuron %u", i);
        }
        s.neurons.release();
        s.end_op();
    }
}

// more neurons on their way than the demand leaves slots for: the slots became fewer
void a_demand_finds_slots_when_they_became_fewer() {
    store                       a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 0.2, 1);
    llama_flash_session &       s     = *a.s;
    const std::vector<uint32_t> ahead = every(1, 0, s.neurons.n_slots() / 4);
    s.begin_op("test");
    s.neurons.expect(s.bundles[1], ahead.data(), ahead.size());
    while (s.neurons.n_slots() > ahead.size() + 8) {
        CHECK(s.neurons.remove_slot(false), "a slot that is read into");
    }
    CHECK(a.demand(0, every(1, 0, s.neurons.n_slots() / 2), 1), "%s", s.reads.error().message);
    s.neurons.release();
    s.end_op();
    a.check_all();
}

} // namespace

int main() {
    what_was_pinned_can_be_computed_while_it_is_given_back();
    what_is_pinned_stays_where_it_fits();
    a_larger_work_space_stays_counted();
    a_resize_that_met_an_error_goes_on();
    an_urgent_resize_stays_urgent();
    reads_that_nobody_asked_for_fail_quietly();
    a_demand_finds_slots_when_they_became_fewer();
    everything_is_pinned_where_it_fits();
    a_window_lets_go_of_what_its_tokens_did_not_use();
    what_an_evaluation_held_makes_room_for_its_last_part();
    pinned_layers_are_passed_over_by_what_reads_ahead();
    uint64_t seed = 0;
    for (uint32_t io_engine : { LLAMA_FLASH_IO_AUTO, LLAMA_FLASH_IO_PREAD }) {
        for (layout how : { layout{ false, true }, layout{ false, false }, layout{ true, true }, layout{ false, true, 2 }, layout{ false, true, 7 } }) {
            for (uint32_t mode : { LLAMA_FLASH_NEURONS_LOWRANK, LLAMA_FLASH_NEURONS_EXACT, LLAMA_FLASH_NEURONS_OFF }) {
                for (uint32_t window : { UINT32_MAX, 0u, 2u }) {
                    if (mode == LLAMA_FLASH_NEURONS_OFF ? window == 0 : how.n_expert == 0 || window == 2) {
                        random_operations(how, io_engine, mode, window, (double) (seed % 5) / 8.0, seed);
                        seed++;
                    }
                }
            }
        }
    }
    printf("neuron_store: ok\n");
    return 0;
}
