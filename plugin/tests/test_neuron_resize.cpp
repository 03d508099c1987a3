// The memory of neurons while its limit moves: what is pinned, what moves, and what is counted.
#include "neuron_session.h"

namespace {

void everything_is_pinned_where_it_fits() {
    store a({ false, true }, LLAMA_FLASH_IO_AUTO, LLAMA_FLASH_NEURONS_LOWRANK, UINT32_MAX, 3.0, 1);
    CHECK(a.check_all() == N_LAYERS * N_FF && a.s->neurons.n_slots() == 0, "%u slots", a.s->neurons.n_slots());
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
        s.set_target(s.requirements().min_memory);
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

} // namespace

int main() {
    what_was_pinned_can_be_computed_while_it_is_given_back();
    what_is_pinned_stays_where_it_fits();
    a_larger_work_space_stays_counted();
    a_resize_that_met_an_error_goes_on();
    an_urgent_resize_stays_urgent();
    everything_is_pinned_where_it_fits();
    printf("neuron_resize: ok\n");
    return 0;
}
