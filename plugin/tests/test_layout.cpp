// The division of memory, of random needs: nothing is given twice, and the bytes alone say what a session has.
#include "base/sector.h"
#include "check.h"
#include "memory/layout.h"

#include <algorithm>
#include <cstdio>

namespace {

memory_needs some_needs(random_source & random) {
    memory_needs   n;
    const uint64_t page = FLASH_SECTOR << random.below(5); // of the kernel
    n.tables            = random.below(1 << 20);
    n.rows              = random.chance(30) ? random.below(1 << 20) : 0;
    for (uint64_t k = random.chance(60) ? 1 + random.below(3) : 0; k > 0; k--) {
        const uint32_t slot = (uint32_t) (1 + random.below(random.chance(20) ? 5000 : 500)) * 4096; // some larger than a ring was made for
        n.classes.push_back({ (uint32_t) (1 + random.below(400)), 1, slot });
        n.expert_bytes += (uint64_t) n.classes.back().records * (slot - 4096) + 1;
        n.largest_expert = std::max<uint64_t>(n.largest_expert, slot);
    }
    for (uint64_t k = random.below(20); k > 0; k--) {
        panel_needs p; // or a tensor of experts, which has none
        if (random.chance(70)) {
            p.page        = page;
            p.offset      = random.below(1 << 30);
            p.panels      = (uint32_t) (1 + random.below(50));
            p.panel_bytes = 1 + random.below(random.chance(50) ? 1 << 22 : 1 << 14);
            p.bytes       = (p.panels - 1) * p.panel_bytes + 1 + random.below(p.panel_bytes);
            n.panel_bytes += p.bytes;
            n.largest_panel = std::max(n.largest_panel, flash_sector_ceil(p.panel_bytes) + FLASH_SECTOR);
        }
        n.panels.push_back(p);
    }
    if (random.chance(60)) {
        n.in_slots          = random.chance(70);
        const bool pinnable = random.chance(80);
        uint64_t   longest  = 0;
        for (uint64_t k = 1 + random.below(12); k > 0; k--) {
            bundle_needs b;
            b.page         = page;
            b.record_bytes = 64 * (1 + random.below(200));
            b.neurons      = (uint32_t) (1 + random.below(4000));
            b.pinnable     = pinnable;
            b.resident     = random.chance(30) ? b.neurons * b.record_bytes / 3 : 0;
            longest        = std::max(longest, b.record_bytes);
            n.bundles.push_back(b);
        }
        n.neuron_tables = n.n_neurons() * NEURON_ENTRY + (1 << 20);
        n.work          = random.below(1 << 22);
        n.run           = 256;
        n.longest_run   = 256 * longest + 6 * FLASH_SECTOR;
        n.neuron_slot   = longest;
    }
    return n;
}

bool same(const memory_layout & a, const memory_layout & b) {
    return a.total == b.total && a.panels == b.panels && a.records == b.records && a.slots == b.slots && a.neuron_slots == b.neuron_slots &&
           a.standing.expert_ring == b.standing.expert_ring && a.standing.panel_ring == b.standing.panel_ring &&
           a.standing.neuron_ring == b.standing.neuron_ring && a.standing.neurons_whole == b.standing.neurons_whole;
}

uint64_t used(const llama_flash_memory & m) {
    return m.slots + m.pinned + m.stream + m.bookkeeping + m.resident;
}

uint64_t some_bytes(random_source & random, uint64_t least, uint64_t most) {
    switch (random.below(4)) {
        case 0:  return least + random.below(1 << 16);
        case 1:  return most - std::min(most - least, random.below(1 << 16));
        default: return least + random.below(most + (most - least) / 8 + 1 - least);
    }
}

void check_parts(const memory_needs & n, const memory_layout & l, uint64_t bytes) {
    const llama_flash_memory m = describe(n, l);
    CHECK(m.total == bytes && used(m) <= bytes, "%llu of %llu bytes", (unsigned long long) used(m), (unsigned long long) bytes);
    for (size_t i = 0; i < l.panels.size(); i++) {
        CHECK(l.panels[i] <= n.panels[i].panels, "tensor %zu: %u panels", i, l.panels[i]);
    }
    for (size_t i = 0; i < l.records.size(); i++) {
        CHECK(l.records[i] <= n.bundles[i].neurons && (n.bundles[i].pinnable || l.records[i] == 0), "bundle %zu: %u records", i, l.records[i]);
    }
    for (size_t i = 0; i < l.slots.size(); i++) {
        CHECK(l.slots[i] <= n.classes[i].records, "class %zu: %u slots", i, l.slots[i]);
    }
    const bool slots = n.in_slots && !l.standing.neurons_whole;
    CHECK(l.neuron_slots >= (slots ? std::min<uint64_t>(n.n_neurons(), FEWEST_NEURON_SLOTS) : 0), "%u slots of neurons", l.neuron_slots);
    CHECK(l.standing.expert_ring >= n.expert_ring_least() && l.standing.panel_ring >= n.panel_ring_least() &&
              l.standing.neuron_ring >= n.neuron_ring_least(),
          "a ring is too small");
}

void nothing_is_given_twice(const memory_needs & n, random_source & random) {
    for (int k = 0; k < 20; k++) {
        const uint64_t bytes = k == 0 ? n.minimum() : some_bytes(random, n.minimum(), n.maximum());
        check_parts(n, divide(n, bytes), bytes);
    }
}

void all_has_its_place_from_the_maximum_on(const memory_needs & n, random_source & random) {
    const uint64_t           bytes  = n.maximum() + random.below(2) * random.below(1 << 30);
    const llama_flash_memory m      = describe(n, divide(n, bytes));
    uint64_t                 panels = 0;
    uint64_t                 slots  = 0;
    for (const auto & p : n.panels) {
        panels += p.panels;
    }
    for (const auto & c : n.classes) {
        slots += c.records;
    }
    CHECK(m.n_pinned == panels && m.n_slots == slots, "%llu of %llu panels, %llu of %llu slots", (unsigned long long) m.n_pinned,
          (unsigned long long) panels, (unsigned long long) m.n_slots, (unsigned long long) slots);
    CHECK(m.n_neuron_slots + m.n_neurons_pinned == n.n_neurons() || (!n.in_slots && !n.bundles[0].pinnable), "%llu and %llu of %llu neurons",
          (unsigned long long) m.n_neuron_slots, (unsigned long long) m.n_neurons_pinned, (unsigned long long) n.n_neurons());
}

// from empty, and then from one size to the next
void a_size_has_one_layout_however_it_was_reached(const memory_needs & n, random_source & random) {
    const uint64_t      begin = some_bytes(random, n.minimum(), n.maximum());
    const memory_layout empty = divide(n, begin);
    CHECK(same(empty, divide(n, begin, empty.standing)), "what stands divides it anew");

    standing_parts standing = empty.standing;
    const uint64_t least    = least_of(n, standing);
    CHECK(least <= begin, "at least %llu bytes of %llu", (unsigned long long) least, (unsigned long long) begin);
    for (int k = 0; k < 20; k++) {
        const uint64_t      bytes = k == 0 ? least : some_bytes(random, least, std::max(least, n.maximum()));
        const memory_layout l     = divide(n, bytes, standing);
        check_parts(n, l, bytes);
        standing_parts rings = empty.standing; // a session that was always as large
        rings.neurons_whole  = standing.neurons_whole;
        CHECK(same(l, divide(n, bytes, rings)), "it depends on the way");
        standing.neurons_whole = l.standing.neurons_whole;
        CHECK(!n.in_slots || !standing.neurons_whole || rings.neurons_whole, "a resize has begun to pin all neurons");
    }
    const memory_layout back = divide(n, begin, standing);
    CHECK(same(back, empty) || (n.in_slots && empty.standing.neurons_whole && !standing.neurons_whole), "back at %llu bytes with another layout",
          (unsigned long long) begin);
}

// 400 MB of neurons in slots, beside panels of 4 MiB each
memory_needs neurons_and_panels(uint32_t n_panels) {
    memory_needs n;
    panel_needs  p;
    p.panels        = n_panels;
    p.panel_bytes   = 4 << 20;
    p.bytes         = n_panels * p.panel_bytes;
    n.panel_bytes   = p.bytes;
    n.largest_panel = p.panel_bytes;
    n.panels.push_back(p);
    bundle_needs b;
    b.record_bytes = 4096;
    b.neurons      = 100000;
    n.bundles.push_back(b);
    n.in_slots    = true;
    n.run         = 256;
    n.longest_run = 256 * b.record_bytes;
    n.neuron_slot = b.record_bytes;
    return n;
}

void panels_that_stream_come_before_neurons() {
    const memory_needs       n    = neurons_and_panels(64);
    const uint64_t           left = 100 << 20;
    const llama_flash_memory m    = describe(n, divide(n, n.minimum() + left));
    CHECK(m.slots < left * 3 / 10, "%llu bytes of slots", (unsigned long long) m.slots);
    CHECK(m.pinned > left / 2, "%llu bytes of panels", (unsigned long long) m.pinned);
}

void neurons_have_what_panels_do_not_need() {
    const memory_needs       n    = neurons_and_panels(2);
    const uint64_t           all  = n.minimum() + (100 << 20);
    const llama_flash_memory m    = describe(n, divide(n, all));
    const uint64_t           used = m.slots + m.pinned + m.stream + m.bookkeeping;
    CHECK(used + (8 << 20) > all, "%llu of %llu bytes are used", (unsigned long long) used, (unsigned long long) all);
}

// experts of 7 MB, panels of 4 MB
void a_ring_is_longer_for_large_experts_and_not_for_panels() {
    memory_needs n;
    n.classes        = { { 200, 1, 7u << 20 } };
    n.expert_bytes   = 200 * (7u << 20);
    n.largest_expert = 7u << 20;
    n.panels         = { { 0, 200 * (4ull << 20), 4u << 20, 200, FLASH_SECTOR } };
    n.panel_bytes    = n.panels[0].bytes;
    n.largest_panel  = 4u << 20;

    const memory_layout l = divide(n, n.minimum() + (1100u << 20));
    CHECK(l.standing.expert_ring == n.expert_ring_least() + RING_EXPERTS * n.largest_expert, "%llu bytes", (unsigned long long) l.standing.expert_ring);
    CHECK(l.standing.panel_ring == n.panel_ring_least() + RING_MOST, "%llu bytes", (unsigned long long) l.standing.panel_ring);
}

} // namespace

int main() {
    a_ring_is_longer_for_large_experts_and_not_for_panels();
    panels_that_stream_come_before_neurons();
    neurons_have_what_panels_do_not_need();
    for (uint64_t seed = 0; seed < 400; seed++) {
        random_source      random(seed);
        const memory_needs n = some_needs(random);
        nothing_is_given_twice(n, random);
        all_has_its_place_from_the_maximum_on(n, random);
        a_size_has_one_layout_however_it_was_reached(n, random);
    }
    printf("layout: ok\n");
    return 0;
}
