#include "cache.h"

void slot_cache::configure(const std::vector<uint32_t> & slots_per_class) {
    slots.clear();
    classes.clear();
    n_used = 0;
    for (uint32_t c = 0; c < slots_per_class.size(); c++) {
        list l = { NONE, NONE, NONE, slots_per_class[c] };
        for (uint32_t i = 0; i < slots_per_class[c]; i++) {
            slots.push_back({ 0, c, l.empty, NONE, 0, false });
            l.empty = (int32_t) slots.size() - 1;
        }
        classes.push_back(l);
    }
}

void slot_cache::link_newest(int32_t i) {
    slot & s = slots[(size_t) i];
    list & l = classes[s.size_class];
    s.newer  = NONE;
    s.older  = l.newest;
    if (l.newest != NONE) {
        slots[(size_t) l.newest].newer = i;
    } else {
        l.oldest = i;
    }
    l.newest = i;
}

void slot_cache::unlink(int32_t i) {
    slot & s = slots[(size_t) i];
    list & l = classes[s.size_class];
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
}

int32_t slot_cache::take(uint32_t size_class, uint32_t record, uint64_t stamp, bool evict, int32_t * evicted) {
    list &  l = classes[size_class];
    int32_t i = l.empty;
    *evicted  = NONE;
    if (i != NONE) {
        l.empty = slots[(size_t) i].newer;
        n_used++;
    } else {
        // the oldest is locked only if (nearly) all are: no search
        i = l.oldest;
        if (!evict || i == NONE || slots[(size_t) i].reading || slots[(size_t) i].stamp == stamp) {
            return NONE;
        }
        *evicted = (int32_t) slots[(size_t) i].record;
        unlink(i);
    }
    slot & s  = slots[(size_t) i];
    s.record  = record;
    s.stamp   = stamp;
    s.reading = false;
    link_newest(i);
    return i;
}

void slot_cache::touch(int32_t i, uint64_t stamp) {
    slots[(size_t) i].stamp = stamp;
    if (classes[slots[(size_t) i].size_class].newest != i) {
        unlink(i);
        link_newest(i);
    }
}

void slot_cache::drop(int32_t i) {
    slot & s = slots[(size_t) i];
    list & l = classes[s.size_class];
    unlink(i);
    s.reading = false;
    s.stamp   = 0;
    s.older   = NONE;
    s.newer   = l.empty;
    l.empty   = i;
    n_used--;
}
