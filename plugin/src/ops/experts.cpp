// An op runs in waves: thread 0 finds out which records are there, all threads repack and compute those, thread 0 waits for more.
//
//   thread 0: begin, first wave ---+        +--- release, next wave ---+        +--- end
//   all:                        barrier  compute  barrier           barrier  compute  barrier
//
// What thread 0 writes between two barriers is what the others read after the second. Each row of the output is computed whole by
// one call of a stock kernel, so waves do not change a bit of it.
#include "ops/mul_mat.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

// a prompt's wave is at least so many experts (each wave quantises the activations again)
constexpr size_t PROMPT_WAVE = 8;

// so many huge pages are asked for before the first read begins: the device then follows
constexpr size_t FRESH_AHEAD = 16;

static bool pump_experts(llama_flash_session & s);
static bool pump_panels(llama_flash_session & s);
static void fetch_expected(llama_flash_session & s);

// repacking of the wave's records, in groups of rows shared out over the threads

static int64_t row_groups(const flash_record & r) {
    return (r.rows + STOCK_REPACK_ROWS - 1) / STOCK_REPACK_ROWS;
}

static void plan_repacking(llama_flash_session & s) {
    int64_t total = 0;
    s.op.repack_ends.clear();
    for (uint32_t index : s.op.arrived) {
        total += row_groups(s.records[index]);
        s.op.repack_ends.push_back(total);
    }
    s.op.repack_next.store(0, std::memory_order_relaxed);
}

static void repack(llama_flash_session & s) {
    static thread_local std::vector<uint8_t> scratch; // grows to the widest row once

    const int64_t total = s.op.repack_ends.back();
    for (;;) {
        const int64_t i = s.op.repack_next.fetch_add(1, std::memory_order_relaxed);
        if (i >= total) {
            return;
        }
        const size_t         k     = (size_t) (std::upper_bound(s.op.repack_ends.begin(), s.op.repack_ends.end(), i) - s.op.repack_ends.begin());
        const flash_record & r     = s.records[s.op.arrived[k]];
        const flash_tensor & t     = s.tensors[r.tensor];
        const int64_t        first = k ? s.op.repack_ends[k - 1] : 0;
        const int64_t        row   = (i - first) * STOCK_REPACK_ROWS;
        const size_t         need  = t.weight.nb[1] * STOCK_REPACK_ROWS;
        if (scratch.size() < need) {
            scratch.resize(need);
        }
        stock_repack(t.kernel, &t.weight, r.data, row, std::min<int64_t>(STOCK_REPACK_ROWS, r.rows - row), scratch.data());
    }
}

// Bytes that are read first, or again after something has touched their file, are checked by all threads before they are repacked.

static void plan_checks(llama_flash_session & s) {
    int64_t total = 0;
    s.op.check_ends.clear();
    for (uint32_t index : s.op.checking) {
        total += (int64_t) ((s.records[index].bytes + CHECKSUM_PIECE - 1) / CHECKSUM_PIECE);
        s.op.check_ends.push_back(total);
    }
    s.op.check_sums.assign(s.op.checking.size(), 0);
    s.op.check_next.store(0, std::memory_order_relaxed);
}

// false: the op has failed (all threads)
static bool check_wave(llama_flash_session & s, const ggml_compute_params * params) {
    const int64_t total = s.op.check_ends.back();
    for (;;) {
        const int64_t i = s.op.check_next.fetch_add(1, std::memory_order_relaxed);
        if (i >= total) {
            break;
        }
        const size_t         k     = (size_t) (std::upper_bound(s.op.check_ends.begin(), s.op.check_ends.end(), i) - s.op.check_ends.begin());
        const flash_record & r     = s.records[s.op.checking[k]];
        const size_t         piece = (size_t) (i - (k ? s.op.check_ends[k - 1] : 0));
        const size_t         at    = piece * CHECKSUM_PIECE;
        const uint32_t       sum   = checksum_piece(r.data + at, std::min<size_t>(CHECKSUM_PIECE, r.bytes - at), (uint32_t) piece);
        __atomic_fetch_add(&s.op.check_sums[k], sum, __ATOMIC_RELAXED);
    }
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        for (size_t k = 0; k < s.op.checking.size(); k++) {
            s.check_record(s.records[s.op.checking[k]], checksum_of_sum(s.op.check_sums[k]));
        }
        s.op.checking.clear();
        s.op.stop = s.failed();
    }
    ggml_barrier(params->threadpool);
    return !s.op.stop;
}

static void note_repacked(llama_flash_session & s) {
    for (uint32_t index : s.op.arrived) {
        s.records[index].state = record_state::ready;
    }
    s.op.arrived.clear();
}

// What is read to memory for the first time waits for its pages, which the kernel has to zero: all threads ask for them, while the
// device is given the reads into those that are there.

static void note_fresh(llama_flash_session & s, const flash_record & r) {
    auto &          fresh = s.op.fresh;
    uint8_t * const end   = r.data + r.bytes;
    if (!s.slot_fresh[(size_t) r.index]) {
        return;
    }
    s.slot_fresh[(size_t) r.index] = 0;
    auto page                      = [](const uint8_t * p) { return (uintptr_t) p / HUGE_PAGE; };
    for (uint8_t * at = r.data; at < end;) {
        uint8_t * const next = std::min(end, (uint8_t *) ((page(at) + 1) * HUGE_PAGE));
        if (!fresh.empty() && fresh.back().second <= at && page(fresh.back().second - 1) == page(at)) {
            fresh.back().second = next;
        } else {
            fresh.push_back({ at, next });
        }
        at = next;
    }
}

static void populate_fresh(llama_flash_session & s, const ggml_compute_params * params) {
    const bool leader = params->ith == 0;
    for (;;) {
        const size_t i = s.op.fresh_next.fetch_add(1, std::memory_order_relaxed);
        if (i >= s.op.fresh.size()) {
            break;
        }
        mapping::populate(s.op.fresh[i].first, s.op.fresh[i].second);
        if (leader && i >= FRESH_AHEAD) {
            s.reads.settle(false);
        }
    }
    ggml_barrier(params->threadpool);
    if (leader) {
        s.op.fresh.clear();
        pump_experts(s);
    }
    ggml_barrier(params->threadpool);
}

// Runs the waves. first and next: thread 0 only; both set op.any, op.more and, in op.arrived, what must be repacked before.
template <typename First, typename Compute, typename Next>
static void run_waves(llama_flash_session & s, const flash_tensor & t, const ggml_compute_params * params, First first, Compute compute,
                      Next next) {
    const bool leader = params->ith == 0;
    if (leader) {
        s.begin_op(t.name);
        s.op.any  = false;
        s.op.more = false;
        s.op.fresh.clear(); // of an op that has failed
        s.op.arrived.clear();
        s.op.checking.clear();
        s.op.wave.clear();
        if (!s.failed()) {
            first();
        }
        plan_checks(s);
        plan_repacking(s);
        s.op.fresh_next.store(0, std::memory_order_relaxed);
        s.op.stop = s.failed();
    }
    for (;;) {
        ggml_barrier(params->threadpool);
        if (s.op.stop) {
            ggml_barrier(params->threadpool); // all have seen it before the leader lets another op in
            break;
        }
        if (!s.op.fresh.empty()) {
            populate_fresh(s, params);
        }
        if (!s.op.checking.empty() && !check_wave(s, params)) {
            ggml_barrier(params->threadpool);
            break;
        }
        const bool more = s.op.more;
        if (s.op.any) {
            if (!s.op.arrived.empty()) {
                const int64_t t0 = leader ? flash_now_ns() : 0;
                repack(s);
                ggml_barrier(params->threadpool);
                if (leader) {
                    s.notes.stats.repack_ns += (uint64_t) (flash_now_ns() - t0);
                }
            }
            compute();
        }
        ggml_barrier(params->threadpool);
        if (leader) {
            note_repacked(s);
            for (uint32_t index : s.op.wave) {
                s.release(index);
            }
            s.op.wave.clear();
            if (more) {
                next();
                plan_checks(s);
                plan_repacking(s);
                s.op.stop = s.failed();
            }
        }
        if (!more) {
            break;
        }
    }
    if (leader) {
        if (s.op.stop) {
            // the wave was not computed, what it held stays as it was read
            for (uint32_t index : s.op.wave) {
                s.release(index);
            }
            s.op.wave.clear();
            s.op.arrived.clear();
            s.op.checking.clear();
        } else {
            // a file that changed while it was read; and the device has work until the next op
            s.reads.look_again();
            if (!s.op.read || s.check_file(*s.op.read)) {
                s.reads.settle(false);
                fetch_expected(s);
                pump_panels(s);
            }
        }
        s.cache.end_op();
        s.end_op();
    }
}

static void fail_internal(llama_flash_session & s, const flash_tensor & t, const char * what) {
    s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, t.name, what);
}

// experts

// Gives a missing expert a place and starts its read: a slot if there is one to be had, else false.
static bool fetch_to_slot(llama_flash_session & s, uint32_t index, bool evict) {
    flash_record & r = s.records[index];
    int32_t        evicted;
    const int32_t  slot = s.cache.take(s.tensors[r.tensor].size_class, index, evict, &evicted);
    if (slot == slot_cache::NONE) {
        return false;
    }
    if (evicted != slot_cache::NONE) {
        s.forget(s.records[(size_t) evicted]);
        s.notes.stats.evictions++;
    }
    r.place = record_place::slot;
    r.index = slot;
    r.data  = s.slot_data[(size_t) slot] + (r.offset - flash_sector_floor(r.offset));
    s.fetch(index);
    return true;
}

// Streams the planned experts as far as the ring has room.
static bool pump_experts(llama_flash_session & s) {
    bool any = false;
    while (s.op.planned < s.op.plan.size()) {
        const uint32_t index = s.op.plan[s.op.planned];
        flash_record & r     = s.records[index];
        if (r.state == record_state::absent) {
            if (!s.ring_room(s.expert_ring, r, index)) {
                break;
            }
            s.fetch(index);
            any = true;
        }
        s.op.planned++;
    }
    if (s.op.fresh.empty()) { // else they follow their pages
        s.reads.submit();
    }
    return any;
}

// Puts a record that has arrived into the wave.
static void add_to_wave(llama_flash_session & s, const flash_tensor & t, uint32_t index) {
    flash_record & r                   = s.records[index];
    s.op.table[index - t.first_record] = r.data;
    s.op.any                           = true;
    if (r.check != byte_check::none) {
        s.op.checking.push_back(index);
    }
    if (r.state == record_state::raw) {
        s.op.arrived.push_back(index);
    }
    if (r.place == record_place::ring) {
        s.op.wave.push_back(index);
    }
}

// More tokens than this have at most `rank` of the op's experts.
static uint32_t count_of_rank(llama_flash_session & s, size_t rank) {
    if (rank >= s.op.distinct.size()) {
        return 0;
    }
    s.op.counts.clear();
    for (uint32_t e : s.op.distinct) {
        s.op.counts.push_back(s.op.count[e]);
    }
    std::nth_element(s.op.counts.begin(), s.op.counts.begin() + (ptrdiff_t) rank, s.op.counts.end(), std::greater<uint32_t>());
    return s.op.counts[rank] + 1;
}

// Of the experts that wait to be computed, how many are in DRAM or on their way.
struct there_count {
    size_t ring    = 0;
    size_t slots   = 0;
    size_t reading = 0;
    size_t wish    = 0; // as many of one kind make a wave
};

static bool is_there(const flash_record & r) {
    return r.state == record_state::ready || r.state == record_state::raw;
}

static there_count count_there(const llama_flash_session & s, bool decode) {
    there_count count;
    for (uint32_t index : s.op.waiting) {
        const flash_record & r = s.records[index];
        count.ring += is_there(r) && r.place == record_place::ring;
        count.slots += is_there(r) && r.place != record_place::ring;
        count.reading += r.state == record_state::reading;
    }
    count.wish = decode ? 1 : std::min(PROMPT_WAVE, s.op.waiting.size());
    return count;
}

// The wave that comes now, of what is there. When decoding all of it. Of a prompt what has come through the ring, half of it at most,
// so that there is room to read to meanwhile; else what lies in slots.
static void take_wave(llama_flash_session & s, const flash_tensor & t, bool decode) {
    const there_count count      = count_there(s, decode);
    const bool        from_ring  = decode || count.ring >= count.wish || count.slots == 0;
    const bool        from_slots = decode || !from_ring;
    uint64_t          room       = decode ? UINT64_MAX : s.expert_ring.bytes() / 2;

    std::fill(s.op.table.begin(), s.op.table.end(), nullptr);
    s.op.any    = false;
    size_t left = 0;
    for (uint32_t index : s.op.waiting) {
        const flash_record & r     = s.records[index];
        const bool           ring  = r.place == record_place::ring;
        const bool           taken = is_there(r) && (ring ? from_ring && room > 0 : from_slots);
        if (taken) {
            add_to_wave(s, t, index);
            room -= ring ? std::min<uint64_t>(room, r.bytes) : 0;
        } else {
            s.op.waiting[left++] = index;
        }
    }
    s.op.waiting.resize(left);
    s.op.more = left > 0;
}

// A layer's first op waits for reads: what is there for the second, which has the same input, is computed meanwhile.

static void begin_early(llama_flash_session & s, const flash_tensor & t, const ggml_tensor * op) {
    auto &       early = s.early;
    const auto & group = s.groups[t.group];
    if (group.size() < 2 || &s.tensors[group[0]] != &t) {
        return;
    }
    const flash_tensor & other = s.tensors[group[1]];
    early.tensor               = group[1];
    early.stamp                = s.op.stamp + 1;
    early.input                = op->src[1];
    early.ids                  = op->src[2];
    early.usable               = other.same_input && other.weight.type == t.weight.type && ggml_are_same_shape(&other.weight, &t.weight) &&
                   ggml_is_contiguous(op);
    if (early.usable) {
        early.out.resize((size_t) ggml_nelements(op));
        early.op      = *op;
        early.op.data = early.out.data();
    }
}

// Sets a wave of what the second op will find in slots. false: there is nothing.
static bool take_early_wave(llama_flash_session & s) {
    auto & early = s.early;
    if (!early.usable || early.stamp != s.op.stamp + 1) {
        return false;
    }
    const flash_tensor & other = s.tensors[early.tensor];
    std::fill(s.op.table.begin(), s.op.table.end(), nullptr);
    for (uint32_t e : s.op.distinct) {
        const flash_record & r = s.records[other.first_record + e];
        if (early.done[e] != early.stamp && r.place == record_place::slot && is_there(r)) {
            early.done[e] = early.stamp;
            early.now     = true;
            s.cache.hold(r.index);
            add_to_wave(s, other, other.first_record + e);
        }
    }
    return early.now;
}

// The second op: learns that it is one, and takes what has been computed of it. Those experts are done.
static void take_early_rows(llama_flash_session & s, flash_tensor & t, ggml_tensor * op) {
    auto & early = s.early;
    if (&s.tensors[early.tensor] != &t) {
        return;
    }
    t.same_input = early.stamp == s.op.stamp && early.input == op->src[1] && early.ids == op->src[2];
    if (!t.same_input || !early.usable) {
        return;
    }
    const ggml_tensor * ids = op->src[2];
    for (int64_t i1 = 0; i1 < ids->ne[1]; i1++) {
        for (int64_t i0 = 0; i0 < ids->ne[0]; i0++) {
            if (early.done[(size_t) expert_at(ids, i0, i1)] == early.stamp) {
                const size_t at = (size_t) i1 * early.op.nb[2] + (size_t) i0 * early.op.nb[1];
                memcpy((char *) op->data + i1 * op->nb[2] + i0 * op->nb[1], (const char *) early.out.data() + at, early.op.nb[1]);
            }
        }
    }
    auto is_done = [&](uint32_t index) { return early.done[index - t.first_record] == early.stamp; };
    s.op.waiting.erase(std::remove_if(s.op.waiting.begin(), s.op.waiting.end(), is_done), s.op.waiting.end());
}

static void first_expert_wave(llama_flash_session & s, flash_tensor & t, ggml_tensor * op) {
    s.early.now = false;
    const ggml_tensor * ids    = op->src[2];
    const bool          decode = ids->ne[1] <= DECODE_TOKENS;

    // distinct experts, in order of appearance when decoding, in file order for a prompt
    s.op.distinct.clear();
    for (int64_t i1 = 0; i1 < ids->ne[1]; i1++) {
        for (int64_t i0 = 0; i0 < ids->ne[0]; i0++) {
            const int32_t e = expert_at(ids, i0, i1);
            if (e < 0 || (uint32_t) e >= t.n_records) {
                fail_internal(s, t, "an expert id out of range");
                return;
            }
            if (s.op.seen[(size_t) e] != s.op.stamp) {
                s.op.seen[(size_t) e]  = s.op.stamp;
                s.op.count[(size_t) e] = 0;
                s.op.distinct.push_back((uint32_t) e);
            }
            s.op.count[(size_t) e]++;
        }
    }
    if (!decode) {
        std::sort(s.op.distinct.begin(), s.op.distinct.end());
    }
    // the last layer sees only the tokens whose output is asked for: its clock follows the others'
    const uint32_t n_tokens = (uint32_t) ids->ne[1];
    t.tokens                = std::max(t.tokens + n_tokens, s.tokens);
    s.tokens                = t.tokens;
    for (uint32_t e : s.op.distinct) {
        s.cache.use(t.first_record + e, t.tokens, n_tokens, s.op.count[e]);
        if (s.notes.trace.on()) {
            s.notes.trace.note({ t.tokens, (uint32_t) (&t - s.tensors.data()), e, n_tokens, s.op.count[e] });
        }
        if (decode) {
            s.notes.count_reuse(t.tokens - n_tokens, s.records[t.first_record + e].used);
        }
        s.records[t.first_record + e].used = t.tokens + 1;
    }

    s.reads.settle(false);
    s.op.waiting.clear();
    s.op.plan.clear();
    s.op.planned = 0;

    // hold what is there before anything is evicted
    for (uint32_t e : s.op.distinct) {
        const uint32_t index = t.first_record + e;
        flash_record & r     = s.records[index];
        const bool     there = r.state == record_state::ready || r.state == record_state::raw;
        if (r.place == record_place::slot) {
            s.cache.hold(r.index);
        }
        if (!there || r.fetched) {
            s.notes.stats.misses++;
            s.op.read = &r;
        } else {
            s.notes.stats.hits++;
        }
        r.fetched = false;
        r.warmed  = false;
        s.op.waiting.push_back(index);
    }
    if (decode) {
        take_early_rows(s, t, op);
        begin_early(s, t, op);
    }
    // the layer's other tensors will ask for the same experts: their reads overlap this op's computing
    auto comes_later = [&](const flash_tensor & other) {
        // false: already computed in this pass, or not yet known to come
        return other.order > t.order && other.n_records == t.n_records;
    };
    // and what they have of them is not to make room for this one's
    for (uint32_t sibling : s.groups[t.group]) {
        const flash_tensor & other = s.tensors[sibling];
        for (size_t i = 0; decode && comes_later(other) && i < s.op.distinct.size(); i++) {
            const flash_record & r = s.records[other.first_record + s.op.distinct[i]];
            if (r.place == record_place::slot) {
                s.cache.hold(r.index);
            }
        }
    }
    // a prompt fills empty slots only, with the experts that it uses most, and leaves the other tensors their share
    auto to_slot = [&](const flash_tensor & tensor, uint32_t index) {
        const uint32_t share = s.cache.n_slots(tensor.size_class) / s.needs.classes[tensor.size_class].tensors;
        const bool     may   = decode || (s.cache.n_empty(tensor.size_class) > 0 &&
                                   s.op.count[index - tensor.first_record] >= count_of_rank(s, share));
        if (!may || !fetch_to_slot(s, index, decode)) {
            return false;
        }
        note_fresh(s, s.records[index]);
        return true;
    };
    for (uint32_t index : s.op.waiting) {
        if (s.records[index].state == record_state::absent) {
            if (!s.check_file(s.records[index])) {
                return;
            }
            if (!to_slot(t, index)) {
                s.op.plan.push_back(index);
            }
        }
    }
    const bool streaming = !s.op.plan.empty();

    for (uint32_t sibling : s.groups[t.group]) {
        const flash_tensor & other = s.tensors[sibling];
        if (!comes_later(other)) {
            continue;
        }
        for (uint32_t e : s.op.distinct) {
            const uint32_t index = other.first_record + e;
            flash_record & r     = s.records[index];
            if (r.state != record_state::absent) {
                continue;
            }
            if (!s.check_file(r)) {
                return;
            }
            // in a cache too small for a whole layer, the ring keeps this from evicting what was just fetched
            if ((decode && streaming) || !to_slot(other, index)) {
                s.op.plan.push_back(index);
            }
            r.fetched = true;
        }
    }
    pump_experts(s);
    take_wave(s, t, decode);
}

static void next_expert_wave(llama_flash_session & s, const flash_tensor & t, bool decode) {
    s.early.now = false;
    for (;;) {
        const bool pumped = pump_experts(s);
        s.reads.settle(false);
        if (s.failed()) {
            s.op.any = false;
            return;
        }
        const there_count count = count_there(s, decode);
        if (count.ring >= count.wish || count.slots >= count.wish || (count.ring + count.slots > 0 && count.reading == 0)) {
            break;
        }
        if (count.reading > 0) {
            if (decode && take_early_wave(s)) {
                return;
            }
            s.reads.wait();
        } else if (!pumped) {
            // the ring is full of experts that were read ahead for others
            if (s.expert_ring.empty()) {
                fail_internal(s, t, "no room for an expert");
                return;
            }
            s.drop_ring(s.expert_ring);
            s.op.plan.assign(s.op.waiting.begin(), s.op.waiting.end());
            s.op.planned = 0;
        }
    }
    take_wave(s, t, decode);
}

// The op of a layer's first tensor has its input, and a single token: scores the next layer's experts while it computes.
static void look_ahead(llama_flash_session & s, const flash_tensor & t, const ggml_tensor * op) {
    auto &         look  = s.look;
    const uint32_t first = s.groups[t.group].front();
    look.group           = -1;
    look.scored          = false;
    if (s.params.lookahead == 0 || &s.tensors[first] != &t) {
        return;
    }
    if (look.routers.size() != s.groups.size()) {
        look.routers.assign(s.groups.size(), router());
        look.next.assign(s.groups.size(), -1);
        look.last = -1;
    }
    if (!look.routers[t.group].weight) {
        look.routers[t.group] = router::of(op);
    }
    // the layers come in one order; the last one's next would be the first, of the next token
    if (look.last >= 0 && (uint32_t) look.last < t.group && look.next[(size_t) look.last] < 0) {
        look.next[(size_t) look.last] = (int32_t) t.group;
    }
    look.last = (int32_t) t.group;

    const int32_t next = look.next[t.group];
    const bool    one  = op->src[2]->ne[1] == 1;
    if (!one || next < 0 || !look.routers[t.group].weight || !look.routers[(size_t) next].weight) {
        return;
    }
    const router & r = look.routers[(size_t) next];
    if (r.n_embd != op->src[1]->ne[0] || r.n_embd != look.routers[t.group].n_embd) {
        return;
    }
    input_for(look.routers[t.group], r, (const float *) op->src[1]->data, look.input);
    look.scores.resize(r.n_expert);
    look.n_used = (uint32_t) op->src[2]->ne[0];
    look.group  = next;
}

// Starts reads of the experts that the next layer will probably use, once: when nothing that this op waits for is in their way.
static void fetch_expected(llama_flash_session & s) {
    auto & look = s.look;
    if (look.group < 0 || !look.scored || s.failed() || s.op.more || s.op.planned < s.op.plan.size()) {
        return; // nothing is expected, or this layer's own reads wait for room
    }
    const auto &   group = s.groups[(size_t) look.group];
    const uint32_t n     = std::min<uint32_t>(look.n_used, (uint32_t) look.scores.size());
    look.group           = -1;
    look.best.resize(look.scores.size());
    for (uint32_t e = 0; e < look.best.size(); e++) {
        look.best[e]   = e;
        look.scores[e] = std::isnan(look.scores[e]) ? -std::numeric_limits<float>::infinity() : look.scores[e];
    }
    std::partial_sort(look.best.begin(), look.best.begin() + n, look.best.end(),
                      [&](uint32_t a, uint32_t b) { return look.scores[a] > look.scores[b]; });
    // tensors that use the router's experts by its numbers, and are used at all
    auto uses_them = [&](const flash_tensor & t) { return t.n_records == look.scores.size() && t.order != 0; };
    for (uint32_t i = 0; i < n; i++) { // what is there already is not to make room
        for (uint32_t sibling : group) {
            const flash_tensor & t = s.tensors[sibling];
            if (uses_them(t) && s.records[t.first_record + look.best[i]].place == record_place::slot) {
                s.cache.hold(s.records[t.first_record + look.best[i]].index);
            }
        }
    }
    uint32_t started = 0;
    for (uint32_t i = 0; i < n && started < s.params.lookahead; i++) {
        bool any = false;
        for (uint32_t sibling : group) {
            const flash_tensor & t     = s.tensors[sibling];
            const uint32_t       index = t.first_record + look.best[i];
            if (!uses_them(t) || s.records[index].state != record_state::absent) {
                continue;
            }
            if (!s.check_file(s.records[index])) {
                return;
            }
            if (!fetch_to_slot(s, index, true)) {
                break;
            }
            s.records[index].fetched = true;
            s.records[index].warmed  = true; // if the read fails, nobody may miss it
            s.notes.stats.experts_expected++;
            any = true;
        }
        started += any;
    }
    s.reads.submit();
}

// The tensors of a layer are read ahead in the order in which the graph uses them, learnt on the first pass.
static void note_use(llama_flash_session & s, flash_tensor & t) {
    if (t.order != 0) {
        return;
    }
    t.order      = s.op.stamp;
    auto & group = s.groups[t.group];
    std::sort(group.begin(), group.end(), [&](uint32_t a, uint32_t b) {
        // 0, not used yet, wraps around and comes last
        return s.tensors[a].order - 1 < s.tensors[b].order - 1;
    });
}

void flash_mul_mat_id(llama_flash_session & s, flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op) {
    run_waves(
        s, t, params,
        [&] {
            note_use(s, t);
            first_expert_wave(s, t, op);
            look_ahead(s, t, op);
        },
        [&] {
            if (s.look.group >= 0 && !s.look.scored) {
                score_experts(s.look.routers[(size_t) s.look.group], s.look.input.data(), params->ith, params->nth, s.look.scores.data());
                ggml_barrier(params->threadpool);
                if (params->ith == 0) {
                    s.look.scored = true;
                    fetch_expected(s);
                }
            }
            if (s.early.now) {
                stock_mul_mat_id(s.tensors[s.early.tensor].kernel, params, &s.early.op, s.op.table.data());
            } else {
                stock_mul_mat_id(t.kernel, params, op, s.op.table.data());
            }
        },
        [&] {
            next_expert_wave(s, t, op->src[2]->ne[1] <= DECODE_TOKENS);
            fetch_expected(s);
        });
}

// panels

// Reads ahead in the order of use, as far as the ring has room.
static bool pump_panels(llama_flash_session & s) {
    bool any = false;
    while (!s.panel_order.empty()) {
        if (s.panel_next == s.panel_order.size()) {
            if (!s.panel_order_known) {
                break;
            }
            s.panel_next = 0;
        }
        const uint32_t index = s.panel_order[s.panel_next];
        flash_record & r     = s.records[index];
        if (r.state != record_state::absent || !s.check_file(r) || !s.ring_room(s.panel_ring, r, index)) {
            break; // round the cycle, or full
        }
        s.fetch(index);
        s.panel_next++;
        any = true;
    }
    s.reads.submit();
    return any;
}

// Brings the reads in line with an op on t: its first streamed panel is the oldest in the ring, or the next to be read.
static void seek_panels(llama_flash_session & s, flash_tensor & t) {
    if (t.n_pinned == t.n_records) {
        return;
    }
    const uint32_t wanted = t.first_record + t.n_pinned;
    if (t.order == 0) {
        t.order = s.op.stamp;
        // first pass: what was read ahead, if anything, was for another order
        for (uint32_t i = t.n_pinned; i < t.n_records; i++) {
            s.panel_order.push_back(t.first_record + i);
        }
    } else if (!s.panel_order_known && wanted == s.panel_order.front()) {
        s.panel_order_known = true;
    }
    // panels whose op was left out this time (the output matrix, for a ubatch without outputs)
    while (!s.panel_ring.empty() && s.panel_ring.record_in(s.panel_ring.oldest()) != wanted) {
        const uint32_t index = s.panel_ring.record_in(s.panel_ring.oldest());
        while (s.records[index].state == record_state::reading && s.reads.settle(true)) {
        }
        s.release(index);
    }
    if (s.panel_ring.empty()) {
        s.panel_next = (size_t) (std::find(s.panel_order.begin(), s.panel_order.end(), wanted) - s.panel_order.begin());
    }
}

// Sets what to compute next: the pinned run, or the streamed panel `index`.
static void next_panel(llama_flash_session & s, const flash_tensor & t, uint32_t i) {
    const uint32_t index = t.first_record + i;
    flash_record & r     = s.records[index];
    s.op.any             = false;

    while (r.state == record_state::absent || r.state == record_state::reading) {
        const bool pumped = pump_panels(s);
        s.reads.settle(false);
        if (s.failed()) {
            return;
        }
        if (r.state == record_state::reading) {
            s.reads.wait();
        } else if (r.state == record_state::absent && !pumped) {
            if (s.panel_ring.empty()) {
                fail_internal(s, t, "no room for a panel");
                return;
            }
            s.drop_ring(s.panel_ring);
            s.panel_next = (size_t) (std::find(s.panel_order.begin(), s.panel_order.end(), index) - s.panel_order.begin());
        }
    }
    if (r.check != byte_check::none) {
        s.op.checking.push_back(index);
    }
    if (r.state == record_state::raw) {
        s.op.arrived.push_back(index);
    }
    s.op.wave.push_back(index);
    s.op.data = r.data;
    s.op.row  = r.row;
    s.op.rows = r.rows;
    s.op.any  = true;
    s.op.more = i + 1 < t.n_records;
    s.op.read = &r;
    s.notes.stats.panel_reads++;
}

void flash_mul_mat(llama_flash_session & s, flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op) {
    uint32_t i = 0; // thread 0: next panel
    run_waves(
        s, t, params,
        [&] {
            seek_panels(s, t);
            pump_panels(s);
            t.tokens       = std::max(t.tokens + (uint64_t) ggml_nrows(op->src[1]), s.panel_tokens);
            s.panel_tokens = t.tokens;
            if (t.n_pinned == 0) {
                next_panel(s, t, i++);
                return;
            }
            const flash_record & last = s.records[t.first_record + t.n_pinned - 1];
            s.op.data                 = t.home;
            s.op.row                  = 0;
            s.op.rows                 = last.row + last.rows;
            s.op.any                  = true;
            s.op.more                 = t.n_pinned < t.n_records;
            s.notes.stats.panel_hits += t.n_pinned;
            i = t.n_pinned;
        },
        [&] { stock_mul_mat(t.kernel, params, op, s.op.data, s.op.row, s.op.rows); },
        [&] {
            pump_panels(s);
            next_panel(s, t, i++);
        });
}

void flash_fail_unbound(llama_flash_session & s, const ggml_tensor * weight) {
    if (const session_lock lock(s); lock) {
        s.reads.fail_op(LLAMA_FLASH_E_INTERNAL, weight->name, "the graph uses a part of it: it must not stay on flash");
    }
}
