#include "cache.h"

#include <algorithm>
#include <cmath>
#include <limits>

static constexpr double NEVER       = -std::numeric_limits<double>::infinity();
static constexpr double SCALE_BEGIN = 16.0; // octaves below one use at the beginning, where bucket 0 is

void slot_cache::configure(const std::vector<uint32_t> & slots_per_class, size_t n_records, double half_life) {
    ageing = 1.0 / half_life;
    slots.clear();
    classes.clear();
    holding.clear();
    n_used = 0;
    scores.assign(n_records, NEVER);
    for (uint32_t c = 0; c < slots_per_class.size(); c++) {
        size_class_state state;
        state.count   = slots_per_class[c];
        state.n_empty = slots_per_class[c];
        for (uint32_t i = 0; i < slots_per_class[c]; i++) {
            slots.push_back({ 0, c, state.empty, NONE, 0, false, false });
            state.empty = (int32_t) slots.size() - 1;
        }
        classes.push_back(state);
    }
    holding.reserve(slots.size());
}

void slot_cache::use(uint32_t record, uint64_t now, uint32_t n_tokens, uint32_t count) {
    // the uses are taken as spread evenly over the tokens
    const double added  = (double) count / n_tokens * (1.0 - std::exp2(-ageing * n_tokens)) / (1.0 - std::exp2(-ageing));
    const double origin = ageing * (double) now;
    scores[record]      = origin + std::log2(std::exp2(scores[record] - origin) + added);
}

// all of `newer` behind all of `older`
slot_cache::list slot_cache::join(const list & older, const list & newer) {
    if (older.newest == NONE || newer.oldest == NONE) {
        return older.newest == NONE ? newer : older;
    }
    slots[(size_t) older.newest].newer = newer.oldest;
    slots[(size_t) newer.oldest].older = older.newest;
    return { newer.newest, older.oldest };
}

// the buckets below `lowest` become one with it, their slots the older ones there
void slot_cache::raise(size_class_state & c, int64_t lowest) {
    const int64_t end = std::min(lowest, c.lowest + BUCKETS);
    list          fallen;
    for (int64_t b = c.lowest; b < end; b++) {
        fallen                 = join(fallen, c.buckets[position(b)]);
        c.buckets[position(b)] = list();
        c.occupied[position(b) / 64] &= ~(1ull << (position(b) % 64));
    }
    c.lowest = lowest;
    if (fallen.oldest != NONE) {
        c.buckets[position(lowest)] = join(fallen, c.buckets[position(lowest)]);
        c.occupied[position(lowest) / 64] |= 1ull << (position(lowest) % 64);
    }
}

void slot_cache::insert(int32_t i) {
    slot &             s = slots[(size_t) i];
    size_class_state & c = classes[s.size_class];
    const double       x = (scores[s.record] + SCALE_BEGIN) * PER_OCTAVE;

    s.bucket = x > (double) c.lowest ? (int64_t) x : c.lowest;
    if (s.bucket >= c.lowest + BUCKETS) {
        raise(c, s.bucket - BUCKETS + 1);
    }
    const uint32_t p = position(s.bucket);
    list &         l = c.buckets[p];
    s.newer          = NONE;
    s.older          = l.newest;
    if (l.newest != NONE) {
        slots[(size_t) l.newest].newer = i;
    } else {
        l.oldest = i;
        c.occupied[p / 64] |= 1ull << (p % 64);
    }
    l.newest = i;
}

void slot_cache::remove(int32_t i) {
    slot &             s = slots[(size_t) i];
    size_class_state & c = classes[s.size_class];
    const uint32_t     p = position(std::max(s.bucket, c.lowest));
    list &             l = c.buckets[p];
    if (s.newer != NONE) {
        slots[(size_t) s.newer].older = s.older;
    } else {
        l.newest = s.older;
    }
    if (s.older != NONE) {
        slots[(size_t) s.older].newer = s.newer;
    } else {
        l.oldest = s.newer;
    }
    if (l.oldest == NONE) {
        c.occupied[p / 64] &= ~(1ull << (p % 64));
    }
}

int32_t slot_cache::take(uint32_t size_class, uint32_t record, bool evict, int32_t * evicted) {
    size_class_state & c = classes[size_class];
    int32_t            i = c.empty;
    *evicted             = NONE;
    if (i != NONE) {
        c.empty = slots[(size_t) i].newer;
        c.n_empty--;
        n_used++;
    } else {
        if (!evict) {
            return NONE;
        }
        // the first occupied bucket from the lowest on, a word of the map at a time
        const uint32_t begin = position(c.lowest);
        for (uint32_t k = 0; k <= BUCKETS / 64 && i == NONE; k++) {
            const uint32_t w    = (begin / 64 + k) % (BUCKETS / 64);
            uint64_t       bits = c.occupied[w];
            if (k == 0) {
                bits &= ~0ull << (begin % 64);
            } else if (k == BUCKETS / 64) {
                bits &= ~(~0ull << (begin % 64));
            }
            if (bits) {
                i = c.buckets[w * 64 + (uint32_t) __builtin_ctzll(bits)].oldest;
            }
        }
        if (i == NONE) {
            return NONE; // all are held
        }
        *evicted = (int32_t) slots[(size_t) i].record;
        remove(i);
    }
    slot & s  = slots[(size_t) i];
    s.record  = record;
    s.reading = false;
    s.held    = true;
    holding.push_back(i);
    return i;
}

void slot_cache::hold(int32_t i) {
    if (!slots[(size_t) i].held) {
        remove(i);
        slots[(size_t) i].held = true;
        holding.push_back(i);
    }
}

void slot_cache::end_op() {
    size_t still = 0;
    for (int32_t i : holding) {
        slot & s = slots[(size_t) i];
        if (!s.held) {
            continue; // dropped
        }
        if (s.reading) {
            holding[still++] = i;
        } else {
            s.held = false;
            insert(i);
        }
    }
    holding.resize(still);
}

void slot_cache::drop(int32_t i) {
    slot &             s = slots[(size_t) i];
    size_class_state & c = classes[s.size_class];
    if (s.held) {
        holding.erase(std::find(holding.begin(), holding.end(), i));
    } else {
        remove(i);
    }
    s.held    = false;
    s.reading = false;
    s.newer   = c.empty;
    c.empty   = i;
    c.n_empty++;
    n_used--;
}
