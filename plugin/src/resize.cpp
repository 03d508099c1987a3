// The memory given may change while the model runs: slots and pinned records are given back, or added, without dropping the rest.
//
// resize() only says where to go. The way there is gone in steps of about a millisecond: by each op as it begins, and by resize()
// itself, which is called again until it is done. Memory is given back before any is taken. What leaves is what the cache would
// have evicted next; what lies in slots that vanish moves to slots that stay, unless there is no time for it. Rings, work space, and
// what a mode keeps resident stay.
#include "session.h"

#include "base/status.h"

#include <algorithm>
#include <cstring>

constexpr int64_t IDLE_NS      = 200000000; // without an op for so long, nobody waits
constexpr int64_t LONG_STEP_NS = 20000000;

// rings that stand, and whether all neurons are pinned now
standing_parts llama_flash_session::standing_now() const {
    standing_parts now = standing;
    now.neurons_whole  = std::all_of(bundles.begin(), bundles.end(), [](const flash_bundle & b) { return b.n_pinned == b.n_neurons; });
    return now;
}

memory_layout llama_flash_session::layout_now() const {
    memory_layout l;
    l.total        = memory.total;
    l.standing     = standing;
    l.neuron_slots = neurons.n_slots();
    for (const auto & t : tensors) {
        l.panels.push_back(t.n_pinned);
    }
    for (const auto & b : bundles) {
        l.records.push_back(b.n_pinned);
    }
    for (uint32_t c = 0; c < class_bytes.size(); c++) {
        l.slots.push_back(cache.n_slots(c));
    }
    return l;
}

// `memory` says what there is now; its total, where it leads.
void llama_flash_session::note_memory() {
    memory = describe(needs, layout_now());
}

// Where the kernel has refused addresses for all there may be, less has room.
static void keep_to(const mapping & m, uint64_t bytes_of_one, uint32_t & n) {
    n = (uint32_t) std::min<uint64_t>(n, m.bytes / bytes_of_one);
}

void llama_flash_session::plan_resize(uint64_t bytes) {
    memory_layout & to = resizing.to;
    to                 = divide(needs, bytes, standing_now());
    if (to.neuron_slots > 0) {
        keep_to(neuron_slots, needs.neuron_slot, to.neuron_slots);
    }
    for (size_t c = 0; c < class_bytes.size(); c++) {
        keep_to(slot_memory[c], class_bytes[c], to.slots[c]);
    }
    for (size_t i = 0; i < bundles.size(); i++) {
        const flash_bundle & b = bundles[i];
        while (b.home && needs.bundles[i].home_bytes(to.records[i]) > neuron_homes[(size_t) b.home_memory].bytes) {
            to.records[i] = (to.records[i] - 1) / FFN_RUN_ROWS * FFN_RUN_ROWS;
        }
    }
    for (size_t i = 0; i < tensors.size(); i++) {
        const flash_tensor & t = tensors[i];
        while (t.home && needs.panels[i].home_bytes(to.panels[i]) > homes[(size_t) t.home_memory].bytes) {
            to.panels[i]--;
        }
    }
}

int32_t llama_flash_session::resize(uint64_t bytes, bool urgent, llama_flash_resize & out, llama_flash_error * err) {
    if (memory.total == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "resize: before set_memory");
    }
    out       = {};
    out.least = least_of(needs, standing);
    bytes     = std::clamp(bytes, out.least, std::max(out.least, needs.maximum()));
    reads.look_again();
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
        neurons.settle();
        reads.settle(!reads.idle());
    }
    if (less) {
        for (size_t c = 0; c < slot_memory.size(); c++) {
            slot_memory[c].keep((size_t) cache.n_slots((uint32_t) c) * class_bytes[c]);
        }
        neuron_slots.keep((size_t) neurons.n_slots() * needs.neuron_slot);
        for (const auto & t : tensors) {
            if (t.home) {
                homes[(size_t) t.home_memory].keep(needs.panels[(size_t) (&t - tensors.data())].home_bytes(t.n_pinned));
            }
        }
        for (const auto & b : bundles) {
            if (b.home) {
                neuron_homes[(size_t) b.home_memory].keep(needs.bundles[b.index].home_bytes(b.n_pinned));
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
        if (b.n_pinned > resizing.to.records[i]) {
            // what is no longer pinned needs slots to be computed in; the least there are with a limit is room for them
            neurons.add_slots(std::min(resizing.to.neuron_slots, FEWEST_NEURON_SLOTS));
            neurons.stream_end();
            // of experts all or nothing is pinned
            b.n_pinned = b.n_expert > 0 ? 0 : std::max(resizing.to.records[i], (b.n_pinned - 1) / FFN_RUN_ROWS * FFN_RUN_ROWS);
            return true;
        }
    }
    if (neurons.n_slots() > resizing.to.neuron_slots) {
        if (neurons.remove_slot(!resizing.urgent)) {
            return true;
        }
        stuck = true;
    }
    for (uint32_t c = 0; c < resizing.to.slots.size(); c++) {
        if (cache.n_slots(c) <= resizing.to.slots[c]) {
            continue;
        }
        const slot_cache::retired r = cache.retire(c, !resizing.urgent);
        if (!r.done) {
            stuck = true;
            continue;
        }
        if (r.evicted != slot_cache::NONE) {
            forget(records[(size_t) r.evicted]);
            notes.stats.evictions++;
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
        if (!tensors[i].is_experts && tensors[i].n_pinned > resizing.to.panels[i] + most) {
            most = tensors[i].n_pinned - resizing.to.panels[i];
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
    if (neurons.n_slots() < resizing.to.neuron_slots) {
        neurons.add_slots(std::min(resizing.to.neuron_slots, neurons.n_slots() + 1024));
        return true;
    }
    for (uint32_t c = 0; c < resizing.to.slots.size(); c++) {
        if (cache.n_slots(c) < resizing.to.slots[c]) {
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
        if (bundles[i].n_pinned < resizing.to.records[i]) {
            return pin_more(bundles[i]);
        }
    }
    size_t   to   = tensors.size();
    uint32_t most = 0;
    for (size_t i = 0; i < tensors.size(); i++) {
        if (!tensors[i].is_experts && tensors[i].n_pinned + most < resizing.to.panels[i]) {
            most = resizing.to.panels[i] - tensors[i].n_pinned;
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
    reads.submit();
    while (r.state == record_state::reading && reads.settle(true)) {
    }
    if (r.state != record_state::raw && r.state != record_state::ready) {
        return false; // the read failed, and the session with it
    }
    reads.look_again();
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
    if (!b.home && !make_home(b, 0)) {
        return false;
    }
    neurons.stream_end();
    const uint32_t n     = std::min(b.n_neurons - b.n_pinned, FFN_RUN_ROWS);
    reads.look_again();
    if (!reads.check_file(*b.file, b.name, b.offset, b.tensor_bytes())) {
        return false;
    }
    neurons.read_home(b, b.n_pinned, n);
    reads.submit();
    reads.drain();
    reads.look_again();
    if (failed() || !reads.check_file(*b.file, b.name, b.offset, b.tensor_bytes()) || !check_pinned(b, b.n_pinned, n)) { // it may have changed while it was read
        return false;
    }
    b.n_pinned += n;
    return true;
}
