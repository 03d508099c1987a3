#include "store/neurons.h"

#include <algorithm>
#include <cstring>
#include <functional>

// uses

void neuron_store::use(const flash_bundle & b, uint32_t n_tokens) {
    constexpr uint64_t PAPERS_WINDOW = 5; // what "newly active" is counted against
    notes.stats.neurons_active += b.active.size();
    for (uint32_t i : b.active) {
        const uint32_t n = b.first + i;
        if (notes.trace.on()) {
            notes.trace.note({ b.tokens, notes.first_bundle + b.index, i, n_tokens, 1 });
        }
        notes.count_reuse(b.tokens - n_tokens, last_use[n]);
        if (last_use[n] == 0 || b.tokens - n_tokens - (last_use[n] - 1) >= PAPERS_WINDOW) {
            notes.stats.neurons_newly_active++;
        }
        last_use[n] = b.tokens + 1;
        if (i < b.n_pinned) {
            continue;
        }
        cache.use(n, b.tokens, n_tokens, 1);
        if (window != NO_WINDOW) {
            uses.push_back({ n, b.tokens + 1 });
        }
    }
}

// drops what none of the last `window` tokens before this one used
void neuron_store::expire(uint64_t now) {
    while (!uses.empty() && uses.front().token + window <= now) {
        const use_note note = uses.front();
        uses.pop_front();
        if (last_use[note.neuron] <= note.token && slot_of[note.neuron] >= 0 && pending[(size_t) slot_of[note.neuron]] == 0) {
            drop(note.neuron);
            notes.stats.evictions++;
        }
    }
}

void neuron_store::drop(uint32_t neuron) {
    cache.drop(slot_of[neuron]);
    slot_of[neuron] = slot_cache::NONE;
}

// demand

bool neuron_store::take(uint32_t neuron, bool evict) {
    int32_t       evicted;
    const int32_t slot = cache.take(0, neuron, evict, &evicted);
    if (slot == slot_cache::NONE) {
        return false;
    }
    if (evicted != slot_cache::NONE) {
        slot_of[(size_t) evicted] = slot_cache::NONE;
        notes.stats.evictions++;
    }
    slot_of[neuron]          = slot;
    asked_for[(size_t) slot] = 0;
    cache.set_reading(slot, true);
    n_coming++;
    return true;
}

// one of the neuron's streams has arrived, or its read has failed
void neuron_store::note_here(int32_t slot) {
    if (--pending[(size_t) slot] == 0) {
        cache.set_reading(slot, false);
        n_coming--;
    }
}

// The read of the neuron has failed.
void neuron_store::drop_failed(const flash_bundle & b, const item & i) {
    const uint32_t neuron = b.first + i.neuron;
    if (slot_of[neuron] == i.slot && pending[(size_t) i.slot] > 0) { // once, if several of its streams fail
        pending[(size_t) i.slot] = 1;
        note_here(i.slot);
        drop(neuron);
    }
}

void neuron_store::demand(const flash_bundle & b, const uint32_t * list, size_t n, bool count) {
    cancel_ahead();
    if (streaming()) {
        stream_end();
    }
    if (window != NO_WINDOW) {
        expire(b.tokens);
    }
    size_t missing = 0;
    for (size_t k = 0; k < n; k++) { // hold those in slots before anything is evicted
        const uint32_t neuron = b.first + list[k];
        if (list[k] < b.n_pinned) {
            continue;
        }
        if (slot_of[neuron] >= 0) {
            cache.hold(slot_of[neuron]);
            asked_for[(size_t) slot_of[neuron]] = 1;
        } else {
            missing++;
        }
    }
    if (count) {
        notes.stats.hits += n - missing;
        notes.stats.misses += missing;
    }
    if (missing == 0 || !check_file(b)) {
        return;
    }
    wanted.clear();
    for (size_t k = 0; k < n; k++) {
        if (list[k] >= b.n_pinned && slot_of[b.first + list[k]] < 0) {
            bool taken = take(b.first + list[k]);
            if (!taken) {
                hold_only(b, list, n);
                taken = take(b.first + list[k]);
            }
            if (!taken) { // reads ahead hold the slots: they were begun when there were more slots
                let_land();
                hold_only(b, list, n);
                taken = take(b.first + list[k]);
            }
            if (!taken) { // cannot be: reads ahead leave enough slots for a chunk (may_come)
                queue.fail_op(LLAMA_FLASH_E_INTERNAL, b.name, "no slot for a neuron");
                break;
            }
            wanted.push_back({ list[k], slot_of[b.first + list[k]] });
        }
    }
    schedule(b, false);
}

// Only the listed neurons stay held. Those that other parts of the evaluation have used may be evicted from now on.
void neuron_store::hold_only(const flash_bundle & b, const uint32_t * list, size_t n) {
    cache.end_op();
    for (size_t k = 0; k < n; k++) {
        if (list[k] >= b.n_pinned && slot_of[b.first + list[k]] >= 0) {
            cache.hold(slot_of[b.first + list[k]]);
        }
    }
}

void neuron_store::expect(const flash_bundle & b, const uint32_t * list, size_t n) {
    wanted.clear();
    for (size_t k = 0; k < n && !b.split; k++) {
        const uint32_t neuron = b.first + list[k];
        if (list[k] < b.n_pinned || slot_of[neuron] >= 0) {
            continue;
        }
        if (may_come() == 0 || !take(neuron)) {
            break;
        }
        wanted.push_back({ list[k], slot_of[neuron] });
        if (window != NO_WINDOW) {
            uses.push_back({ neuron, b.tokens + 2 });
        }
    }
    notes.stats.neurons_expected += wanted.size();
    schedule(b, true);
    pump();
}

bool neuron_store::warm(const flash_bundle & b, const uint32_t * list, size_t n) {
    bool room = true;
    wanted.clear();
    for (size_t k = 0; k < n && room; k++) {
        const uint32_t neuron = b.first + list[k];
        if (list[k] < b.n_pinned || slot_of[neuron] >= 0) {
            continue;
        }
        if (cache.score(neuron) < 0.0) {
            cache.use(neuron, b.tokens, 1, 1); // hot in an earlier process: counts as one use
        }
        room = take(neuron, false);
        if (room) {
            wanted.push_back({ list[k], slot_of[neuron] });
            if (window != NO_WINDOW) {
                uses.push_back({ neuron, b.tokens + 2 });
            }
        }
    }
    schedule(b, true);
    pump();
    return room;
}

// reads

uint32_t neuron_store::new_read(const flash_bundle & b, const bundle_stream * stream) {
    if (free_reads.empty()) {
        free_reads.push_back((uint32_t) reads.size());
        reads.emplace_back();
    }
    const uint32_t index = free_reads.back();
    free_reads.pop_back();
    read & r = reads[index];
    r.bundle = &b;
    r.stream = stream;
    r.entry  = ring::NONE;
    r.jobs   = 0;
    r.failed = false;
    r.state  = file_state::same;
    r.items.clear();
    return index;
}

void neuron_store::free_read(uint32_t index) {
    if (reads[index].entry != ring::NONE) {
        neuron_ring.release(reads[index].entry);
    }
    free_reads.push_back(index);
}

// Makes reads of `wanted` (ascending): neighbours in the file, and those with little between them, together.
void neuron_store::schedule(const flash_bundle & b, bool ahead) {
    for (const auto & stream : b.streams) {
        size_t k = 0;
        while (k < wanted.size()) {
            const uint32_t index = new_read(b, &stream);
            read &         r     = reads[index];
            const uint64_t begin = wanted[k].neuron * stream.stride;
            uint64_t       end   = begin;
            while (k < wanted.size()) {
                const uint64_t next = wanted[k].neuron * stream.stride;
                if (next > end + merge_gap || next + stream.bytes > begin + std::max(LONGEST, stream.bytes)) {
                    break;
                }
                pending[(size_t) wanted[k].slot]++;
                r.items.push_back(wanted[k++]);
                end = next + stream.bytes;
            }
            r.ahead = ahead;
            (ahead ? scheduled_ahead : scheduled).push_back(index);
        }
    }
}

// Reads that were only expected and have not begun: a demand comes first, and may be for other neurons.
void neuron_store::cancel_ahead() {
    for (uint32_t index : scheduled_ahead) {
        for (const item & i : reads[index].items) {
            drop_failed(*reads[index].bundle, i);
        }
        free_read(index);
    }
    scheduled_ahead.clear();
}

bool neuron_store::start(uint32_t index) {
    read &                r      = reads[index];
    const bundle_stream & stream = *r.stream;
    const uint64_t        begin  = r.bundle->offset + stream.base + r.items.front().neuron * stream.stride;
    const uint64_t        end    = r.bundle->offset + stream.base + r.items.back().neuron * stream.stride + stream.bytes;
    const uint64_t        floor  = flash_sector_floor(begin);

    r.entry = neuron_ring.take(flash_sector_ceil(end) - floor, index);
    if (r.entry == ring::NONE) {
        return false;
    }
    r.data = neuron_ring.address(r.entry) + (begin - floor);
    r.jobs = 1;
    n_started++;
    queue.read(*this, index, *r.bundle->file, begin, end - begin, r.data);
    queue.used(r.items.size() * stream.bytes);
    return true;
}

void neuron_store::pump() {
    for (auto * queue : { &scheduled, &scheduled_ahead }) {
        while (!queue->empty() && start(queue->front())) {
            queue->pop_front();
        }
    }
    queue.submit();
}

bool neuron_store::nobody_asked(const read & r) const {
    return r.stream && r.ahead && std::none_of(r.items.begin(), r.items.end(), [&](const item & i) {
               return slot_of[r.bundle->first + i.neuron] == i.slot && asked_for[(size_t) i.slot];
           });
}

void neuron_store::ended(uint32_t index, const reader::done & done_read, file_state state) {
    read & r = reads[index];
    if (done_read.error != 0 && nobody_asked(r)) {
        queue.miss();
    } else if (done_read.error != 0) {
        queue.fail_read(*done_read.file, r.bundle->name, done_read.error, done_read.error_offset, r.bundle->record_bytes);
    }
    r.failed = r.failed || done_read.error != 0;
    r.state  = std::max(r.state, state);
    if (--r.jobs > 0 || !r.stream) {
        return; // a run waits in `runs`
    }
    if (!r.failed) {
        done.push_back(index);
        return;
    }
    n_started--;
    for (const item & i : r.items) {
        drop_failed(*r.bundle, i);
    }
    free_read(index);
}

// landing

bool neuron_store::begin_landing() {
    landing.clear();
    landing_reads.swap(done);
    for (uint32_t index : landing_reads) {
        for (uint32_t i = 0; i < reads[index].items.size(); i++) {
            const item & it = reads[index].items[i];
            if (slot_of[reads[index].bundle->first + it.neuron] == it.slot) {
                landing.push_back({ index, i, false });
            }
        }
    }
    next_item.store(0, std::memory_order_relaxed);
    return !landing_reads.empty();
}

uint8_t * neuron_store::copy(const read & r, uint32_t k) const {
    const item & i   = r.items[k];
    uint8_t *    dst = slots + (size_t) i.slot * slot_bytes;
    memcpy(dst + r.stream->slot_offset, r.data + (i.neuron - r.items.front().neuron) * r.stream->stride, r.stream->bytes);
    return dst;
}

void neuron_store::end_landing() {
    for (const landing_item & l : landing) {
        const read & r = reads[l.read];
        const item & i = r.items[l.item];
        if (slot_of[r.bundle->first + i.neuron] != i.slot) {
            continue; // another of its streams was not sound
        }
        if (l.sound) {
            note_here(i.slot);
            continue;
        }
        if (r.ahead && !asked_for[(size_t) i.slot]) {
            queue.miss();
        } else {
            fail_neuron(*r.bundle, i.neuron, *r.stream);
        }
        drop_failed(*r.bundle, i);
    }
    for (uint32_t index : landing_reads) {
        n_started--;
        free_read(index);
    }
    landing.clear();
    landing_reads.clear();
}

// checksums

bool neuron_store::is_sound(const flash_bundle & b, uint32_t neuron, const bundle_stream & stream, const uint8_t * data, file_state state) {
    uint32_t &       known = checksum_of(b, neuron, stream);
    const byte_check check = check_for(state, known);
    return check == byte_check::none || (check != byte_check::refuse && check_bytes(check, known, checksum(data, stream.bytes)));
}

void neuron_store::fail_neuron(const flash_bundle & b, uint32_t neuron, const bundle_stream & stream) {
    queue.fail_bytes(*b.file, b.name, b.offset + stream.base + neuron * stream.stride, stream.bytes, checksum_of(b, neuron, stream));
}

void neuron_store::drop_reads() {
    cancel_ahead();
    while (!queue.idle()) {
        queue.settle(true);
    }
    stream_end();
    const std::vector<uint32_t> waiting(scheduled.begin(), scheduled.end());
    scheduled.clear();
    done.insert(done.end(), waiting.begin(), waiting.end());
    for (uint32_t index : done) {
        for (const item & i : reads[index].items) {
            drop_failed(*reads[index].bundle, i);
        }
        n_started -= reads[index].entry != ring::NONE;
        free_read(index);
    }
    done.clear();
}

void neuron_store::settle() {
    cancel_ahead();
    let_land();
}

void neuron_store::add_slots(uint32_t n) {
    while (cache.n_slots(0) < n) {
        cache.add(0);
    }
    pending.resize(std::max<size_t>(pending.size(), n), 0);
    asked_for.resize(pending.size(), 0);
}

bool neuron_store::retire_slot(bool move) {
    const slot_cache::retired r = cache.retire(0, move);
    if (!r.done) {
        return false;
    }
    if (r.evicted != slot_cache::NONE) {
        slot_of[(size_t) r.evicted] = slot_cache::NONE;
        notes.stats.evictions++;
    }
    if (r.moved != slot_cache::NONE) {
        slot_of[cache.record_in(r.moved)] = r.moved;
        memcpy(slots + (size_t) r.moved * slot_bytes, slots + (size_t) r.slot * slot_bytes, slot_bytes);
    }
    return true;
}

void neuron_store::drop_kept() {
    drop_reads();
    for (uint32_t neuron = 0; neuron < slot_of.size(); neuron++) {
        if (slot_of[neuron] >= 0) {
            drop(neuron);
        }
    }
    uses.clear();
}
