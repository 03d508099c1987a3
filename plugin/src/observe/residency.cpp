// What of the flash tensors is in memory, and when it was last used: for those who watch. Nothing is decided here.
#include "session.h"

#include "base/status.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

// N of blk.N., -1 if the name has none
static int32_t layer_of(const std::string & name) {
    int32_t layer = -1;
    return sscanf(name.c_str(), "blk.%d.", &layer) == 1 ? layer : -1;
}

uint64_t llama_flash_session::describe_tensors(llama_flash_tensor * out, uint64_t capacity) const {
    if (!bound) {
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
    for (const auto & t : tensors) {
        if (t.only_rows) {
            continue;
        }
        uint32_t bytes = 0;
        for (uint32_t i = t.first_record; i < t.first_record + t.n_records; i++) {
            bytes = std::max(bytes, records[i].bytes);
        }
        add(t.name, layer_of(t.name), t.is_experts ? LLAMA_FLASH_EXPERTS : LLAMA_FLASH_PANELS, t.first_record, t.n_records, bytes);
    }
    for (const auto & b : bundles) {
        add(b.name, b.layer, LLAMA_FLASH_NEURONS, records.size() + b.first, b.n_neurons, b.record_bytes);
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
    return r.place == record_place::slot ? LLAMA_FLASH_IN_SLOT : r.place == record_place::pinned ? LLAMA_FLASH_PINNED : LLAMA_FLASH_PASSING;
}

// used: number of the last token that used a record + 1, 0: none; now: of the last token
static uint32_t age_of(uint64_t now, uint64_t used) {
    return used == 0 ? UINT32_MAX : (uint32_t) std::min<uint64_t>(now + 1 - used, UINT32_MAX - 1);
}

int32_t llama_flash_session::residency(uint8_t * place, uint32_t * age, uint64_t n_records, llama_flash_error * err) const {
    if (memory.total == 0 || n_records != records.size() + n_neurons_of(bundles)) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "residency: before set_memory, or of %llu records where there are %llu",
                          (unsigned long long) n_records, (unsigned long long) (records.size() + n_neurons_of(bundles)));
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
    for (const auto & r : records) {
        const flash_tensor & t = tensors[r.tensor];
        // all panels of a tensor are used by each token that it sees
        tell(place_of(r), t.is_experts ? age_of(tokens, r.used) : age_of(panel_tokens, t.tokens > 0 ? t.tokens + 1 : 0));
    }
    for (const auto & b : bundles) {
        for (uint32_t i = 0; i < b.n_neurons; i++) {
            tell(neurons.place_of(b, i), age_of(tokens, neurons.used_by(b.first + i)));
        }
    }
    return LLAMA_FLASH_OK;
}
