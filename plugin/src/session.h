// The flash tensors of one model: what belongs together, how long it lives, and the lock.
//
// Stores know records and slots, ops know stores and kernels; here they meet. Locking: session_lock is held from the begin to the end
// of a flash op (by the pool's thread 0) and during every call of the C interface, which takes it (with_session); the functions below
// expect it to be held. Whatever is written under it by thread 0 is read by the pool's other threads after a ggml_barrier.
#pragma once

#include "base/instruments.h"
#include "base/status.h"
#include "io/load.h"
#include "io/read_queue.h"
#include "llama_flash.h"
#include "memory/layout.h"
#include "ops/experts.h"
#include "ops/ffn.h"
#include "ops/gate.h"
#include "ops/panels.h"
#include "ops/rows.h"
#include "store/experts.h"
#include "store/neurons.h"
#include "store/panels.h"
#include "store/records.h"
#include "store/rows.h"

#include "ggml.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

// The only way to a session's mutex. In a child (fork) of the process that has made the session it is not locked, and false: the mutex
// may be in the hands of a thread that is there in the parent only, and what it guards may be half changed for ever.
class session_lock {
  public:
    session_lock() = default;
    explicit session_lock(const llama_flash_session & session);

    explicit operator bool() const { return lock.owns_lock(); }

  private:
    std::unique_lock<std::mutex> lock;
};

// what an op may spend on a moving limit
constexpr int64_t RESIZE_NS = 1000000;

// what is wrong where session_lock is false
constexpr const char * FORKED = "this process is a child (fork) of the one that has loaded the model, and cannot use it: load it in the child";

struct llama_flash_session final : op_gate {
    // life

    static llama_flash_session * create(const llama_flash_params & params, llama_flash_error * err);
    void                         ref() { refs++; }
    void                         unref(); // deletes with the last reference; in a forked child it closes files and leaves the rest as it is

    bool forked() const; // this process is a child of the one that made the session; costs no system call
    bool failed() const { return reads.failed(); }

    int32_t take_error(llama_flash_error * err);

    // binding (bind.cpp), while the model loads

    bool    bind(const ggml_tensor * tensor, int fd, uint64_t offset);
    bool    load(ggml_tensor * tensor, int fd, uint64_t offset); // one that stays in DRAM; false: the engine has to
    int32_t end_binding(llama_flash_error * err);
    int32_t add_rows(const char * name, bool only, llama_flash_error * err);
    int32_t add_router(const char * experts, router_values values, llama_flash_error * err);
    int32_t add_bundle(const llama_flash_bundle & description, llama_flash_error * err);

    flash_tensor * find(const void * tensor_data) {
        auto it = by_address.find(tensor_data);
        return it == by_address.end() ? nullptr : &table.tensors[it->second];
    }

    // the bundle whose part has these addresses
    flash_bundle * find_part(const void * tensor_data, ffn_part & part) {
        auto it = part_by_address.find(tensor_data);
        if (it == part_by_address.end()) {
            return nullptr;
        }
        part = it->second.second;
        return &bundles[it->second.first];
    }

    // memory (session_memory.cpp)

    int32_t                  set_neurons(const llama_flash_neuron_params & params, llama_flash_error * err);
    llama_flash_requirements requirements() const;
    int32_t                  divided(uint64_t bytes, llama_flash_memory & out, llama_flash_error * err) const; // what set_memory would do
    int32_t                  set_memory(uint64_t bytes, llama_flash_error * err);
    int32_t                  warm(const uint64_t * ids, uint64_t n, uint64_t & done, llama_flash_error * err);
    llama_flash_stats        statistics() const;

    // resize.cpp. resize() is made of the other three, which tests call, too: the target, and one step towards it

    int32_t resize(uint64_t bytes, bool urgent, llama_flash_resize & out, llama_flash_error * err);
    int32_t few_tokens(bool few, llama_flash_error * err);
    void    set_target(uint64_t bytes);
    bool    give_back_one(bool & stuck);
    bool    take_one();

    // ops: thread 0 only

    void begin_op(const std::string & tensor) override; // takes the lock; may fail
    void end_op() override;                             // gives it back
    void note_ubatch(uint32_t n_tokens) override;
    void fail_unbound(const ggml_tensor * weight); // an op on a part of a flash tensor

    // state

    std::atomic<uint32_t>     refs{ 1 };
    uint64_t                  process       = 0; // forks between this program's begin and the process that made the session
    llama_flash_params        params        = {};
    bool                      bound         = false;
    llama_flash_neuron_params neuron_params = {};
    memory_needs              needs;           // from end_binding on
    llama_flash_memory        memory = {};     // in use now; but its total is the target of a resize under way
    standing_parts            standing;        // of `memory`
    uint64_t                  prompt_ring = 0; // bytes of the ring of experts, unless few tokens are computed at once

    std::unique_ptr<weight_loader>                                  loader; // until end_binding
    std::vector<std::unique_ptr<flash_file>>                        files;
    std::unordered_map<const void *, size_t>                        by_address;
    std::unordered_map<const void *, std::pair<uint32_t, ffn_part>> part_by_address;
    std::unordered_map<std::string, bool>                           row_names; // tables whose rows are picked by number; true: only that
    record_table                                                    table;
    std::vector<flash_bundle>                                       bundles; // by layer

    instruments  notes;
    read_queue   reads; // closed before the memory that it writes to goes
    token_clock  clock; // of experts and neurons
    expert_store experts{ table, reads, notes, needs };
    panel_store  panels{ table, reads, notes, needs };
    neuron_store neurons{ reads, notes, needs, bundles };
    row_store    rows{ reads, notes };

    expert_op expert_ops{ *this, reads, notes, table, needs, clock, experts, panels };
    panel_op  panel_ops{ *this, reads, notes, table, experts, panels };
    row_op    row_ops{ *this, reads, rows };
    ffn_op    ffn_ops{ *this, reads, notes, clock, neurons, bundles, neuron_params };

    // where a moving limit leads (resize.cpp)
    struct resize_state {
        bool          active = false;
        bool          urgent = false; // until it is done nothing is moved: what lies in a slot that vanishes is dropped
        memory_layout to;
        int64_t       last_op_ns = 0;
    } resizing;

  private:
    friend class session_lock;

    llama_flash_session() = default;
    ~llama_flash_session() { reads.close(); }

    const flash_file * file_of(int fd);
    bool               find_named_part(const ggml_tensor * tensor, uint32_t & bundle, size_t & part) const;
    bool               bind_part(const ggml_tensor * tensor, const flash_file * file, uint64_t offset);
    int32_t            check_bundles(llama_flash_error * err) const;
    void               note_needs(uint32_t n_ubatch);
    void               drop_all();
    memory_layout      layout_now() const;
    void               note_memory();
    void               resize_step(int64_t until_ns);

    mutable std::mutex mutex;

    // of the op in progress
    session_lock op_lock;
    int64_t      op_begin_ns = 0;
};

// What calls of the C interface are made of: f(), which returns a code, under the session's lock. call: its name, for errors.
template <typename F> int32_t with_session(const llama_flash_session * session, const char * call, llama_flash_error * err, F f) {
    if (!session) {
        return flash_fail(err, LLAMA_FLASH_E_INVALID, "%s: no session", call);
    }
    return guarded(err, [&] {
        const session_lock lock(*session);
        return lock ? f() : flash_fail(err, LLAMA_FLASH_E_INVALID, "%s: %s", call, FORKED);
    });
}
