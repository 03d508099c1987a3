#include "memory/cache.h"

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
    carried = 0;
    n_used  = 0;
    scores.assign(n_records, NEVER);
    for (uint32_t c = 0; c < slots_per_class.size(); c++) {
        classes.emplace_back();
        for (uint32_t i = 0; i < slots_per_class[c]; i++) {
            add(c);
        }
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

// last: to be taken after all others
void slot_cache::list_empty(int32_t i, bool last) {
    slot &             s = slots[(size_t) i];
    size_class_state & c = classes[s.size_class];
    if (!s.listed) {
        s.listed = true;
        s.newer  = NONE;
        if (c.empty == NONE) {
            c.empty = c.last_empty = i;
        } else if (last) {
            slots[(size_t) c.last_empty].newer = i;
            c.last_empty                       = i;
        } else {
            s.newer = c.empty;
            c.empty = i;
        }
    }
    c.n_empty++;
}

int32_t slot_cache::pop_empty(size_class_state & c) {
    while (c.empty != NONE) {
        const int32_t i = c.empty;
        slot &        s = slots[(size_t) i];
        c.empty         = s.newer;
        s.listed        = false;
        if (!s.gone) {
            c.n_empty--;
            return i;
        }
    }
    return NONE;
}

// the slot whose record is to be evicted, NONE if all are held
int32_t slot_cache::lowest_slot(const size_class_state & c) const {
    // the first occupied bucket from the lowest on, a word of the map at a time
    const uint32_t begin = position(c.lowest);
    for (uint32_t k = 0; k <= BUCKETS / 64; k++) {
        const uint32_t w    = (begin / 64 + k) % (BUCKETS / 64);
        uint64_t       bits = c.occupied[w];
        if (k == 0) {
            bits &= ~0ull << (begin % 64);
        } else if (k == BUCKETS / 64) {
            bits &= ~(~0ull << (begin % 64));
        }
        if (bits) {
            return c.buckets[w * 64 + (uint32_t) __builtin_ctzll(bits)].oldest;
        }
    }
    return NONE;
}

int32_t slot_cache::take(uint32_t size_class, uint32_t record, bool evict, int32_t * evicted) {
    size_class_state & c = classes[size_class];
    int32_t            i = pop_empty(c);
    *evicted             = NONE;
    if (i != NONE) {
        n_used++;
    } else {
        i = evict ? lowest_slot(c) : NONE;
        if (i == NONE) {
            return NONE;
        }
        *evicted = (int32_t) slots[(size_t) i].record;
        remove(i);
    }
    slot & s  = slots[(size_t) i];
    s.record  = record;
    s.reading = false;
    s.used    = true;
    add_held(i);
    return i;
}

int32_t slot_cache::add(uint32_t size_class) {
    size_class_state & c = classes[size_class];
    if (c.count == c.members.size()) {
        c.members.push_back((int32_t) slots.size());
        slots.push_back({});
        slots.back().size_class = size_class;
    }
    const int32_t i        = c.members[c.count++];
    slots[(size_t) i].gone = false;
    list_empty(i, true); // taken by address, so that the last ones, which are retired first, stay empty longest
    return i;
}

slot_cache::retired slot_cache::retire(uint32_t size_class, bool move) {
    size_class_state & c = classes[size_class];
    retired            r = { false, NONE, NONE, NONE };
    if (c.count == 0) {
        return r;
    }
    const int32_t i = c.members[c.count - 1];
    slot &        s = slots[(size_t) i];
    if (s.used) {
        if (s.reading) {
            return r;
        }
        // where what it holds goes; the slot itself counts as gone already
        s.gone           = true;
        const bool stays = move || s.held;
        int32_t    to    = stays ? pop_empty(c) : NONE;
        if (to == NONE) {
            to = stays ? lowest_slot(c) : i;
            if (to == NONE) {
                s.gone = false;
                return r;
            }
            r.evicted = (int32_t) slots[(size_t) to].record;
            remove(to);
            slots[(size_t) to].used = false;
            n_used--;
        }
        if (to != i) {
            slot & t = slots[(size_t) to];
            t.record = s.record;
            t.used   = true;
            t.held   = s.held;
            if (s.held) {
                t.at                   = s.at;
                holding[(size_t) t.at] = to;
            } else {
                remove(i);
                insert(to);
            }
            r.moved = to;
        }
        s.used = false;
        s.held = false;
    } else {
        s.gone = true; // it stays in the list of empty ones until it is passed over
        c.n_empty--;
    }
    c.count--;
    r.done = true;
    r.slot = i;
    return r;
}

void slot_cache::add_held(int32_t i) {
    slots[(size_t) i].held = true;
    slots[(size_t) i].at   = (int32_t) holding.size();
    holding.push_back(i);
}

void slot_cache::hold(int32_t i) {
    slot & s = slots[(size_t) i];
    if (!s.held) {
        remove(i);
    } else if (s.at < carried) {
        holding[(size_t) s.at] = NONE; // read for this op by an earlier one: in its place among what this op uses
    } else {
        return;
    }
    add_held(i);
}

void slot_cache::end_op() {
    carried = 0;
    for (int32_t i : holding) {
        if (i == NONE) {
            continue; // dropped, or held again
        }
        slot & s = slots[(size_t) i];
        if (s.reading) {
            s.at                   = carried++;
            holding[(size_t) s.at] = i;
        } else {
            s.held = false;
            insert(i);
        }
    }
    holding.resize((size_t) carried);
}

void slot_cache::drop(int32_t i) {
    slot & s = slots[(size_t) i];
    if (s.held) {
        holding[(size_t) s.at] = NONE;
    } else {
        remove(i);
    }
    s.held    = false;
    s.reading = false;
    s.used    = false;
    list_empty(i);
    n_used--;
}
