// The neurons of a session on real files: random demands, expectations, landings, runs and failures. What is found is the file's.
#include "neuron_session.h"

#include <set>

namespace {

std::vector<uint32_t> some(random_source & random, size_t most) {
    std::set<uint32_t> list;
    const size_t       n     = random.below(most + 1);
    const uint32_t     begin = (uint32_t) random.below(N_FF);
    while (list.size() < n) { // neighbours often
        list.insert(random.chance(50) ? (uint32_t) random.below(N_FF) : std::min(N_FF - 1, begin + (uint32_t) random.below(n + 5)));
    }
    return { list.begin(), list.end() };
}

// one evaluation, and perhaps the next one is expected; false: a read failed
bool demand_some(store & a, uint32_t il, size_t most, bool seen, random_source & random) {
    const std::vector<uint32_t> list = some(random, most);
    const bool                  ok   = a.demand(il, list, 1 + (uint32_t) random.below(3), !seen);
    for (uint32_t i : list) {
        CHECK(!ok || a.check(il, i), "neuron %u was demanded and held", i);
    }
    if (ok && il + 1 < N_LAYERS && random.chance(60)) {
        const std::vector<uint32_t> next = some(random, most);
        a.s->neurons.expect(a.s->bundles[il + 1], next.data(), next.size());
    }
    if (random.chance(70)) { // else the evaluation is broken off, or goes on later
        a.s->neurons.release();
    }
    return ok;
}

void random_operations(layout how, uint32_t io_engine, uint32_t mode, uint32_t window, double share, uint64_t seed) {
    random_source         random(seed);
    store                 a(how, io_engine, mode, window, share, seed);
    llama_flash_session & s          = *a.s;
    const size_t          most       = std::min<size_t>(N_FF, std::max<size_t>(1, s.neurons.n_slots() / 2));
    uint32_t              n_failures = 0;
    uint32_t              n_cuts     = 0;
    for (int step = 0; step < 150; step++) {
        now_trying          = { seed, step };
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
            ok = demand_some(a, il, most, seen, random);
        } else {
            s.reads.count_as_checked(seen ? nullptr : s.bundles[il].file);
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
        CHECK(ok || fail, "%s", s.reads.error().message);
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
    CHECK(n_failures > 0, "nothing failed");
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

void reads_that_nobody_asked_for_fail_quietly() {
    for (bool asked : { false, true }) {
        store                       a({ false, true }, LLAMA_FLASH_IO_PREAD, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 0.5, 1);
        llama_flash_session &       s    = *a.s;
        const std::vector<uint32_t> list = every(20, 100, 500);
        s.begin_op("test");
        a.shard_of(1).cut(5000);
        s.reads.count_as_checked(s.bundles[1].file); // the change comes after the check
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
        CHECK(s.neurons.retire_slot(false), "a slot that is read into");
    }
    CHECK(a.demand(0, every(1, 0, s.neurons.n_slots() / 2), 1), "%s", s.reads.error().message);
    s.neurons.release();
    s.end_op();
    a.check_all();
}

} // namespace

int main() {
    reads_that_nobody_asked_for_fail_quietly();
    a_demand_finds_slots_when_they_became_fewer();
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
