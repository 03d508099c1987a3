#include "session.h"

#include <cstdio>

// experts and panels as they were bound, then bundles by layer
bool llama_flash_session::trace_tensor(uint32_t index, llama_flash_trace_tensor & out) const {
    out = {};
    if (index < tensors.size()) {
        const flash_tensor & t = tensors[index];
        snprintf(out.name, sizeof(out.name), "%s", t.name.c_str());
        if (t.is_experts) {
            out.n_records    = t.n_records;
            out.group        = t.group;
            out.size_class   = t.size_class;
            out.record_bytes = class_bytes[t.size_class];
            out.n_slots      = memory.total ? cache.n_slots(t.size_class) : 0;
        }
        return true;
    }
    if (index - tensors.size() >= bundles.size()) {
        return false;
    }
    const flash_bundle & b = bundles[index - tensors.size()];
    snprintf(out.name, sizeof(out.name), "%s", b.name.c_str());
    out.n_records    = b.n_neurons;
    out.group        = (uint32_t) groups.size() + b.index;
    out.size_class   = (uint32_t) class_bytes.size();
    out.neurons      = 1;
    out.record_bytes = slot_bytes_of(bundles);
    out.n_slots      = memory.total ? neurons.n_slots() : 0;
    out.n_pinned     = b.n_pinned;
    return true;
}
