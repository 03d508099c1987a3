// The memory given may change while the model runs: slots and pinned records are given back, or added, without dropping the rest.
//
// resize() only says where to go. The way there is gone in steps of about a millisecond: by each op as it begins, and by resize()
// itself, which is called again until it is done. Memory is given back before any is taken. What leaves is what the cache would
// have evicted next; what lies in slots that vanish moves to slots that stay, unless there is no time for it. Rings, work space, and
// what a mode keeps resident stay.
#include "session.h"

#include "status.h"

#include <algorithm>
#include <cstring>

constexpr int64_t IDLE_NS      = 200000000; // without an op for so long, nobody waits
constexpr int64_t LONG_STEP_NS = 20000000;

// bytes that no resize changes
uint64_t llama_flash_session::resize_least() const {
    uint64_t bytes = bookkeeping_bytes() + neuron_bookkeeping() + memory.stream + memory.resident;
    if (!bundles.empty()) {
        bytes += 2 * HUGE_PAGE;
        if (uses_neuron_slots()) {
            bytes += FEWEST_NEURON_SLOTS * (slot_bytes_of(bundles) + 64);
        }
    }
    return bytes;
}

// bytes at the begin of the tensor's home that its first n panels take
uint64_t llama_flash_session::home_bytes_of(const flash_tensor & t, uint32_t n) const {
    if (n == 0) {
        return 0;
    }
    const flash_record & last = records[t.first_record + n - 1];
    return flash_sector_ceil(last.offset + last.bytes) - flash_sector_floor(t.offset);
}

// Splits what is left as set_memory does: neurons, then panels, then experts.
void llama_flash_session::plan_resize(uint64_t bytes) {
    const llama_flash_requirements need = requirements();
    const bool                     all  = bytes >= need.max_memory;
    uint64_t                       left = bytes - resize_least();

    resizing.neuron_slots = 0;
    resizing.bundle_records.assign(bundles.size(), 0);
    if (!bundles.empty()) {
        const bool     others = need.n_panels + need.n_experts > 0;
        const uint64_t room   = others && !all ? left / 2 : left;
        const uint64_t slot   = uses_neuron_slots() ? slot_bytes_of(bundles) + 64 : 0;
        const uint64_t fewest = FEWEST_NEURON_SLOTS * slot; // resize_least() has left them out
        uint64_t       whole  = 0;
        uint64_t       used   = 0;
        bool           pinned = true; // all of it is
        for (const auto & b : bundles) {
            whole += b.tensor_bytes() + 2 * FLASH_SECTOR;
            pinned = pinned && b.n_pinned == b.n_neurons;
        }
        if (pinned && room + fewest >= whole) {
            for (size_t i = 0; i < bundles.size(); i++) {
                resizing.bundle_records[i] = bundles[i].n_neurons;
            }
            used = whole - std::min(whole, fewest);
        } else if (slot == 0) {
            const double part = std::min(1.0, (double) room / (double) whole);
            double       due  = 0.0; // runs
            for (size_t i = 0; i < bundles.size(); i++) {
                const flash_bundle & b    = bundles[i];
                const uint32_t       n    = b.n_neurons;
                const uint32_t       runs = (n + FFN_RUN_ROWS - 1) / FFN_RUN_ROWS;
                due += part * runs;
                const uint32_t whole_runs = std::min(runs, (uint32_t) due);
                due -= (double) whole_runs;
                uint64_t records = b.split ? 0 : std::min(n, whole_runs * FFN_RUN_ROWS);
                uint64_t most    = room - used; // and what its home has addresses for
                if (b.home) {
                    most = std::min<uint64_t>(most, neuron_homes[(size_t) b.home_memory].bytes);
                }
                if (records * b.record_bytes + 2 * FLASH_SECTOR > most) {
                    records = (most - std::min(most, 2 * FLASH_SECTOR)) / b.record_bytes / FFN_RUN_ROWS * FFN_RUN_ROWS;
                }
                resizing.bundle_records[i] = (uint32_t) records;
                used += records == 0 ? 0 : records * b.record_bytes + 2 * FLASH_SECTOR;
            }
        } else {
            const uint64_t n      = std::min<uint64_t>(n_neurons_of(bundles), FEWEST_NEURON_SLOTS + room / slot);
            resizing.neuron_slots = (uint32_t) std::min<uint64_t>(n, neuron_slots.bytes / slot_bytes_of(bundles));
            used                  = (resizing.neuron_slots - std::min(resizing.neuron_slots, FEWEST_NEURON_SLOTS)) * slot;
        }
        left -= std::min(left, used);
    }

    const uint64_t span  = panel_span();
    const double   share = span == 0 ? 0.0 : left >= span ? 1.0 : (double) left / (double) (span + need.n_panels * FLASH_SECTOR);
    double         due   = 0.0; // panels, so that the streamed rest is spread evenly
    resizing.panels.assign(tensors.size(), 0);
    for (size_t i = 0; i < tensors.size(); i++) {
        const flash_tensor & t = tensors[i];
        if (t.is_experts) {
            continue;
        }
        due += share * t.n_records;
        uint64_t most = left; // and what its home has addresses for
        if (t.home) {
            most = std::min<uint64_t>(most, homes[(size_t) t.home_memory].bytes);
        }
        uint32_t n = std::min(t.n_records, (uint32_t) due); // panels differ in length: so many may be more than fit
        while (home_bytes_of(t, n) > most) {
            n--;
        }
        due -= (double) n;
        resizing.panels[i] = n;
        left -= home_bytes_of(t, n);
    }

    resizing.slots = expert_slots_in(left);
    for (size_t c = 0; c < class_bytes.size(); c++) {
        resizing.slots[c] = (uint32_t) std::min<uint64_t>(resizing.slots[c], slot_memory[c].bytes / class_bytes[c]);
    }
}

int32_t llama_flash_session::resize(uint64_t bytes, bool urgent, llama_flash_resize & out, llama_flash_error * err) {
    if (memory.total == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "resize: before set_memory");
    }
    out       = {};
    out.least = resize_least();
    bytes     = std::clamp(bytes, out.least, std::max(out.least, requirements().max_memory));
    op.checked      = nullptr;
    resizing.urgent = urgent || (resizing.urgent && bytes == memory.total);
    if (bytes != memory.total) {
        plan_resize(bytes);
        memory.total    = bytes;
        resizing.active = true;
    }
    if (resizing.active && !failed()) {
        const int64_t now = flash_now_ns();
        resize_step(now + (resizing.urgent || now - resizing.last_op_ns > IDLE_NS ? LONG_STEP_NS : RESIZE_NS));
    }
    out.total = bytes;
    out.done  = !resizing.active;
    return LLAMA_FLASH_OK;
}

// Between two ops: nothing computes on any record.
void llama_flash_session::resize_step(int64_t until_ns) {
    bool stuck = false;
    bool less  = false;
    cache.end_op();
    if (flash_now_ns() - resizing.last_op_ns > IDLE_NS) {
        neurons.release(); // an evaluation that nobody goes on with
    }
    while (flash_now_ns() < until_ns && give_back_one(stuck)) {
        less = true;
    }
    if (stuck) { // reads into slots that are to go: they end soon
        neurons.settle(*this);
        settle_reads(!reads->idle());
    }
    if (less) {
        for (size_t c = 0; c < slot_memory.size(); c++) {
            slot_memory[c].keep((size_t) cache.n_slots((uint32_t) c) * class_bytes[c]);
        }
        neuron_slots.keep((size_t) neurons.n_slots() * slot_bytes_of(bundles));
        for (const auto & t : tensors) {
            if (t.home) {
                homes[(size_t) t.home_memory].keep(home_bytes_of(t, t.n_pinned));
            }
        }
        for (const auto & b : bundles) {
            if (b.home) {
                neuron_homes[(size_t) b.home_memory].keep(b.n_pinned == 0 ? 0 : b.n_pinned * b.record_bytes + 2 * FLASH_SECTOR);
            }
        }
    }
    bool more = !less && !stuck;
    while (more && flash_now_ns() < until_ns && !failed()) {
        more = take_one();
        if (!more && !failed()) { // after a failure it goes on once the error has been taken
            resizing.active = false;
            resizing.urgent = false;
        }
    }
    note_memory();
}

// One slot, panel or run less, where there are too many. stuck: there are, but reads into them are under way.
bool llama_flash_session::give_back_one(bool & stuck) {
    for (size_t i = 0; i < bundles.size(); i++) {
        flash_bundle & b = bundles[i];
        if (b.n_pinned > resizing.bundle_records[i]) {
            // what is no longer pinned needs slots to be computed in; the least there are with a limit is room for them
            neurons.add_slots(std::min(resizing.neuron_slots, FEWEST_NEURON_SLOTS));
            neurons.stream_end(*this);
            // of experts all or nothing is pinned
            b.n_pinned = b.n_expert > 0 ? 0 : std::max(resizing.bundle_records[i], (b.n_pinned - 1) / FFN_RUN_ROWS * FFN_RUN_ROWS);
            return true;
        }
    }
    if (neurons.n_slots() > resizing.neuron_slots) {
        if (neurons.remove_slot(*this, !resizing.urgent)) {
            return true;
        }
        stuck = true;
    }
    for (uint32_t c = 0; c < resizing.slots.size(); c++) {
        if (cache.n_slots(c) <= resizing.slots[c]) {
            continue;
        }
        const slot_cache::retired r = cache.retire(c, !resizing.urgent);
        if (!r.done) {
            stuck = true;
            continue;
        }
        if (r.evicted != slot_cache::NONE) {
            forget(records[(size_t) r.evicted]);
            stats.evictions++;
        }
        if (r.moved != slot_cache::NONE) {
            flash_record & moved = records[cache.record_in(r.moved)];
            uint8_t *      from  = slot_data[(size_t) r.slot];
            uint8_t *      to    = slot_data[(size_t) r.moved];
            memcpy(to, from, class_bytes[c]);
            moved.data  = to + (moved.data - from);
            moved.index = r.moved;
        }
        return true;
    }
    // panels: from the tensor that has the most too many
    size_t   from = tensors.size();
    uint32_t most = 0;
    for (size_t i = 0; i < tensors.size(); i++) {
        if (!tensors[i].is_experts && tensors[i].n_pinned > resizing.panels[i] + most) {
            most = tensors[i].n_pinned - resizing.panels[i];
            from = i;
        }
    }
    if (from == tensors.size()) {
        return false;
    }
    move_panels();
    flash_tensor & t = tensors[from];
    forget(records[t.first_record + --t.n_pinned]);
    return true;
}

// The order in which panels stream changes: it is learnt again. With every move, as ops between two of them have begun to learn it.
void llama_flash_session::move_panels() {
    drop_ring(panel_ring);
    panel_order.clear();
    panel_order_known = false;
    panel_next        = 0;
    for (auto & t : tensors) {
        if (!t.is_experts) {
            t.order = 0;
        }
    }
}

// One slot, panel or run more, where there are too few. false: there is enough of everything, or a read failed.
bool llama_flash_session::take_one() {
    if (neurons.n_slots() < resizing.neuron_slots) {
        neurons.add_slots(std::min(resizing.neuron_slots, neurons.n_slots() + 1024));
        return true;
    }
    for (uint32_t c = 0; c < resizing.slots.size(); c++) {
        if (cache.n_slots(c) < resizing.slots[c]) {
            const uint32_t n    = cache.n_slots(c);
            const size_t   slot = (size_t) cache.add(c);
            if (slot >= slot_data.size()) {
                slot_data.resize(slot + 1);
                slot_fresh.resize(slot + 1);
            }
            slot_fresh[slot] = 1;
            slot_data[slot] = slot_memory[c].data + (size_t) n * class_bytes[c];
            return true;
        }
    }
    for (size_t i = 0; i < bundles.size(); i++) {
        if (bundles[i].n_pinned < resizing.bundle_records[i]) {
            return pin_more(bundles[i]);
        }
    }
    size_t   to   = tensors.size();
    uint32_t most = 0;
    for (size_t i = 0; i < tensors.size(); i++) {
        if (!tensors[i].is_experts && tensors[i].n_pinned + most < resizing.panels[i]) {
            most = resizing.panels[i] - tensors[i].n_pinned;
            to   = i;
        }
    }
    return to < tensors.size() && pin_next_panel(tensors[to]);
}

// Reads the first panel that streams and keeps it.
bool llama_flash_session::pin_next_panel(flash_tensor & t) {
    const uint32_t index = t.first_record + t.n_pinned;
    flash_record & r     = records[index];
    move_panels();
    if (!t.home && !make_home(t, 0)) {
        return false;
    }
    if (!check_file(r) || !ring_room(panel_ring, r, index)) {
        return false;
    }
    fetch(index);
    reads->submit();
    while (r.state == record_state::reading && settle_reads(true)) {
    }
    if (r.state != record_state::raw && r.state != record_state::ready) {
        return false; // the read failed, and the session with it
    }
    op.checked = nullptr;
    if (!check_file(r) || !check_record(r)) { // it may have changed while it was read
        release(index);
        return false;
    }
    uint8_t * data = t.home + (r.offset - t.offset);
    memcpy(data, r.data, r.bytes);
    release(index);
    stock_repack_rows(t.kernel, &t.weight, data, r.rows);
    r.place = record_place::pinned;
    r.state = record_state::ready;
    r.data  = data;
    t.n_pinned++;
    return true;
}

// Reads the bundle's next run of records and keeps it.
bool llama_flash_session::pin_more(flash_bundle & b) {
    if (!b.home) {
        neuron_homes.push_back(mapping::home(b.tensor_bytes() + 2 * FLASH_SECTOR, 0));
        if (!neuron_homes.back().data) {
            neuron_homes.pop_back();
            return false;
        }
        b.home_memory = (int32_t) neuron_homes.size() - 1;
        b.home        = neuron_homes.back().data + (b.offset - flash_sector_floor(b.offset));
    }
    neurons.stream_end(*this);
    const uint64_t first = b.n_pinned * b.record_bytes;
    const uint32_t n     = std::min(b.n_neurons - b.n_pinned, FFN_RUN_ROWS);
    op.checked           = nullptr;
    if (!check_file(*b.file, b.name, b.offset, b.tensor_bytes())) {
        return false;
    }
    // the sectors at both ends hold bytes of neighbours: the same as are there
    reads->read(*b.file, b.offset + first, n * b.record_bytes, (uint8_t *) b.home + first, PINNED_TAG);
    reads->submit();
    while (!reads->idle()) {
        settle_reads(true);
    }
    op.checked = nullptr;
    if (failed() || !check_file(*b.file, b.name, b.offset, b.tensor_bytes()) || !check_pinned(b, b.n_pinned, n)) { // it may have changed while it was read
        return false;
    }
    b.n_pinned += n;
    return true;
}

// `memory` says what there is now; its total, where it leads.
void llama_flash_session::note_memory() {
    memory.n_slots          = 0;
    memory.n_pinned         = 0;
    memory.n_neurons_pinned = 0;
    memory.slots            = 0;
    memory.pinned           = 0;
    for (uint32_t c = 0; c < class_bytes.size(); c++) {
        memory.n_slots += cache.n_slots(c);
        memory.slots += (uint64_t) cache.n_slots(c) * class_bytes[c];
    }
    for (const auto & t : tensors) {
        memory.n_pinned += t.n_pinned;
        memory.pinned += home_bytes_of(t, t.n_pinned);
    }
    for (const auto & b : bundles) {
        memory.n_neurons_pinned += b.n_pinned;
        memory.pinned += b.n_pinned * b.record_bytes;
    }
    if (!bundles.empty()) {
        memory.n_neuron_slots = neurons.n_slots();
        memory.slots += memory.n_neuron_slots * slot_bytes_of(bundles);
        memory.bookkeeping = bookkeeping_bytes() + neuron_bookkeeping() + memory.n_neuron_slots * 64;
    }
}
