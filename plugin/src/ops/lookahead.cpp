#include "ops/lookahead.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

void lookahead::reserve(uint32_t n_experts, bool tries_others) {
    wish                    = std::min(n_experts, table.n_expert_max);
    tries                   = tries_others;
    most                    = wish;
    pays                    = trial(wish + 2, wish); // from none to one more
    notes.stats.reads_ahead = table.groups.size() > 1 ? most : 0;
}

void lookahead::forget() {
    token = 0;
    timed = false;
    reserve(wish, tries);
    routers.clear();
    next.clear();
    last   = -1;
    group  = -1;
    scored = false;
}

// by the name of any tensor of the layer
router lookahead::given_to(uint32_t group) const {
    for (uint32_t tensor : table.groups[group]) {
        if (const auto found = given.find(table.tensors[tensor].name); found != given.end()) {
            return router(found->second);
        }
    }
    return {};
}

// Notes the router of t's layer, and that this layer comes after the one before.
void lookahead::find_next(const flash_tensor & t, const ggml_tensor * op) {
    if (routers.size() != table.groups.size()) {
        routers.assign(table.groups.size(), router());
        next.assign(table.groups.size(), -1);
        last = -1;
    }
    if (!routers[t.group].weight) {
        routers[t.group] = router::of(op);
        if (!routers[t.group].weight && !given.empty()) {
            routers[t.group] = given_to(t.group);
        }
    }
    // layers come in ascending order; after the last one comes the first, but with the next token: nothing to read ahead
    if (last >= 0 && (uint32_t) last < t.group && next[(size_t) last] < 0) {
        next[(size_t) last] = (int32_t) t.group;
    }
    last = (int32_t) t.group;
}

// What it brings and what it costs is in the time that a token spends in ops: reads that nobody waits for, and those in the way of others.
void lookahead::note_token(const flash_tensor & t, bool one, uint64_t spent_ns) {
    if (!tries || std::exchange(token, t.tokens) == t.tokens) {
        return; // another layer of the same
    }
    if (one) { // prompts are not read ahead of
        most                    = pays.next(timed ? (int64_t) (spent_ns - begun) : trial::UNKNOWN);
        notes.stats.reads_ahead = pays.chosen();
    }
    timed = one;
    begun = spent_ns;
}

void lookahead::begin(const flash_tensor & t, const ggml_tensor * op, uint64_t spent_ns) {
    group  = -1;
    scored = false;
    if (wish == 0 || &table.tensors[table.groups[t.group].front()] != &t) {
        return;
    }
    find_next(t, op);
    const int32_t after = next[t.group];
    const bool    one   = op->src[2]->ne[1] == 1;
    note_token(t, one, spent_ns);
    if (most == 0 || !one || after < 0 || !routers[t.group].weight || !routers[(size_t) after].weight) {
        return;
    }
    const router & r = routers[(size_t) after];
    if (r.n_embd != op->src[1]->ne[0] || r.n_embd != routers[t.group].n_embd) {
        return;
    }
    input_for(routers[t.group], r, (const float *) op->src[1]->data, input);
    scores.resize(r.n_expert);
    n_used = (uint32_t) op->src[2]->ne[0];
    group  = after;
}

bool lookahead::score(const ggml_compute_params * params) {
    if (group < 0 || scored) {
        return false;
    }
    score_experts(routers[(size_t) group], input.data(), params->ith, params->nth, scores.data());
    ggml_barrier(params->threadpool);
    if (params->ith == 0) {
        scored = true;
    }
    return params->ith == 0;
}

// the n likeliest experts, in order
void lookahead::rank(uint32_t n) {
    best.resize(scores.size());
    for (uint32_t e = 0; e < best.size(); e++) {
        best[e]   = e;
        scores[e] = std::isnan(scores[e]) ? -std::numeric_limits<float>::infinity() : scores[e];
    }
    std::partial_sort(best.begin(), best.begin() + n, best.end(), [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; });
}

// Expected experts that are in slots already stay there: those that are read must not evict them.
void lookahead::hold(const std::vector<uint32_t> & tensors, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t sibling : tensors) {
            const flash_tensor & t = table.tensors[sibling];
            if (uses_them(t)) {
                experts.hold(t.first_record + best[i]);
            }
        }
    }
}

void lookahead::fetch() {
    if (group < 0 || !scored || reads.failed()) {
        return; // nothing is expected
    }
    const auto &   tensors = table.groups[(size_t) group];
    const uint32_t n       = std::min<uint32_t>(n_used, (uint32_t) scores.size());
    group                  = -1;
    rank(n);
    hold(tensors, n);
    uint32_t started = 0;
    for (uint32_t i = 0; i < n && started < most; i++) {
        bool any = false;
        for (uint32_t sibling : tensors) { // those that use the experts that this router chooses
            const flash_tensor & t     = table.tensors[sibling];
            const uint32_t       index = t.first_record + best[i];
            if (!uses_them(t) || table.records[index].state != record_state::absent) {
                continue;
            }
            if (!experts.check_file(table.records[index])) {
                return;
            }
            if (!experts.fetch_to_slot(index, true)) {
                break;
            }
            table.records[index].fetched = true;
            table.records[index].warmed  = true; // no op has asked for it: if the read fails, that is no error
            notes.stats.experts_expected++;
            any = true;
        }
        started += any;
    }
    reads.submit();
}
