#include "observe/residency.h"

#include "session.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

// N of blk.N., -1 if the name has none
static int32_t layer_of(const std::string & name) {
    int32_t layer = -1;
    return sscanf(name.c_str(), "blk.%d.", &layer) == 1 ? layer : -1;
}

uint64_t describe_tensors(const llama_flash_session & s, llama_flash_tensor * out, uint64_t capacity) {
    if (!s.bound) {
        return 0;
    }
    uint64_t n   = 0;
    auto     add = [&](const std::string & name, int32_t layer, llama_flash_kind kind, uint64_t first, uint64_t count, uint64_t bytes) {
        if (n < capacity) {
            llama_flash_tensor & t = out[n];
            t                      = {};
            snprintf(t.name, sizeof(t.name), "%s", name.c_str());
            t.layer        = layer;
            t.kind         = kind;
            t.first_record = first;
            t.n_records    = count;
            t.record_bytes = bytes;
        }
        n++;
    };
    for (const auto & t : s.table.tensors) {
        if (t.only_rows) {
            continue;
        }
        uint32_t bytes = 0;
        for (uint32_t i = t.first_record; i < t.first_record + t.n_records; i++) {
            bytes = std::max(bytes, s.table.records[i].bytes);
        }
        add(t.name, layer_of(t.name), t.is_experts ? LLAMA_FLASH_EXPERTS : LLAMA_FLASH_PANELS, t.first_record, t.n_records, bytes);
    }
    for (const auto & b : s.bundles) {
        add(b.name, b.layer, LLAMA_FLASH_NEURONS, s.table.records.size() + b.first, b.n_neurons, b.record_bytes);
    }
    return n;
}

static llama_flash_place place_of(const flash_record & r) {
    if (r.state == record_state::absent) {
        return LLAMA_FLASH_IN_FILE;
    }
    if (r.state == record_state::reading) {
        return LLAMA_FLASH_COMING;
    }
    return r.place == record_place::slot ? LLAMA_FLASH_IN_SLOT : r.place == record_place::pinned ? LLAMA_FLASH_PINNED
                                                                                                 : LLAMA_FLASH_PASSING;
}

// used: number of the last token that used a record + 1, 0: none; now: of the last token
static uint32_t age_of(uint64_t now, uint64_t used) {
    return used == 0 ? UINT32_MAX : (uint32_t) std::min<uint64_t>(now + 1 - used, UINT32_MAX - 1);
}

int32_t residency(const llama_flash_session & s, uint8_t * place, uint32_t * age, uint64_t n_records, llama_flash_error * err) {
    const uint64_t known = s.table.records.size() + s.needs.n_neurons();
    if (s.memory.total == 0 || n_records != known) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "residency: before set_memory, or of %llu records where there are %llu",
                          (unsigned long long) n_records, (unsigned long long) known);
    }
    uint64_t n    = 0;
    auto     tell = [&](llama_flash_place where, uint32_t tokens_ago) {
        if (place) {
            place[n] = (uint8_t) where;
        }
        if (age) {
            age[n] = tokens_ago;
        }
        n++;
    };
    for (const auto & r : s.table.records) {
        const flash_tensor & t = s.table.tensors[r.tensor];
        // all panels of a tensor are used by each token that it sees
        tell(place_of(r), t.is_experts ? age_of(s.clock.now, r.used) : age_of(s.panels.clock.now, t.tokens > 0 ? t.tokens + 1 : 0));
    }
    for (const auto & b : s.bundles) {
        for (uint32_t i = 0; i < b.n_neurons; i++) {
            tell(s.neurons.place_of(b, i), age_of(s.clock.now, s.neurons.used_by(b.first + i)));
        }
    }
    return LLAMA_FLASH_OK;
}

// experts and panels as they were bound, then bundles by layer
bool trace_tensor(const llama_flash_session & s, uint32_t index, llama_flash_trace_tensor & out) {
    const auto & tensors = s.table.tensors;
    out                  = {};
    if (index < tensors.size()) {
        const flash_tensor & t = tensors[index];
        snprintf(out.name, sizeof(out.name), "%s", t.name.c_str());
        if (t.is_experts) {
            out.n_records    = t.n_records;
            out.group        = t.group;
            out.size_class   = t.size_class;
            out.record_bytes = s.table.class_bytes[t.size_class];
            out.n_slots      = s.memory.total ? s.experts.n_slots(t.size_class) : 0;
        }
        return true;
    }
    if (index - tensors.size() >= s.bundles.size()) {
        return false;
    }
    const flash_bundle & b = s.bundles[index - tensors.size()];
    snprintf(out.name, sizeof(out.name), "%s", b.name.c_str());
    out.n_records    = b.n_neurons;
    out.group        = (uint32_t) s.table.groups.size() + b.index;
    out.size_class   = (uint32_t) s.table.class_bytes.size();
    out.neurons      = 1;
    out.record_bytes = s.needs.neuron_slot;
    out.n_slots      = s.memory.total ? s.neurons.n_slots() : 0;
    out.n_pinned     = b.n_pinned;
    return true;
}
