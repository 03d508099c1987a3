// The memory given may change while the model runs: slots and pinned records are given back, or added, without dropping the rest.
//
// resize() only sets a target. It is reached in steps of about a millisecond: by each op as it begins, and by resize()
// itself, which is called again until it is done. Memory is given back before any is taken. What leaves is what the cache would
// have evicted next; what lies in slots that vanish moves to slots that stay, unless there is no time for it. Rings, work space, and
// what a mode keeps resident stay.
#include "session.h"

#include "base/clock.h"

#include <algorithm>

constexpr int64_t IDLE_NS      = 200000000; // after so long without an op, a longer step delays no token
constexpr int64_t LONG_STEP_NS = 20000000;

memory_layout llama_flash_session::layout_now() const {
    memory_layout l;
    l.total    = memory.total;
    l.standing = standing;
    neurons.note_layout(l);
    panels.note_layout(l);
    experts.note_layout(l);
    return l;
}

void llama_flash_session::note_memory() {
    memory = describe(needs, layout_now());
}

void llama_flash_session::set_target(uint64_t bytes) {
    resizing.to = divide(needs, bytes, layout_now().standing);
    // where the kernel has refused addresses for all there may be, less has room
    neurons.fit(resizing.to);
    panels.fit(resizing.to);
    experts.fit(resizing.to);
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
        set_target(bytes);
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

int32_t llama_flash_session::few_tokens(bool few, llama_flash_error * err) {
    if (memory.total == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "few_tokens: before set_memory");
    }
    const uint64_t ring = few ? needs.expert_ring_least() : prompt_ring;
    if (failed() || ring == standing.expert_ring) {
        return LLAMA_FLASH_OK;
    }
    standing.expert_ring = ring;
    experts.shorten_ring(ring);
    set_target(memory.total);
    resizing.active = true;
    return LLAMA_FLASH_OK;
}

// Between two ops: nothing computes on any record.
void llama_flash_session::resize_step(int64_t until_ns) {
    bool stuck = false;
    bool less  = false;
    experts.end_op();
    if (flash_now_ns() - resizing.last_op_ns > IDLE_NS) {
        neurons.release(); // of an evaluation that was broken off
    }
    while (flash_now_ns() < until_ns && give_back_one(stuck)) {
        less = true;
    }
    if (stuck) { // reads into slots that are to go: they end soon
        neurons.settle();
        reads.settle(!reads.idle());
    }
    if (less) {
        experts.give_back_pages();
        neurons.give_back_pages();
        panels.give_back_pages();
    }
    bool more = !less && !stuck;
    if (more) {
        experts.lengthen_ring(standing.expert_ring);
    }
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
    const bool move = !resizing.urgent;
    return neurons.give_back_one(resizing.to, move, stuck) || experts.give_back_one(resizing.to, move, stuck) || panels.give_back_one(resizing.to);
}

// One slot, panel or run more, where there are too few. false: there is enough of everything, or a read failed.
bool llama_flash_session::take_one() {
    if (neurons.add_slots(resizing.to) || experts.take_one(resizing.to)) {
        return true;
    }
    flash_bundle * b = neurons.to_pin(resizing.to);
    return b ? neurons.pin_run(*b) : panels.take_one(resizing.to);
}
