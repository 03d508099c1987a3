#include "ops/experts.h"

#include <algorithm>
#include <functional>

// a prompt's wave is at least so many experts (all threads wait for each other between two), or as many as half of the ring holds
constexpr size_t PROMPT_WAVE = 8;

void expert_op::reserve(const llama_flash_params & params) {
    const uint32_t n      = table.n_expert_max;
    size_t         widest = 0; // records of one layer
    for (const auto & group : table.groups) {
        size_t records = 0;
        for (uint32_t t : group) {
            records += table.tensors[t].n_records;
        }
        widest = std::max(widest, records);
    }
    addresses.resize(n);
    seen.assign(n, 0);
    count.assign(n, 0);
    counts.reserve(n);
    distinct.reserve(n);
    early.reserve(n);
    look.reserve(params.lookahead, params.tries_ahead != 0);
    schedule.reserve(widest);
    waiting.reserve(n + 1);
    wave.reserve(n + 1);
}

void expert_op::forget() {
    schedule.clear();
    scheduled = 0;
    look.forget();
}

// reads

// Streams the scheduled experts as far as the ring has room.
bool expert_op::pump() {
    bool any = false;
    while (scheduled < schedule.size()) {
        const uint32_t index = schedule[scheduled];
        if (table.records[index].state == record_state::absent) {
            if (!experts.fetch_to_ring(index)) {
                break;
            }
            any = true;
        }
        scheduled++;
    }
    if (!wave.waits_for_pages()) { // else they are submitted once the pages are there
        reads.submit();
    }
    return any;
}

void expert_op::fetch_expected() {
    if (!wave.more && scheduled >= schedule.size()) { // else this layer's own reads wait for room
        look.fetch();
    }
}

// waves

// Puts a record that has arrived into the wave.
void expert_op::add_to_wave(const flash_tensor & t, uint32_t index) {
    addresses[index - t.first_record] = table.records[index].data;
    wave.add(index);
}

expert_op::there_count expert_op::count_there(bool decode) const {
    there_count n;
    for (uint32_t index : waiting) {
        const flash_record & r = table.records[index];
        n.ring += r.is_there() && r.place == record_place::ring;
        n.slots += r.is_there() && r.place != record_place::ring;
        n.reading += r.state == record_state::reading;
    }
    n.wish = decode || waiting.empty() ? 1 : std::min({ PROMPT_WAVE, waiting.size(), std::max<size_t>(1, half_ring() / table.records[waiting.front()].bytes) });
    return n;
}

// Sets the next wave: records that have arrived. When decoding, all of them. Of a prompt those in the ring, if they are worth a
// wave (half of the ring at most, so that reads go on into the other half), else those in slots: a wave of them at a time while
// others are still read, for the ring is full meanwhile.
void expert_op::set_wave(const flash_tensor & t, bool decode) {
    const there_count n          = count_there(decode);
    const bool        from_ring  = decode || n.ring >= n.wish || n.slots == 0;
    const bool        from_slots = decode || !from_ring;
    uint64_t          room       = decode ? UINT64_MAX : half_ring();
    size_t            from_slot  = decode || n.ring + n.slots == waiting.size() ? SIZE_MAX : PROMPT_WAVE;

    std::fill(addresses.begin(), addresses.end(), nullptr);
    wave.any    = false;
    size_t left = 0;
    for (uint32_t index : waiting) {
        const flash_record & r     = table.records[index];
        const bool           ring  = r.place == record_place::ring;
        const bool           taken = r.is_there() && (ring ? from_ring && room > 0 : from_slots && from_slot > 0);
        if (taken) {
            add_to_wave(t, index);
            room -= ring ? std::min<uint64_t>(room, r.bytes) : 0;
            from_slot -= ring ? 0 : 1;
        } else {
            waiting[left++] = index;
        }
    }
    waiting.resize(left);
    wave.more = left > 0;
}

// Sets a wave of what the layer's second op will find in slots. false: there is nothing.
bool expert_op::set_early_wave() {
    std::fill(addresses.begin(), addresses.end(), nullptr);
    now_early = early.find(experts, table, distinct, gate.stamp, [&](const flash_tensor & t, uint32_t index) { add_to_wave(t, index); });
    return now_early;
}

// the first wave

// Distinct experts, in order of appearance when decoding, in file order for a prompt. false: the op has failed.
bool expert_op::list(const flash_tensor & t, const ggml_tensor * ids) {
    distinct.clear();
    for (int64_t i1 = 0; i1 < ids->ne[1]; i1++) {
        for (int64_t i0 = 0; i0 < ids->ne[0]; i0++) {
            const int32_t e = expert_at(ids, i0, i1);
            if (e < 0 || (uint32_t) e >= t.n_records) {
                reads.fail_op(LLAMA_FLASH_E_INTERNAL, t.name, "an expert id out of range");
                return false;
            }
            if (seen[(size_t) e] != gate.stamp) {
                seen[(size_t) e]  = gate.stamp;
                count[(size_t) e] = 0;
                distinct.push_back((uint32_t) e);
            }
            count[(size_t) e]++;
        }
    }
    if (ids->ne[1] > table.few_tokens) {
        std::sort(distinct.begin(), distinct.end());
    }
    return true;
}

// The tensors of a layer are read ahead in the order in which the graph uses them, learnt on the first pass.
void expert_op::note_order(flash_tensor & t) {
    if (t.order != 0) {
        return;
    }
    t.order      = gate.stamp;
    auto & group = table.groups[t.group];
    std::sort(group.begin(), group.end(), [&](uint32_t a, uint32_t b) {
        // 0, not used yet, wraps around and comes last
        return table.tensors[a].order - 1 < table.tensors[b].order - 1;
    });
}

// before anything is evicted
void expert_op::hold_what_is_there(const flash_tensor & t) {
    for (uint32_t e : distinct) {
        const uint32_t index = t.first_record + e;
        flash_record & r     = table.records[index];
        experts.hold(index);
        notes.stats.experts_foreseen += r.fetched && r.warmed;
        if (!r.is_there() || r.fetched) {
            notes.stats.misses++;
            wave.read = &r;
        } else {
            notes.stats.hits++;
        }
        r.fetched = false;
        r.warmed  = false;
        waiting.push_back(index);
    }
}

// whether another of the layer's tensors will ask for the same experts; false: it was computed in this pass, or is not yet known to come
bool expert_op::comes_later(const flash_tensor & t, const flash_tensor & other) const {
    return other.order > t.order && other.n_records == t.n_records;
}

// More tokens than this have at most `rank` of the op's experts.
uint32_t expert_op::count_of_rank(size_t rank) {
    if (rank >= distinct.size()) {
        return 0;
    }
    counts.clear();
    for (uint32_t e : distinct) {
        counts.push_back(count[e]);
    }
    std::nth_element(counts.begin(), counts.begin() + (ptrdiff_t) rank, counts.end(), std::greater<uint32_t>());
    return counts[rank] + 1;
}

// A prompt fills empty slots only, with the experts that it uses most, and leaves the other tensors their share.
bool expert_op::to_slot(const flash_tensor & t, uint32_t index, bool decode) {
    const uint32_t share = experts.n_slots(t.size_class) / needs.classes[t.size_class].tensors;
    const bool     may   = decode || (experts.n_empty(t.size_class) > 0 && count[index - t.first_record] >= count_of_rank(share));
    if (!may || !experts.fetch_to_slot(index, decode)) {
        return false;
    }
    if (experts.note_first_read(index)) {
        wave.add_fresh(table.records[index]);
    }
    return true;
}

// Starts the op's own reads: to slots, or through the ring as it has room. false: the op has failed.
bool expert_op::fetch_own(const flash_tensor & t, bool decode) {
    for (uint32_t index : waiting) {
        if (table.records[index].state == record_state::absent) {
            if (!experts.check_file(table.records[index])) {
                return false;
            }
            if (!to_slot(t, index, decode)) {
                schedule.push_back(index);
            }
        }
    }
    return true;
}

// The layer's other tensors will ask for the same experts: their reads overlap this op's computing. false: the op has failed.
bool expert_op::fetch_siblings(const flash_tensor & t, bool decode) {
    const bool streaming = !schedule.empty();
    for (uint32_t sibling : table.groups[t.group]) {
        const flash_tensor & other = table.tensors[sibling];
        if (!comes_later(t, other)) {
            continue;
        }
        for (uint32_t e : distinct) {
            const uint32_t index = other.first_record + e;
            flash_record & r     = table.records[index];
            if (r.state != record_state::absent) {
                continue;
            }
            if (!experts.check_file(r)) {
                return false;
            }
            // in a cache too small for a whole layer, the ring keeps this from evicting what was just fetched
            if ((decode && streaming) || !to_slot(other, index, decode)) {
                schedule.push_back(index);
            }
            r.fetched = true;
        }
    }
    return true;
}

void expert_op::first_wave(flash_tensor & t, ggml_tensor * op) {
    const ggml_tensor * ids      = op->src[2];
    const uint32_t      n_tokens = (uint32_t) ids->ne[1];
    const bool          decode   = ids->ne[1] <= table.few_tokens;
    now_early                    = false;
    note_order(t);
    if (!list(t, ids)) {
        return;
    }
    clock.advance(t.tokens, n_tokens);
    for (uint32_t e : distinct) {
        experts.use(t, e, n_tokens, count[e]);
    }
    reads.settle(false);
    waiting.clear();
    schedule.clear();
    scheduled = 0;
    hold_what_is_there(t);
    if (decode) {
        early.hand_over(t, op, gate.stamp, waiting);
        early.begin(table, t, op, gate.stamp);
        for (uint32_t sibling : table.groups[t.group]) { // records of the other tensors must not be evicted for this one's
            const flash_tensor & other = table.tensors[sibling];
            for (size_t i = 0; comes_later(t, other) && i < distinct.size(); i++) {
                experts.hold(other.first_record + distinct[i]);
            }
        }
    }
    if (fetch_own(t, decode) && fetch_siblings(t, decode)) {
        pump();
        set_wave(t, decode);
    }
}

void expert_op::next_wave(const flash_tensor & t, bool decode) {
    now_early = false;
    for (;;) {
        const bool pumped = pump();
        reads.settle(false);
        if (reads.failed()) {
            wave.any = false;
            return;
        }
        const there_count n = count_there(decode);
        if (n.ring >= n.wish || n.slots >= n.wish || (n.ring + n.slots > 0 && n.reading == 0)) {
            break;
        }
        if (n.reading > 0) {
            if (decode && set_early_wave()) {
                return;
            }
            reads.wait();
        } else if (!pumped) {
            // the ring is full of experts that were read ahead for others
            if (experts.stream().empty()) {
                reads.fail_op(LLAMA_FLASH_E_INTERNAL, t.name, "no room for an expert");
                return;
            }
            experts.drop_ring();
            schedule.assign(waiting.begin(), waiting.end());
            scheduled = 0;
        }
    }
    set_wave(t, decode);
}

// one op, as one of the pool's threads sees it
struct expert_op::this_run {
    expert_op &                 o;
    flash_tensor &              t;
    const ggml_compute_params * params;
    ggml_tensor *               op;
    const ggml_tensor *         input     = nullptr; // that the work buffer has, as this kernel and type take it
    const void *                of_kernel = nullptr;
    ggml_type                   of_type   = GGML_TYPE_COUNT;

    void first() {
        o.first_wave(t, op);
        o.look.begin(t, op, o.gate.spent_ns);
    }

    void compute() {
        if (o.look.score(params)) {
            o.fetch_expected();
        }
        if (o.now_early) {
            multiply(o.table.tensors[o.early.second()].kernel, o.early.op());
        } else {
            multiply(t.kernel, op);
        }
    }

    // An op has many waves, of one input.
    void multiply(const stock_kernel & kernel, const ggml_tensor * product) {
        const ggml_type type  = product->src[0]->type;
        const bool      again = product->src[1] == input && kernel.extra == of_kernel && type == of_type;
        stock_mul_mat_id(kernel, params, product, o.addresses.data(), again);
        input     = product->src[1];
        of_kernel = kernel.extra;
        of_type   = type;
    }

    void next() {
        o.next_wave(t, op->src[2]->ne[1] <= o.table.few_tokens);
        o.fetch_expected();
    }

    void pages_are_there() { o.pump(); }

    void read_ahead() {
        o.fetch_expected();
        o.panels.pump();
    }

    void release() { o.experts.end_op(); }
};

void expert_op::run(flash_tensor & t, const ggml_compute_params * params, ggml_tensor * op) {
    this_run run = { *this, t, params, op };
    wave.run(run, experts, t, params);
}
