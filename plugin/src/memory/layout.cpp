#include "memory/layout.h"

#include "memory/mapping.h"

#include <algorithm>

constexpr uint64_t NEURON_PAGES  = 2 * HUGE_PAGE; // the neurons' mappings may end in a huge page of which a part only is used
constexpr uint64_t MAPPING_PAGES = 4 * HUGE_PAGE; // so may all others, when every record has its place
constexpr uint64_t NEURONS_PART  = 4;             // of what is left beside the minimum: neurons, where panels need the rest

// needs

static uint64_t whole_pages(uint64_t bytes, uint64_t page) {
    return (bytes + page - 1) / page * page;
}

uint64_t panel_needs::home_bytes(uint32_t n) const {
    return n == 0 ? 0 : whole_pages(flash_sector_ceil(offset + std::min(bytes, n * panel_bytes)) - flash_sector_floor(offset), page);
}

uint64_t panel_needs::span() const {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < panels; i++) {
        sum += flash_sector_ceil(offset + std::min(bytes, (i + 1) * panel_bytes)) - flash_sector_floor(offset + i * panel_bytes);
    }
    return sum;
}

uint64_t bundle_needs::home_bytes(uint32_t n) const {
    return n == 0 ? 0 : whole_pages(n * record_bytes + 2 * FLASH_SECTOR, page);
}

uint64_t memory_needs::n_neurons() const {
    uint64_t n = 0;
    for (const auto & b : bundles) {
        n += b.neurons;
    }
    return n;
}

uint64_t memory_needs::neuron_bytes() const {
    uint64_t sum = 0;
    for (const auto & b : bundles) {
        sum += b.neurons * b.record_bytes;
    }
    return sum;
}

uint64_t memory_needs::other_bytes() const {
    uint64_t sum = 0;
    for (const auto & p : panels) {
        sum += p.span();
    }
    for (const auto & c : classes) {
        sum += (uint64_t) c.records * c.slot_bytes;
    }
    return sum;
}

static uint64_t resident_bytes(const memory_needs & n) {
    uint64_t sum = 0;
    for (const auto & b : n.bundles) {
        sum += b.resident;
    }
    return sum;
}

// bytes of a neuron that is in a slot; 0: the mode has none
static uint64_t slot_cost(const memory_needs & n) {
    return n.in_slots ? n.neuron_slot + SLOT_ENTRY : 0;
}

// the most that the ring of neurons uses of `room` beyond its least
static uint64_t neuron_ring_most(const memory_needs & n, uint64_t room) {
    const uint64_t most = std::min(room, n.neuron_bytes() + n.n_neurons() * NEURON_MOST);
    return flash_sector_floor(std::min(RING_MOST, most / RING_PART));
}

uint64_t memory_needs::minimum() const {
    uint64_t sum = tables + rows + expert_ring_least() + panel_ring_least();
    if (!bundles.empty()) {
        sum += neuron_tables + work + neuron_ring_least() + NEURON_PAGES + resident_bytes(*this) + FEWEST_NEURON_SLOTS * slot_cost(*this);
    }
    return sum;
}

uint64_t memory_needs::maximum() const {
    uint64_t sum      = minimum() + MAPPING_PAGES + other_bytes();
    bool     pinnable = true;
    for (const auto & p : panels) {
        sum += 2 * p.page;
    }
    for (const auto & b : bundles) {
        sum += std::max(b.neurons * b.record_bytes, b.neurons * (neuron_slot + SLOT_ENTRY)) + 2 * FLASH_SECTOR + 2 * b.page;
        pinnable = pinnable && b.pinnable;
    }
    return pinnable ? sum : sum + neuron_ring_most(*this, UINT64_MAX);
}

uint64_t least_of(const memory_needs & n, const standing_parts & standing) {
    return n.minimum() - n.expert_ring_least() - n.panel_ring_least() - n.neuron_ring_least() + standing.expert_ring + standing.panel_ring +
           standing.neuron_ring;
}

// division

// most: beyond its least
static uint64_t ring_bytes(uint64_t least, uint64_t most, uint64_t left, uint64_t records) {
    return least + flash_sector_floor(std::min({ most, left / RING_PART, records }));
}

// Bundles' records in `room` bytes where the mode has no slots: whole runs, the same share of each layer. Returns what they use.
static uint64_t pin_runs(const memory_needs & n, uint64_t room, uint64_t whole, memory_layout & l) {
    const double part = std::min(1.0, (double) room / (double) whole);
    double       due  = 0.0; // runs
    uint64_t     used = 0;
    for (size_t i = 0; i < n.bundles.size(); i++) {
        const bundle_needs & b    = n.bundles[i];
        const uint32_t       runs = (b.neurons + n.run - 1) / n.run;
        due += part * runs;
        const uint32_t now = std::min(runs, (uint32_t) due);
        due -= (double) now;
        uint32_t records = b.pinnable ? std::min(b.neurons, now * n.run) : 0;
        while (b.home_bytes(records) > room - used) { // a layer's last run may be short, so that its share was too large
            records = (records - 1) / n.run * n.run;
        }
        l.records[i] = records;
        used += b.home_bytes(records);
    }
    return used;
}

// Neurons in `room` bytes beside the minimum. Returns what they use of it, with their ring.
static uint64_t divide_neurons(const memory_needs & n, uint64_t room, const standing_parts * standing, memory_layout & l) {
    const uint64_t fewest = FEWEST_NEURON_SLOTS * slot_cost(n); // in the minimum: if all neurons are pinned, their bytes are for that
    uint64_t       whole  = 0;                                  // bytes of all records
    bool           may    = !standing || standing->neurons_whole || !n.in_slots;
    for (const auto & b : n.bundles) {
        whole += b.home_bytes(b.neurons);
        may = may && b.pinnable;
    }
    uint64_t ring = standing ? standing->neuron_ring - n.neuron_ring_least() : 0; // beyond its least
    room -= std::min(room, ring);
    l.standing.neurons_whole = may && room + fewest >= whole;
    if (!standing && !l.standing.neurons_whole) {
        ring = neuron_ring_most(n, room);
        room -= ring;
    }
    l.standing.neuron_ring = n.neuron_ring_least() + ring;
    if (l.standing.neurons_whole) {
        for (size_t i = 0; i < n.bundles.size(); i++) {
            l.records[i] = n.bundles[i].neurons;
        }
        return ring + whole - std::min(whole, fewest);
    }
    if (!n.in_slots) {
        return ring + pin_runs(n, room, whole, l);
    }
    l.neuron_slots = (uint32_t) std::min(n.n_neurons(), FEWEST_NEURON_SLOTS + room / slot_cost(n));
    return ring + (l.neuron_slots - std::min(l.neuron_slots, FEWEST_NEURON_SLOTS)) * slot_cost(n);
}

// Panels in `room` bytes, each matrix the same share of its own, so that what streams is spread evenly. Returns what they use.
static uint64_t pin_panels(const memory_needs & n, uint64_t room, memory_layout & l) {
    uint64_t span    = 0;
    uint64_t sectors = 0;
    for (const auto & p : n.panels) {
        span += p.span() + p.page - FLASH_SECTOR;
        sectors += p.panels * FLASH_SECTOR;
    }
    const double share = room >= span ? 1.0 : (double) room / (double) (span + sectors);
    double       due   = 0.0; // bytes that the share comes to so far
    uint64_t     used  = 0;
    for (size_t i = 0; i < n.panels.size(); i++) {
        const panel_needs & p = n.panels[i];
        due += share * (double) p.home_bytes(p.panels);
        uint32_t & pinned = l.panels[i];
        while (pinned < p.panels) {
            const uint64_t bytes = p.home_bytes(pinned + 1);
            if (bytes > room - used || (share < 1.0 && (double) bytes > due)) {
                break;
            }
            pinned++;
        }
        due -= (double) p.home_bytes(pinned);
        used += p.home_bytes(pinned);
    }
    return used;
}

// Slots of each class in `room` bytes: the classes share by their bytes, so that one expert's parts are kept or dropped alike.
static void divide_slots(const memory_needs & n, uint64_t room, memory_layout & l) {
    uint64_t total = 0;
    for (const auto & c : n.classes) {
        total += (uint64_t) c.records * c.slot_bytes;
    }
    const double kept = total == 0 ? 0.0 : std::min(1.0, (double) room / (double) total);
    for (size_t i = 0; i < n.classes.size(); i++) {
        l.slots[i] = std::min(n.classes[i].records, (uint32_t) (kept * (double) n.classes[i].records));
    }
}

static memory_layout divide(const memory_needs & n, uint64_t bytes, const standing_parts * standing) {
    memory_layout l;
    l.total = bytes;
    l.panels.assign(n.panels.size(), 0);
    l.records.assign(n.bundles.size(), 0);
    l.slots.assign(n.classes.size(), 0);

    const bool everything = bytes >= n.maximum();
    uint64_t   left       = bytes - n.minimum() + n.expert_ring_least() + n.panel_ring_least();
    if (standing) {
        l.standing = *standing;
    } else {
        const uint64_t beside  = everything ? 0 : bytes - n.minimum();
        const uint64_t experts = std::max(RING_MOST, std::min(RING_EXPERTS * n.largest_expert, RING_MOST_OF_EXPERTS));
        l.standing.expert_ring = ring_bytes(n.expert_ring_least(), experts, beside, n.expert_bytes);
        l.standing.panel_ring  = ring_bytes(n.panel_ring_least(), RING_MOST, beside, n.panel_bytes); // panels are consumed one by one
    }
    left -= l.standing.expert_ring + l.standing.panel_ring;
    if (!n.bundles.empty()) {
        // What panels and experts have no use for, and a part of it all: a panel that is pinned saves its bytes on every token, a neuron's
        // slot only on a hit, and most hits are of few neurons.
        const uint64_t beside = left - std::min(left, n.other_bytes());
        left -= divide_neurons(n, everything ? left : std::max(left / NEURONS_PART, beside), standing, l);
    }
    left -= pin_panels(n, left, l);
    divide_slots(n, left, l);
    return l;
}

memory_layout divide(const memory_needs & n, uint64_t bytes) {
    return divide(n, bytes, nullptr);
}

memory_layout divide(const memory_needs & n, uint64_t bytes, const standing_parts & standing) {
    return divide(n, bytes, &standing);
}

llama_flash_memory describe(const memory_needs & n, const memory_layout & l) {
    llama_flash_memory m = {};
    m.total              = l.total;
    m.stream             = l.standing.expert_ring + l.standing.panel_ring + l.standing.neuron_ring + n.rows;
    m.bookkeeping        = n.tables;
    m.resident           = resident_bytes(n);
    m.n_neuron_slots     = l.neuron_slots;
    if (!n.bundles.empty()) {
        m.bookkeeping += n.neuron_tables + n.work + l.neuron_slots * SLOT_ENTRY;
        m.slots = l.neuron_slots * n.neuron_slot;
    }
    for (size_t i = 0; i < n.bundles.size(); i++) {
        m.n_neurons_pinned += l.records[i];
        m.pinned += l.records[i] * n.bundles[i].record_bytes;
    }
    for (size_t i = 0; i < n.panels.size(); i++) {
        m.n_pinned += l.panels[i];
        m.pinned += n.panels[i].home_bytes(l.panels[i]);
    }
    for (size_t i = 0; i < n.classes.size(); i++) {
        m.n_slots += l.slots[i];
        m.slots += (uint64_t) l.slots[i] * n.classes[i].slot_bytes;
    }
    return m;
}
