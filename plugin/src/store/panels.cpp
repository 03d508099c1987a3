#include "store/panels.h"

#include <algorithm>
#include <cstring>

void panel_store::ended(uint32_t index, const reader::done & done, file_state state) {
    flash_record & r = record(index);
    if (r.place == record_place::pinned && done.error == 0) { // all of the tensor's at once; read_pinned() goes on from here
        const flash_tensor & t = table.tensors[r.tensor];
        for (uint32_t i = t.first_record; i < t.first_record + t.n_pinned; i++) {
            record(i).check = check_for(state, record(i).checksum);
            if (!check_now(record(i))) {
                break;
            }
        }
    } else if (!note_arrival(index, done, state)) {
        release(index);
    }
}

bool panel_store::check_now(flash_record & r) {
    return r.check == byte_check::none || check_record(r, r.check == byte_check::refuse ? 0 : checksum(r.data, r.bytes));
}

// streaming

bool panel_store::pump() {
    bool any = false;
    while (!order.empty()) {
        if (next == order.size()) {
            if (!order_known) {
                break;
            }
            next = 0;
        }
        const uint32_t index = order[next];
        if (record(index).state != record_state::absent || !check_file(record(index)) || !to_ring(index)) {
            break; // all panels are in the ring, or it is full
        }
        start(index);
        next++;
        any = true;
    }
    reads.submit();
    return any;
}

void panel_store::seek_from(uint32_t index) {
    next = (size_t) (std::find(order.begin(), order.end(), index) - order.begin());
}

void panel_store::seek(flash_tensor & t, uint64_t stamp) {
    if (t.n_pinned == t.n_records) {
        return;
    }
    const uint32_t wanted = t.first_record + t.n_pinned;
    if (t.order == 0) {
        t.order = stamp;
        // first pass: the order is being learnt
        for (uint32_t i = t.n_pinned; i < t.n_records; i++) {
            order.push_back(t.first_record + i);
        }
    } else if (!order_known && wanted == order.front()) {
        order_known = true;
    }
    // panels whose op was left out this time (the output matrix, for a ubatch without outputs)
    while (!through.empty() && through.record_in(through.oldest()) != wanted) {
        const uint32_t index = through.record_in(through.oldest());
        while (record(index).state == record_state::reading && reads.settle(true)) {
        }
        release(index);
    }
    if (through.empty()) {
        seek_from(wanted);
    }
}

bool panel_store::bring(uint32_t index) {
    flash_record & r = record(index);
    while (!r.is_there()) {
        const bool pumped = pump();
        reads.settle(false);
        if (reads.failed()) {
            return false;
        }
        if (r.state == record_state::reading) {
            reads.wait();
        } else if (r.state == record_state::absent && !pumped) {
            if (through.empty()) {
                reads.fail_op(LLAMA_FLASH_E_INTERNAL, table.tensors[r.tensor].name, "no room for a panel");
                return false;
            }
            drop_ring();
            seek_from(index);
        }
    }
    return true;
}

// memory

const char * panel_store::make(const memory_layout & to, uint64_t & bytes) {
    for (auto & t : table.tensors) {
        t.n_pinned = to.panels[t.number];
        bytes      = needs.panels[t.number].home_bytes(t.n_pinned);
        if (t.n_pinned > 0 && !make_home(t, bytes)) {
            return "pinned panels";
        }
    }
    bytes = to.standing.panel_ring;
    return make_ring(bytes) ? nullptr : "the ring";
}

// Addresses for the tensor's panels, memory for the first `least` bytes at least.
bool panel_store::make_home(flash_tensor & t, uint64_t least) {
    homes.push_back(mapping::home(needs.panels[t.number].home_bytes(t.n_records), least));
    if (!homes.back().data) {
        homes.pop_back();
        return false;
    }
    t.home_memory = (int32_t) homes.size() - 1;
    t.home        = homes.back().data + (t.offset - flash_sector_floor(t.offset));
    return true;
}

bool panel_store::read_pinned() {
    for (auto & t : table.tensors) {
        if (t.n_pinned == 0) {
            continue;
        }
        for (uint32_t i = t.first_record; i < t.first_record + t.n_pinned; i++) {
            flash_record & r = record(i);
            r.place          = record_place::pinned;
            r.state          = record_state::reading;
            r.data           = t.home + (r.offset - t.offset);
        }
        // one read for all of them: their sectors overlap
        const flash_record & last = record(t.first_record + t.n_pinned - 1);
        reads.read(*this, t.first_record, *t.file, t.offset, last.offset + last.bytes - t.offset, t.home);
    }
    reads.drain();
    for (const auto & t : table.tensors) {
        reads.look_again();
        if (t.n_pinned > 0 && !check_file(record(t.first_record))) {
            break;
        }
    }
    if (reads.failed()) {
        return false;
    }
    for (auto & t : table.tensors) {
        if (t.n_pinned == 0) {
            continue;
        }
        const flash_record & last = record(t.first_record + t.n_pinned - 1);
        stock_repack_rows(t.kernel, &t.weight, t.home, last.row + last.rows);
        for (uint32_t i = t.first_record; i < t.first_record + t.n_pinned; i++) {
            record(i).state = record_state::ready;
        }
    }
    return true;
}

void panel_store::drop_all() {
    for (auto & t : table.tensors) {
        if (t.is_experts) {
            continue;
        }
        t.n_pinned = 0;
        t.home     = nullptr;
        t.order    = 0;
        t.tokens   = 0;
        for (uint32_t i = t.first_record; i < t.first_record + t.n_records; i++) {
            set_absent(record(i));
        }
    }
    order.clear();
    order_known = false;
    next        = 0;
    clock       = {};
    homes.clear();
    make_ring(0);
}

void panel_store::note_layout(memory_layout & l) const {
    for (const auto & t : table.tensors) {
        l.panels.push_back(t.n_pinned);
    }
}

void panel_store::fit(memory_layout & to) const {
    for (const auto & t : table.tensors) {
        while (t.home && needs.panels[t.number].home_bytes(to.panels[t.number]) > homes[(size_t) t.home_memory].bytes) {
            to.panels[t.number]--;
        }
    }
}

bool panel_store::give_back_one(const memory_layout & to) {
    flash_tensor * from = nullptr;
    uint32_t       most = 0;
    for (auto & t : table.tensors) {
        if (!t.is_experts && t.n_pinned > to.panels[t.number] + most) {
            most = t.n_pinned - to.panels[t.number];
            from = &t;
        }
    }
    if (!from) {
        return false;
    }
    const bool whole = from->n_pinned == from->n_records;
    set_absent(record(from->first_record + --from->n_pinned));
    if (whole || !order_known || order.empty()) {
        learn_again(); // when the tensor's panels stream is not known
    } else {
        streams_again(from->first_record + from->n_pinned);
    }
    return true;
}

bool panel_store::take_one(const memory_layout & to) {
    flash_tensor * into = nullptr;
    uint32_t       most = 0;
    for (auto & t : table.tensors) {
        if (!t.is_experts && t.n_pinned + most < to.panels[t.number]) {
            most = to.panels[t.number] - t.n_pinned;
            into = &t;
        }
    }
    return into && pin_next(*into);
}

// The order in which panels stream is learnt again, as far as ops have begun to learn it, too.
void panel_store::learn_again() {
    drop_ring();
    order.clear();
    order_known = false;
    next        = 0;
    for (auto & t : table.tensors) {
        if (!t.is_experts) {
            t.order = 0;
        }
    }
}

// The panel that is used next, of those that stream; the order is known.
uint32_t panel_store::upcoming() const {
    return through.empty() ? order[next < order.size() ? next : 0] : through.record_in(through.oldest());
}

// A panel before the one that was its tensor's first to stream. That one is read after it.
void panel_store::streams_again(uint32_t index) {
    uint32_t   then = upcoming();
    const auto at   = std::find(order.begin(), order.end(), index + 1);
    if (at == order.end()) {
        learn_again();
        return;
    }
    if (record(index + 1).state != record_state::absent) {
        drop_ring();
    } else if (!through.empty()) {
        then = next < order.size() ? order[next] : order.front(); // reads go on behind what is in the ring
    }
    order.insert(at, index);
    seek_from(then == index + 1 ? index : then);
}

// A panel that streamed is pinned; the ring is empty.
void panel_store::streams_no_more(uint32_t index) {
    const auto at = std::find(order.begin(), order.end(), index);
    if (!order_known || at == order.end()) {
        learn_again();
        return;
    }
    const auto i = (size_t) (at - order.begin());
    order.erase(at);
    next -= next > i;
}

// Reads the first panel that streams and keeps it.
bool panel_store::pin_next(flash_tensor & t) {
    const uint32_t index = t.first_record + t.n_pinned;
    flash_record & r     = record(index);
    if (order_known && !order.empty()) {
        const uint32_t then = upcoming();
        drop_ring(); // the panel comes through it
        seek_from(then);
    } else {
        learn_again();
    }
    if (!t.home && !make_home(t, 0)) {
        return false;
    }
    if (!check_file(r) || !to_ring(index)) {
        return false;
    }
    start(index);
    reads.submit();
    while (r.state == record_state::reading && reads.settle(true)) {
    }
    if (!r.is_there()) {
        return false; // the read failed, and the session with it
    }
    reads.look_again();
    if (!check_file(r) || !check_now(r)) { // it may have changed while it was read
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
    streams_no_more(index);
    return true;
}

void panel_store::give_back_pages() {
    for (const auto & t : table.tensors) {
        if (t.home) {
            homes[(size_t) t.home_memory].give_back_beyond(needs.panels[t.number].home_bytes(t.n_pinned));
        }
    }
}
