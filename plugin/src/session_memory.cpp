// The memory given: what the tensors need, and the layout (layout.h) made true from empty. resize.cpp goes on from there.
#include "session.h"

#include "base/status.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

// needs

size_t slot_bytes_of(const std::vector<flash_bundle> & bundles) {
    size_t most = 0;
    for (const auto & b : bundles) {
        most = std::max(most, b.cached_bytes);
    }
    return (most + 63) / 64 * 64;
}

uint64_t n_neurons_of(const std::vector<flash_bundle> & bundles) {
    return bundles.empty() ? 0 : bundles.back().first + bundles.back().n_neurons;
}

// With the mode OFF dense layers pass by whole; of experts there is always a choice.
bool llama_flash_session::uses_neuron_slots() const {
    return neuron_params.mode != LLAMA_FLASH_NEURONS_OFF ||
           std::any_of(bundles.begin(), bundles.end(), [](const flash_bundle & b) { return b.n_expert > 0; });
}

static void note_tensors(const std::vector<flash_tensor> & tensors, const std::vector<flash_record> & records, memory_needs & n) {
    n.panels.resize(tensors.size());
    for (size_t i = 0; i < tensors.size(); i++) {
        const flash_tensor & t = tensors[i];
        n.tables += sizeof(flash_tensor) + t.row_checksums.size() * sizeof(uint32_t);
        if (t.n_records == 0) {
            continue;
        }
        if (t.is_experts) {
            n.classes[t.size_class].records += t.n_records;
            n.classes[t.size_class].tensors++;
            n.expert_bytes += ggml_nbytes(&t.weight);
            n.largest_expert = std::max<uint64_t>(n.largest_expert, n.classes[t.size_class].slot_bytes);
            continue;
        }
        n.panels[i] = { t.offset, ggml_nbytes(&t.weight), records[t.first_record].bytes, t.n_records };
        n.panel_bytes += n.panels[i].bytes;
        for (uint32_t k = t.first_record; k < t.first_record + t.n_records; k++) {
            n.largest_panel = std::max(n.largest_panel, record_span(records[k]));
        }
    }
}

static void note_bundles(const std::vector<flash_bundle> & bundles, memory_needs & n) {
    constexpr uint64_t SHARED_TABLES = 1u << 20; // active sets, and what evaluations share
    size_t             streams       = 0;        // whose checksums are kept
    uint64_t           run           = 0;
    for (const auto & b : bundles) {
        bundle_needs needs;
        needs.record_bytes = b.record_bytes;
        needs.neurons      = b.n_neurons;
        needs.pinnable     = !b.split;
        for (const auto & p : b.parts) {
            needs.resident += p.present && !p.cached ? p.row_bytes * b.n_neurons : 0;
        }
        n.bundles.push_back(needs);
        streams += b.n_neurons * b.streams.size();
        run = std::max(run, b.record_bytes * std::min(b.n_neurons, FFN_RUN_ROWS) + 2 * FFN_PARTS * FLASH_SECTOR);
    }
    if (!bundles.empty()) {
        n.neuron_tables = n_neurons_of(bundles) * NEURON_ENTRY + streams * sizeof(uint32_t) + SHARED_TABLES;
        n.run           = FFN_RUN_ROWS;
        n.longest_run   = std::max<uint64_t>(run, neuron_store::LONGEST + 2 * FLASH_SECTOR);
        n.neuron_slot   = slot_bytes_of(bundles);
    }
}

void llama_flash_session::note_needs(uint32_t n_ubatch) {
    constexpr uint64_t CLASS_TABLES  = 4096; // buckets of a class in the cache
    constexpr uint64_t SHARED_TABLES = 1u << 18;
    memory_needs       n;
    n.tables = SHARED_TABLES + records.size() * (sizeof(flash_record) + SLOT_ENTRY) + class_bytes.size() * CLASS_TABLES;
    n.rows   = rows.memory_bytes();
    for (uint32_t bytes : class_bytes) {
        n.classes.push_back({ 0, 0, bytes });
    }
    note_tensors(tensors, records, n);
    note_bundles(bundles, n);
    n.n_ubatch = n_ubatch;
    n.work     = bundles.empty() ? 0 : ffn.bytes(bundles, n_ubatch);
    n.in_slots = !bundles.empty() && uses_neuron_slots();
    needs      = std::move(n);
}

llama_flash_requirements llama_flash_session::requirements() const {
    llama_flash_requirements q = {};
    for (const auto & t : tensors) {
        q.n_expert_tensors += t.is_experts;
        q.n_panel_tensors += !t.is_experts && !t.only_rows;
        (t.is_experts ? q.n_experts : q.n_panels) += t.n_records;
    }
    for (const auto & r : records) {
        q.largest_record = std::max<uint64_t>(q.largest_record, r.bytes);
    }
    for (const auto & b : bundles) {
        q.neuron_record = std::max<uint64_t>(q.neuron_record, b.cached_bytes);
    }
    for (const auto & b : needs.bundles) {
        q.neuron_resident += b.resident;
    }
    q.expert_bytes = needs.expert_bytes;
    q.panel_bytes  = needs.panel_bytes;
    q.n_bundles    = bundles.size();
    q.n_neurons    = needs.n_neurons();
    q.neuron_bytes = needs.neuron_bytes();
    q.min_memory   = needs.minimum();
    q.max_memory   = needs.maximum();
    return q;
}

// What the mode reads of a record, and where it goes in a slot.
void llama_flash_session::lay_out_bundles() {
    for (auto & b : bundles) {
        const ffn_part kept = b.gated ? ffn_part::gate : ffn_part::up;
        b.streams.clear();
        b.cached_bytes = 0;
        for (size_t p = 0; p < FFN_PARTS; p++) {
            bundle_part & part = b.parts[p];
            part.cached        = part.present && !(neuron_params.mode == LLAMA_FLASH_NEURONS_EXACT && p == (size_t) kept);
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
    neurons.forget_checksums(bundles);
    note_needs(neuron_params.n_ubatch);
}

int32_t llama_flash_session::set_neurons(const llama_flash_neuron_params & p, llama_flash_error * err) {
    if (!bound || p.mode > LLAMA_FLASH_NEURONS_OFF || p.n_ubatch == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_neurons: before bind_end, or an unknown mode, or no n_ubatch");
    }
    drop_all();
    neuron_params = p;
    lay_out_bundles();
    return LLAMA_FLASH_OK;
}

// the layout

static int32_t too_few(const memory_needs & needs, uint64_t bytes, llama_flash_error * err) {
    return flash_fail(err, LLAMA_FLASH_E_MEMORY, "%llu bytes for flash tensors are too few: at least %llu are needed", (unsigned long long) bytes,
                      (unsigned long long) needs.minimum());
}

int32_t llama_flash_session::divided(uint64_t bytes, llama_flash_memory & out, llama_flash_error * err) const {
    if (!bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "divide before bind_end");
    }
    if (bytes < needs.minimum()) {
        return too_few(needs, bytes, err);
    }
    out = describe(needs, divide(needs, bytes));
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session::set_memory(uint64_t bytes, llama_flash_error * err) {
    if (!bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_memory before bind_end");
    }
    if (bytes < needs.minimum()) {
        return too_few(needs, bytes, err);
    }
    const memory_layout to = divide(needs, bytes);
    drop_all();
    reads.forget_error(); // what is forgotten may have failed, that no longer matters
    memory     = describe(needs, to);
    standing   = to.standing;

    uint64_t     refused = 0; // bytes
    const char * what    = make_rings(refused);
    what                 = what ? what : make_neurons(to, refused);
    what                 = what ? what : make_panels(to, refused);
    what                 = what ? what : make_slots(to, refused);
    if (what) {
        drop_all();
        return flash_fail(err, LLAMA_FLASH_E_MEMORY, "the kernel refused %llu bytes for %s%s", (unsigned long long) refused, what,
                          limits_of(ENOMEM).c_str());
    }
    if (!read_neurons() || !read_pinned()) {
        const llama_flash_error e = reads.error();
        reads.forget_error();
        drop_all();
        if (err) {
            *err = e;
        }
        return e.code;
    }
    return LLAMA_FLASH_OK;
}

// These return what the kernel refused memory for, nullptr if nothing.

const char * llama_flash_session::make_rings(uint64_t & bytes) {
    bytes = standing.expert_ring + standing.panel_ring;
    if (bytes > 0) {
        ring_memory = mapping::allocate(bytes);
        if (!ring_memory.data) {
            return "the ring";
        }
    }
    if (rows.rows) {
        bytes       = rows.memory_bytes();
        rows.memory = mapping::allocate(bytes);
        if (!rows.memory.data) {
            return "rows of tables";
        }
    }
    expert_ring.configure(ring_memory.data, standing.expert_ring, 4096);
    panel_ring.configure(ring_memory.data ? ring_memory.data + standing.expert_ring : nullptr, standing.panel_ring, 4096);
    return nullptr;
}

const char * llama_flash_session::make_neurons(const memory_layout & to, uint64_t & bytes) {
    if (bundles.empty()) {
        neurons.configure(0, 0, 0, nullptr, nullptr, 0);
        return nullptr;
    }
    for (size_t i = 0; i < bundles.size(); i++) {
        flash_bundle & b = bundles[i];
        for (auto & p : b.parts) {
            p.resident = nullptr;
            if (p.present && !p.cached) {
                bytes = p.row_bytes * b.n_neurons;
                neuron_homes.push_back(mapping::allocate(bytes));
                p.resident = neuron_homes.back().data;
                if (!p.resident) {
                    return "neurons";
                }
            }
        }
        b.n_pinned    = to.records[i];
        b.home        = nullptr;
        b.home_memory = -1;
        bytes         = needs.bundles[i].home_bytes(b.n_pinned);
        if (b.n_pinned > 0 && !make_home(b, bytes)) {
            return "neurons";
        }
    }
    bytes              = standing.neuron_ring;
    neuron_ring_memory = mapping::allocate(bytes);
    if (!neuron_ring_memory.data) {
        return "neurons";
    }
    const size_t slot_bytes = needs.neuron_slot;
    if (needs.in_slots) { // addresses for all neurons: the memory given may grow
        bytes        = std::max(to.neuron_slots, FEWEST_NEURON_SLOTS) * slot_bytes;
        neuron_slots = mapping::allocate(needs.n_neurons() * slot_bytes, bytes);
        if (!neuron_slots.data) {
            return "neurons";
        }
    }
    neurons.window    = neuron_params.window;
    neurons.merge_gap = neuron_params.merge_gap;
    neurons.configure((uint32_t) needs.n_neurons(), to.neuron_slots, slot_bytes, neuron_slots.data, neuron_ring_memory.data, standing.neuron_ring);
    ffn.reserve(bundles, needs.n_ubatch);
    return nullptr;
}

const char * llama_flash_session::make_panels(const memory_layout & to, uint64_t & bytes) {
    for (size_t i = 0; i < tensors.size(); i++) {
        tensors[i].n_pinned = to.panels[i];
        bytes               = needs.panels[i].home_bytes(to.panels[i]);
        if (to.panels[i] > 0 && !make_home(tensors[i], bytes)) {
            return "pinned panels";
        }
    }
    return nullptr;
}

const char * llama_flash_session::make_slots(const memory_layout & to, uint64_t & bytes) {
    for (size_t c = 0; c < class_bytes.size(); c++) {
        bytes = (uint64_t) to.slots[c] * class_bytes[c];
        slot_memory.push_back(mapping::allocate((size_t) needs.classes[c].records * class_bytes[c], bytes));
        if (bytes > 0 && !slot_memory.back().data) {
            return "slots";
        }
        for (uint32_t i = 0; i < to.slots[c]; i++) {
            slot_data.push_back(slot_memory.back().data + (size_t) i * class_bytes[c]);
            slot_fresh.push_back(1);
        }
    }
    cache.configure(to.slots, records.size());
    return nullptr;
}

// Addresses for the tensor's panels, memory for the first `least` bytes at least.
bool llama_flash_session::make_home(flash_tensor & t, uint64_t least) {
    homes.push_back(mapping::home(needs.panels[(size_t) (&t - tensors.data())].home_bytes(t.n_records), least));
    if (!homes.back().data) {
        homes.pop_back();
        return false;
    }
    t.home_memory = (int32_t) homes.size() - 1;
    t.home        = homes.back().data + (t.offset - flash_sector_floor(t.offset));
    return true;
}

// The same for the bundle's records.
bool llama_flash_session::make_home(flash_bundle & b, uint64_t least) {
    neuron_homes.push_back(mapping::home(needs.bundles[b.index].home_bytes(b.n_neurons), least));
    if (!neuron_homes.back().data) {
        neuron_homes.pop_back();
        return false;
    }
    b.home_memory = (int32_t) neuron_homes.size() - 1;
    b.home        = neuron_homes.back().data + (b.offset - flash_sector_floor(b.offset));
    return true;
}

// what is pinned or resident is read at once

// Reads pinned records and the parts that the mode keeps. false: failed.
bool llama_flash_session::read_neurons() {
    for (auto & b : bundles) {
        reads.look_again();
        if (!reads.check_file(*b.file, b.name, b.offset, b.tensor_bytes())) {
            return false;
        }
        if (b.n_pinned > 0) {
            neurons.read_home(b, 0, b.n_pinned);
        }
        if (needs.bundles[b.index].resident > 0) {
            neurons.stream_begin(b, 0, FFN_RUN_ROWS, false, true);
            for (uint32_t done = 0; done < b.n_neurons;) { // an expert's rows are whole groups of the kernel's: all are one matrix
                const neuron_store::run * run = neurons.stream_next();
                if (!run) {
                    break;
                }
                if (check_for(neurons.run_state(), 0) == byte_check::refuse) { // of what stays resident nothing is kept
                    reads.fail_bytes(*b.file, b.name, b.offset + run->first * b.record_bytes, run->count * b.record_bytes, 0);
                    break;
                }
                for (size_t p = 0; p < FFN_PARTS; p++) {
                    const bundle_part & part = b.parts[p];
                    if (!part.resident) {
                        continue;
                    }
                    uint8_t * rows = const_cast<uint8_t *>(part.resident) + done * part.row_bytes;
                    for (uint32_t i = 0; i < run->count; i++) {
                        memcpy(rows + i * part.row_bytes, run->data[p] + i * run->stride[p], part.row_bytes);
                    }
                    stock_repack_rows(part.kernel, &part.weight, rows, run->count);
                }
                done += run->count;
                neurons.stream_give();
            }
        }
        reads.drain();
        reads.look_again();
        if (failed() || !reads.check_file(*b.file, b.name, b.offset, b.tensor_bytes())) { // it may have changed while it was read
            return false;
        }
        // of what is read while nothing has touched the file, a checksum is kept when it passes by: pinned records may never do so
        if (b.file->look() != file_state::same && !check_pinned(b, 0, b.n_pinned)) {
            return false;
        }
    }
    return true;
}

// Pinned records that have just arrived. false (and failed): they are not what they were.
bool llama_flash_session::check_pinned(const flash_bundle & b, uint32_t first, uint32_t n) {
    const file_state      state  = b.file->look();
    const bundle_stream & stream = b.streams[0];
    for (uint32_t i = first; i < first + n; i++) {
        uint32_t &       known = neurons.checksum_of(b, i, stream);
        const byte_check check = check_for(state, known);
        const uint8_t *  data  = b.home + i * b.record_bytes + stream.base;
        if (check == byte_check::none || check_bytes(check, known, check == byte_check::refuse ? 0 : checksum(data, stream.bytes))) {
            continue;
        }
        reads.fail_bytes(*b.file, b.name, b.offset + i * stream.stride + stream.base, stream.bytes, known);
        return false;
    }
    return true;
}

// Reads pinned panels. false: failed.
bool llama_flash_session::read_pinned() {
    for (auto & t : tensors) {
        for (uint32_t i = 0; i < t.n_pinned; i++) {
            flash_record & r = records[t.first_record + i];
            r.place          = record_place::pinned;
            r.data           = t.home + (r.offset - t.offset);
        }
        // one read for all of them: their sectors overlap
        if (t.n_pinned > 0) {
            const flash_record & last = records[t.first_record + t.n_pinned - 1];
            reads.read(arrivals, t.first_record, *t.file, t.offset, last.offset + last.bytes - t.offset, t.home);
            for (uint32_t i = 0; i < t.n_pinned; i++) {
                records[t.first_record + i].state = record_state::reading;
            }
        }
    }
    reads.drain();
    for (const auto & t : tensors) {
        reads.look_again();
        if (t.n_pinned > 0 && !check_file(records[t.first_record])) {
            break;
        }
    }
    if (failed()) {
        return false;
    }
    for (auto & t : tensors) {
        if (t.n_pinned == 0) {
            continue;
        }
        const flash_record & last = records[t.first_record + t.n_pinned - 1];
        stock_repack_rows(t.kernel, &t.weight, t.home, last.row + last.rows);
        for (uint32_t i = 0; i < t.n_pinned; i++) {
            records[t.first_record + i].state = record_state::ready;
        }
    }
    return true;
}

// forgets every record; no op is in progress
void llama_flash_session::drop_all() {
    neurons.forget_all();
    reads.drain();
    for (auto & r : records) {
        forget(r);
        r.used = 0;
    }
    for (auto & t : tensors) {
        t.n_pinned = 0;
        t.home     = nullptr;
    }
    op.plan.clear();
    op.planned = 0;
    look       = {};
    panel_order.clear();
    panel_order_known = false;
    panel_next        = 0;
    for (auto & t : tensors) {
        t.order  = 0;
        t.tokens = 0;
    }
    tokens       = 0;
    panel_tokens = 0;
    slot_memory.clear();
    slot_data.clear();
    slot_fresh.clear();
    homes.clear();
    ring_memory = mapping();
    rows.memory = mapping();
    memory      = {};
    standing    = {};
    resizing    = {};
    neurons.configure(0, 0, 0, nullptr, nullptr, 0);
    neuron_homes.clear();
    neuron_slots       = mapping();
    neuron_ring_memory = mapping();
    for (auto & b : bundles) {
        b.n_pinned = 0;
        b.tokens   = 0;
        b.forget_evaluation();
    }
}
