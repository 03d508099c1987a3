#include "store/experts.h"

#include <cstring>

// use

void expert_store::use(flash_tensor & t, uint32_t e, uint32_t n_tokens, uint32_t count) {
    flash_record & r = record(t.first_record + e);
    cache.use(t.first_record + e, t.tokens, n_tokens, count);
    if (notes.trace.on()) {
        notes.trace.note({ t.tokens, t.number, e, n_tokens, count });
    }
    if (n_tokens <= table.few_tokens) {
        notes.count_reuse(t.tokens - n_tokens, r.used);
    }
    r.used = t.tokens + 1;
}

void expert_store::to_slot(uint32_t index, int32_t slot) {
    flash_record & r = record(index);
    r.place          = record_place::slot;
    r.index          = slot;
    r.data           = slot_data[(size_t) slot] + (r.offset - flash_sector_floor(r.offset));
    cache.set_reading(slot, true);
    start(index);
}

bool expert_store::fetch_to_slot(uint32_t index, bool evict) {
    int32_t       evicted;
    const int32_t slot = cache.take(table.tensors[record(index).tensor].size_class, index, evict, &evicted);
    if (slot == slot_cache::NONE) {
        return false;
    }
    if (evicted != slot_cache::NONE) {
        set_absent(record((uint32_t) evicted));
        notes.stats.evictions++;
    }
    to_slot(index, slot);
    return true;
}

bool expert_store::fetch_to_ring(uint32_t index) {
    if (!to_ring(index)) {
        return false;
    }
    start(index);
    return true;
}

void expert_store::ended(uint32_t index, const reader::done & done, file_state state) {
    flash_record & r = record(index);
    if (r.place == record_place::slot) {
        cache.set_reading(r.index, false);
    }
    if (note_arrival(index, done, state)) {
        return;
    }
    // the record is absent again, so that the next call may try once more
    if (r.place == record_place::slot) {
        cache.drop(r.index);
        set_absent(r);
    } else {
        release(index);
    }
}

bool expert_store::warm(uint32_t index) {
    flash_record &       r = record(index);
    const flash_tensor & t = table.tensors[r.tensor];
    if (!t.is_experts || r.state != record_state::absent || cache.n_empty(t.size_class) == 0 || !check_file(r)) {
        return false;
    }
    if (cache.score(index) < 0.0) {
        cache.use(index, t.tokens, 1, 1); // hot in an earlier process: counts as one use
    }
    int32_t evicted;
    to_slot(index, cache.take(t.size_class, index, false, &evicted));
    r.warmed = true;
    return true;
}

uint64_t expert_store::bytes_used(const llama_flash_memory & memory) const {
    const uint64_t neuron_bytes = memory.n_neuron_slots * needs.neuron_slot;
    return memory.n_slots == 0 ? 0 : (memory.slots - neuron_bytes) / memory.n_slots * cache.used();
}

// memory

const char * expert_store::make(const memory_layout & to, uint64_t & bytes) {
    for (size_t c = 0; c < needs.classes.size(); c++) { // addresses for all: the memory given may grow
        const uint32_t size = needs.classes[c].slot_bytes;
        bytes               = (uint64_t) to.slots[c] * size;
        slot_memory.push_back(mapping::allocate((size_t) needs.classes[c].records * size, bytes));
        if (bytes > 0 && !slot_memory.back().data) {
            return "slots";
        }
        for (uint32_t i = 0; i < to.slots[c]; i++) {
            slot_data.push_back(slot_memory.back().data + (size_t) i * size);
            slot_fresh.push_back(1);
        }
    }
    cache.configure(to.slots, table.records.size());
    bytes = to.standing.expert_ring;
    return make_ring(bytes) ? nullptr : "the ring";
}

void expert_store::drop_all() {
    for (auto & t : table.tensors) {
        if (!t.is_experts) {
            continue;
        }
        t.order  = 0;
        t.tokens = 0;
        for (uint32_t i = t.first_record; i < t.first_record + t.n_records; i++) {
            set_absent(record(i));
            record(i).used = 0;
        }
    }
    slot_memory.clear();
    slot_data.clear();
    slot_fresh.clear();
    make_ring(0);
}

void expert_store::drop_kept() {
    drop_ring();
    for (auto & r : table.records) {
        if (r.place == record_place::slot) {
            cache.drop(r.index);
            set_absent(r);
        }
    }
}

void expert_store::note_layout(memory_layout & l) const {
    for (uint32_t c = 0; c < needs.classes.size(); c++) {
        l.slots.push_back(cache.n_slots(c));
    }
}

void expert_store::fit(memory_layout & to) const {
    for (size_t c = 0; c < needs.classes.size(); c++) {
        to.slots[c] = (uint32_t) std::min<uint64_t>(to.slots[c], slot_memory[c].bytes / needs.classes[c].slot_bytes);
    }
}

bool expert_store::give_back_one(const memory_layout & to, bool move, bool & stuck) {
    for (uint32_t c = 0; c < to.slots.size(); c++) {
        if (cache.n_slots(c) <= to.slots[c]) {
            continue;
        }
        const slot_cache::retired r = cache.retire(c, move);
        if (!r.done) {
            stuck = true;
            continue;
        }
        if (r.evicted != slot_cache::NONE) {
            set_absent(record((uint32_t) r.evicted));
            notes.stats.evictions++;
        }
        if (r.moved != slot_cache::NONE) {
            flash_record & moved = record(cache.record_in(r.moved));
            uint8_t *      from  = slot_data[(size_t) r.slot];
            uint8_t *      into  = slot_data[(size_t) r.moved];
            memcpy(into, from, needs.classes[c].slot_bytes);
            moved.data  = into + (moved.data - from);
            moved.index = r.moved;
        }
        return true;
    }
    return false;
}

bool expert_store::take_one(const memory_layout & to) {
    for (uint32_t c = 0; c < to.slots.size(); c++) {
        if (cache.n_slots(c) >= to.slots[c]) {
            continue;
        }
        const uint32_t n    = cache.n_slots(c);
        const size_t   slot = (size_t) cache.add(c);
        if (slot >= slot_data.size()) {
            slot_data.resize(slot + 1);
            slot_fresh.resize(slot + 1);
        }
        slot_fresh[slot] = 1;
        slot_data[slot]  = slot_memory[c].data + (size_t) n * needs.classes[c].slot_bytes;
        return true;
    }
    return false;
}

void expert_store::give_back_pages() {
    for (uint32_t c = 0; c < slot_memory.size(); c++) {
        slot_memory[c].give_back_beyond((size_t) cache.n_slots(c) * needs.classes[c].slot_bytes);
    }
}
