// Memory of neurons: what a mode reads of a record, slots and ring, and what is pinned or resident.
#include "store/neurons.h"

#include <algorithm>
#include <cstring>
#include <utility>

// needs

void neuron_store::lay_out(uint32_t mode) {
    for (auto & b : bundles) {
        const ffn_part kept = b.gated ? ffn_part::gate : ffn_part::up;
        b.streams.clear();
        b.cached_bytes = 0;
        for (size_t p = 0; p < FFN_PARTS; p++) {
            bundle_part & part = b.parts[p];
            part.cached        = part.present && !(mode == LLAMA_FLASH_NEURONS_EXACT && p == (size_t) kept);
            if (!part.cached) {
                continue;
            }
            part.slot_offset = b.cached_bytes;
            if (b.split || b.streams.empty()) {
                b.streams.push_back({ b.split ? b.n_ff * part.offset : part.offset, b.split ? part.row_bytes : b.record_bytes, 0, b.cached_bytes });
            }
            b.streams.back().bytes += part.row_bytes;
            b.cached_bytes += part.row_bytes;
        }
        b.forget_evaluation();
    }
    forget_checksums();
}

void neuron_store::forget_checksums() {
    size_t n = 0;
    first_checksum.clear();
    for (const auto & b : bundles) {
        first_checksum.push_back(n);
        n += b.n_neurons * b.streams.size();
    }
    checksums.assign(n, 0);
}

static bundle_needs needs_of(const flash_bundle & b) {
    bundle_needs n;
    n.record_bytes = b.record_bytes;
    n.neurons      = b.n_neurons;
    n.pinnable     = !b.split;
    n.page         = page_bytes();
    for (const auto & p : b.parts) {
        n.resident += p.present && !p.cached ? p.row_bytes * b.n_neurons : 0;
    }
    return n;
}

void neuron_store::note_needs(memory_needs & n, uint32_t mode) const {
    constexpr uint64_t SHARED_TABLES = 1u << 20; // active sets, and what evaluations share
    size_t             cached        = 0;        // bytes of a record, the most
    uint64_t           run           = 0;
    if (bundles.empty()) {
        return;
    }
    n.in_slots = mode != LLAMA_FLASH_NEURONS_OFF; // dense layers pass by whole; of experts there is always a choice
    for (const auto & b : bundles) {
        n.bundles.push_back(needs_of(b));
        n.in_slots = n.in_slots || b.n_expert > 0;
        cached     = std::max(cached, b.cached_bytes);
        run        = std::max(run, b.record_bytes * std::min(b.n_neurons, FFN_RUN_ROWS) + 2 * FFN_PARTS * FLASH_SECTOR);
    }
    n.neuron_tables = n.n_neurons() * NEURON_ENTRY + checksums.size() * sizeof(uint32_t) + SHARED_TABLES;
    n.run           = FFN_RUN_ROWS;
    n.longest_run   = std::max<uint64_t>(run, LONGEST + 2 * FLASH_SECTOR);
    n.neuron_slot   = (cached + 63) / 64 * 64;
}

// from empty

void neuron_store::configure(uint32_t n_neurons, uint32_t n_slots, size_t bytes) {
    cache.configure({ n_slots }, n_neurons, slot_cache::NEURONS_HALF_LIFE);
    neuron_ring.configure(ring_mapped.data, ring_mapped.bytes, 4096);
    ring_bytes = ring_mapped.bytes;
    slots      = slots_mapped.data;
    slot_bytes = bytes;
    slot_of.assign(n_neurons, slot_cache::NONE);
    last_use.assign(n_neurons, 0);
    pending.assign(n_slots, 0);
    asked_for.assign(n_slots, 0);
    uses.clear();
}

const char * neuron_store::make(const memory_layout & to, const llama_flash_neuron_params & params, uint64_t & bytes) {
    window    = params.window;
    merge_gap = params.merge_gap;
    for (auto & b : bundles) {
        for (auto & p : b.parts) {
            if (p.present && !p.cached) {
                bytes = p.row_bytes * b.n_neurons;
                homes.push_back(mapping::allocate(bytes));
                p.resident = homes.back().data;
                if (!p.resident) {
                    return "neurons";
                }
            }
        }
        b.n_pinned = to.records[b.index];
        bytes      = needs.bundles[b.index].home_bytes(b.n_pinned);
        if (b.n_pinned > 0 && !make_home(b, bytes)) {
            return "neurons";
        }
    }
    bytes       = to.standing.neuron_ring;
    ring_mapped = bytes > 0 ? mapping::allocate(bytes) : mapping();
    if (bytes > 0 && !ring_mapped.data) {
        return "neurons";
    }
    if (needs.in_slots) { // addresses for all neurons: the memory given may grow
        bytes        = std::max(to.neuron_slots, FEWEST_NEURON_SLOTS) * needs.neuron_slot;
        slots_mapped = mapping::allocate(needs.n_neurons() * needs.neuron_slot, bytes);
        if (!slots_mapped.data) {
            return "neurons";
        }
    }
    configure((uint32_t) needs.n_neurons(), to.neuron_slots, needs.neuron_slot);
    return nullptr;
}

// Addresses for the bundle's records, memory for the first `least` bytes at least.
bool neuron_store::make_home(flash_bundle & b, uint64_t least) {
    homes.push_back(mapping::home(needs.bundles[b.index].home_bytes(b.n_neurons), least));
    if (!homes.back().data) {
        homes.pop_back();
        return false;
    }
    b.home_memory = (int32_t) homes.size() - 1;
    b.home        = homes.back().data + (b.offset - flash_sector_floor(b.offset));
    return true;
}

void neuron_store::drop_all() {
    drop_kept();
    slots_mapped = mapping();
    ring_mapped  = mapping();
    homes.clear();
    configure(0, 0, 0);
    for (auto & b : bundles) {
        for (auto & p : b.parts) {
            p.resident = nullptr;
        }
        b.n_pinned    = 0;
        b.home        = nullptr;
        b.home_memory = -1;
        b.tokens      = 0;
        b.forget_evaluation();
    }
}

// reads

// The sectors at both ends hold bytes of neighbours, too. If these are in memory already, the same bytes are written over them.
void neuron_store::read_home(const flash_bundle & b, uint32_t first, uint32_t n) {
    const uint64_t begin = first * b.record_bytes;
    queue.read(pinned, b.index, *b.file, b.offset + begin, n * b.record_bytes, const_cast<uint8_t *>(b.home) + begin);
}

void neuron_store::home_reads::ended(uint32_t, const reader::done & done, file_state) {
    if (done.error != 0) {
        queue.fail_read(*done.file, "ffn_bundle", done.error, done.error_offset, 0);
    }
}

// false: failed
bool neuron_store::read_pinned() {
    for (auto & b : bundles) {
        queue.look_again();
        if (!check_file(b)) {
            return false;
        }
        if (b.n_pinned > 0) {
            read_home(b, 0, b.n_pinned);
        }
        if (needs.bundles[b.index].resident > 0) {
            fill_resident(b);
        }
        queue.drain();
        queue.look_again();
        if (queue.failed() || !check_file(b)) { // it may have changed while it was read
            return false;
        }
        // while nothing touches the file, checksums are noted by evaluations that pass over records; pinned ones may never be passed over
        if (b.file->look() != file_state::same && !check_pinned(b, 0, b.n_pinned)) {
            return false;
        }
    }
    return true;
}

// false: failed
bool neuron_store::fill_resident(const flash_bundle & b) {
    stream_begin(b, 0, FFN_RUN_ROWS, false, true);
    for (uint32_t done = 0; done < b.n_neurons;) { // an expert's rows are whole groups of the kernel's: all are one matrix
        const run * r = stream_next();
        if (!r) {
            return false;
        }
        if (check_for(run_state(), 0) == byte_check::refuse) { // of resident parts no checksum is kept
            queue.fail_bytes(*b.file, b.name, b.offset + r->first * b.record_bytes, r->count * b.record_bytes, 0);
            return false;
        }
        for (size_t p = 0; p < FFN_PARTS; p++) {
            const bundle_part & part = b.parts[p];
            if (!part.resident) {
                continue;
            }
            uint8_t * rows = const_cast<uint8_t *>(part.resident) + done * part.row_bytes;
            for (uint32_t i = 0; i < r->count; i++) {
                memcpy(rows + i * part.row_bytes, r->data[p] + i * r->stride[p], part.row_bytes);
            }
            stock_repack_rows(part.kernel, &part.weight, rows, r->count);
        }
        done += r->count;
        stream_release();
    }
    return true;
}

// Pinned records that have just arrived. false (and failed): their bytes are not those of their first read.
bool neuron_store::check_pinned(const flash_bundle & b, uint32_t first, uint32_t n) {
    const file_state      state  = b.file->look();
    const bundle_stream & stream = b.streams[0];
    for (uint32_t i = first; i < first + n; i++) {
        uint32_t &       known = checksum_of(b, i, stream);
        const byte_check check = check_for(state, known);
        const uint8_t *  data  = b.home + i * b.record_bytes + stream.base;
        if (check == byte_check::none || check_bytes(check, known, check == byte_check::refuse ? 0 : checksum(data, stream.bytes))) {
            continue;
        }
        queue.fail_bytes(*b.file, b.name, b.offset + i * stream.stride + stream.base, stream.bytes, known);
        return false;
    }
    return true;
}

// a moving limit

void neuron_store::note_layout(memory_layout & l) const {
    l.neuron_slots           = n_slots();
    l.standing.neurons_whole = true;
    for (const auto & b : bundles) {
        l.records.push_back(b.n_pinned);
        l.standing.neurons_whole = l.standing.neurons_whole && b.n_pinned == b.n_neurons;
    }
}

void neuron_store::fit(memory_layout & to) const {
    if (to.neuron_slots > 0) {
        to.neuron_slots = (uint32_t) std::min<uint64_t>(to.neuron_slots, slots_mapped.bytes / needs.neuron_slot);
    }
    for (const auto & b : bundles) {
        uint32_t & n = to.records[b.index];
        while (b.home && needs.bundles[b.index].home_bytes(n) > homes[(size_t) b.home_memory].bytes) {
            n = (n - 1) / FFN_RUN_ROWS * FFN_RUN_ROWS;
        }
    }
}

bool neuron_store::give_back_one(const memory_layout & to, bool move, bool & stuck) {
    for (auto & b : bundles) {
        if (b.n_pinned > to.records[b.index]) {
            // what is no longer pinned needs slots to be computed in; the least there are with a limit is room for them
            add_slots(std::min(to.neuron_slots, FEWEST_NEURON_SLOTS));
            stream_end();
            // of experts all or nothing is pinned
            b.n_pinned = b.n_expert > 0 ? 0 : std::max(to.records[b.index], (b.n_pinned - 1) / FFN_RUN_ROWS * FFN_RUN_ROWS);
            return true;
        }
    }
    if (n_slots() > to.neuron_slots) {
        if (retire_slot(move)) {
            return true;
        }
        stuck = true;
    }
    return false;
}

bool neuron_store::add_slots(const memory_layout & to) {
    if (n_slots() >= to.neuron_slots) {
        return false;
    }
    add_slots(std::min(to.neuron_slots, n_slots() + 1024));
    return true;
}

flash_bundle * neuron_store::to_pin(const memory_layout & to) {
    const auto found = std::find_if(bundles.begin(), bundles.end(), [&](const flash_bundle & b) { return b.n_pinned < to.records[b.index]; });
    return found == bundles.end() ? nullptr : &*found;
}

bool neuron_store::pin_run(flash_bundle & b) {
    if (!b.home && !make_home(b, 0)) {
        return false;
    }
    stream_end();
    const uint32_t n = std::min(b.n_neurons - b.n_pinned, FFN_RUN_ROWS);
    queue.look_again();
    if (!check_file(b)) {
        return false;
    }
    read_home(b, b.n_pinned, n);
    queue.submit();
    queue.drain();
    queue.look_again();
    if (queue.failed() || !check_file(b) || !check_pinned(b, b.n_pinned, n)) { // it may have changed while it was read
        return false;
    }
    b.n_pinned += n;
    return true;
}

void neuron_store::give_back_pages() {
    slots_mapped.give_back_beyond((size_t) n_slots() * needs.neuron_slot);
    for (const auto & b : bundles) {
        if (b.home) {
            homes[(size_t) b.home_memory].give_back_beyond(needs.bundles[b.index].home_bytes(b.n_pinned));
        }
    }
}
