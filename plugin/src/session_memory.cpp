// The memory given: what the tensors need, and a layout (memory/layout.h) applied to an empty session. resize.cpp changes it later.
#include "session.h"

#include "store/warm.h"

#include <algorithm>
#include <cerrno>
#include <utility>

// needs

void llama_flash_session::note_needs(uint32_t n_ubatch) {
    memory_needs n;
    table.note_needs(n);
    neurons.note_needs(n, neuron_params.mode);
    n.rows     = rows.memory_bytes();
    n.n_ubatch = n_ubatch;
    n.work     = bundles.empty() ? 0 : ffn_ops.work.bytes(bundles, n_ubatch);
    needs      = std::move(n);
}

void llama_flash_session::note_ubatch(uint32_t n_tokens) {
    note_needs(n_tokens);
    note_memory();
}

llama_flash_requirements llama_flash_session::requirements() const {
    llama_flash_requirements q = {};
    for (const auto & t : table.tensors) {
        q.n_expert_tensors += t.is_experts;
        q.n_panel_tensors += !t.is_experts && !t.only_rows;
        (t.is_experts ? q.n_experts : q.n_panels) += t.n_records;
    }
    for (const auto & r : table.records) {
        q.largest_record = std::max<uint64_t>(q.largest_record, r.bytes);
    }
    for (const auto & b : bundles) {
        q.neuron_record = std::max<uint64_t>(q.neuron_record, b.cached_bytes);
    }
    for (const auto & b : needs.bundles) {
        q.neuron_resident += b.resident;
    }
    q.expert_bytes = needs.expert_bytes;
    q.panel_bytes  = needs.panel_bytes;
    q.n_bundles    = bundles.size();
    q.n_neurons    = needs.n_neurons();
    q.neuron_bytes = needs.neuron_bytes();
    q.min_memory   = needs.minimum();
    q.max_memory   = needs.maximum();
    return q;
}

int32_t llama_flash_session::set_neurons(const llama_flash_neuron_params & p, llama_flash_error * err) {
    if (!bound || p.mode > LLAMA_FLASH_NEURONS_OFF || p.n_ubatch == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_neurons: before bind_end, or an unknown mode, or no n_ubatch");
    }
    drop_all();
    neuron_params = p;
    neurons.lay_out(p.mode);
    note_needs(p.n_ubatch);
    return LLAMA_FLASH_OK;
}

// the layout

static int32_t too_few(const memory_needs & needs, uint64_t bytes, llama_flash_error * err) {
    return flash_fail(err, LLAMA_FLASH_E_MEMORY, "%llu bytes for flash tensors are too few: at least %llu are needed", (unsigned long long) bytes,
                      (unsigned long long) needs.minimum());
}

int32_t llama_flash_session::divided(uint64_t bytes, llama_flash_memory & out, llama_flash_error * err) const {
    if (!bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "divide before bind_end");
    }
    if (bytes < needs.minimum()) {
        return too_few(needs, bytes, err);
    }
    out = describe(needs, divide(needs, bytes));
    return LLAMA_FLASH_OK;
}

int32_t llama_flash_session::set_memory(uint64_t bytes, llama_flash_error * err) {
    if (!bound) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "set_memory before bind_end");
    }
    if (bytes < needs.minimum()) {
        return too_few(needs, bytes, err);
    }
    const memory_layout to = divide(needs, bytes);
    drop_all();
    reads.forget_error(); // of records that are dropped here: it no longer matters
    memory      = describe(needs, to);
    standing    = to.standing;
    prompt_ring = to.standing.expert_ring;

    uint64_t     refused = 0; // bytes
    const char * what    = neurons.make(to, neuron_params, refused);
    what                 = what ? what : panels.make(to, refused);
    what                 = what ? what : experts.make(to, refused);
    what                 = what ? what : rows.make(refused);
    if (what) {
        drop_all();
        return flash_fail(err, LLAMA_FLASH_E_MEMORY, "the kernel refused %llu bytes for %s%s", (unsigned long long) refused, what,
                          limits_of(ENOMEM).c_str());
    }
    ffn_ops.work.reserve(bundles, needs.n_ubatch);
    if (!neurons.read_pinned() || !panels.read_pinned()) {
        const llama_flash_error e = reads.error();
        reads.forget_error();
        drop_all();
        if (err) {
            *err = e;
        }
        return e.code;
    }
    return LLAMA_FLASH_OK;
}

// drops every record; no op is in progress
void llama_flash_session::drop_all() {
    neurons.drop_all();
    reads.drain();
    experts.drop_all();
    panels.drop_all();
    rows.drop_all();
    expert_ops.forget();
    clock    = {};
    memory   = {};
    standing = {};
    resizing = {};
}

int32_t llama_flash_session::warm(const uint64_t * ids, uint64_t n, uint64_t & done, llama_flash_error * err) {
    if (memory.total == 0) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "warm: before set_memory");
    }
    done = n;
    if (failed()) {
        return LLAMA_FLASH_OK; // the caller of the decode that failed will hear of it
    }
    reads.settle(false);
    neurons.settle();
    reads.look_again();
    done = warming(experts, neurons, reads, bundles, table.records.size()).warm(ids, n);
    return LLAMA_FLASH_OK;
}
