// The flash tensors of one model: what is bound, where each record is, and what the memory given is used for.
//
// Locking: session_lock is held from the begin to the end of a flash op (by the pool's thread 0) and during every call of the C
// interface, which takes it (with_session); the functions below expect it to be held. Whatever is written under it by thread 0 is read
// by the pool's other threads after a ggml_barrier.
#pragma once

#include "store/bundle.h"
#include "memory/cache.h"
#include "ops/ffn.h"
#include "base/instruments.h"
#include "memory/layout.h"
#include "llama_flash.h"
#include "io/load.h"
#include "memory/mapping.h"
#include "store/neurons.h"
#include "io/read_queue.h"
#include "memory/ring.h"
#include "kernels/router.h"
#include "store/rows.h"
#include "kernels/shadow.h"
#include "base/status.h"

#include "ggml.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

// an op of up to this many tokens is decoding (speculation included): it may evict; a longer one is a prompt and may not
constexpr int64_t DECODE_TOKENS = 16;

// what an op may spend on a moving limit
constexpr int64_t RESIZE_NS = 1000000;

enum class record_state : uint8_t {
    absent,  // on flash only
    reading, // a read into its place is under way
    raw,     // arrived, in the file's layout
    ready,   // in the kernel's layout
};

enum class record_place : uint8_t { none, slot, ring, pinned };

struct flash_record {
    uint64_t     offset;       // in the file
    uint8_t *    data;         // where it is or is being read to; nullptr if absent
    uint64_t     used;         // experts: number of the last token that used it + 1, 0: none
    uint32_t     tensor;       // index in session::tensors
    uint32_t     bytes;
    uint32_t     row;          // first row of the matrix (panels)
    uint32_t     rows;
    int32_t      index;        // slot or ring entry
    uint32_t     checksum;     // of its bytes in the file; 0: none is kept
    record_place place;
    record_state state;
    byte_check   check;        // to be done before it is computed on
    bool         fetched;      // read for an op that has not asked for it yet
    bool         warmed;       // read by warm() or ahead of a router, and no op has asked for it yet
};

struct flash_tensor {
    std::string        name;
    ggml_tensor        weight;       // copy of the bound tensor: type, shape, strides
    const flash_file * file;
    uint64_t           offset;       // of the tensor in the file
    stock_kernel       kernel;
    uint32_t           first_record;
    uint32_t           n_records;    // experts, or panels of this matrix
    uint32_t           n_pinned;     // panels [0, n_pinned) are pinned, side by side at `home`
    uint32_t           size_class;   // experts: class of slots
    uint32_t           group;        // experts: tensors of one layer that share their ids
    uint64_t           tokens;       // number of the last token computed
    uint64_t           order;        // when it was first used, counted over the session's ops; 0: not yet
    uint8_t *          home;         // panels: reserved addresses, congruent with offset
    int32_t            home_memory;  // in session::homes, if there is a home
    bool               is_experts;
    bool               by_rows;      // rows are picked by number
    bool               only_rows;    // and nothing else is done: it has no records
    std::vector<uint32_t> row_checksums; // by row, of its first read; 0: it was not read yet
    bool               same_input;   // experts: of its layer's first tensor, as was seen in the pass before
};

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

// what is wrong where session_lock is false
constexpr const char * FORKED = "this process is a child (fork) of the one that has loaded the model, and cannot use it: load it in the child";

struct llama_flash_session {
    // life

    static llama_flash_session * create(const llama_flash_params & params, llama_flash_error * err);
    void ref() { refs++; }
    void unref(); // deletes with the last reference; in a forked child it closes files and leaves the rest as it is

    // binding (buffer_type.cpp calls these while the model loads)

    bool    bind(const ggml_tensor * tensor, int fd, uint64_t offset);
    bool    load(ggml_tensor * tensor, int fd, uint64_t offset); // one that stays in DRAM; false: the engine has to
    int32_t end_binding(llama_flash_error * err);

    flash_tensor * find(const void * tensor_data) {
        auto it = by_address.find(tensor_data);
        return it == by_address.end() ? nullptr : &tensors[it->second];
    }

    int32_t add_rows(const char * name, bool only, llama_flash_error * err);
    int32_t add_bundle(const llama_flash_bundle & description, llama_flash_error * err);

    // the bundle whose part has these addresses
    flash_bundle * find_part(const void * tensor_data, ffn_part & part) {
        auto it = part_by_address.find(tensor_data);
        if (it == part_by_address.end()) {
            return nullptr;
        }
        part = it->second.second;
        return &bundles[it->second.first];
    }

    // memory

    int32_t                  set_neurons(const llama_flash_neuron_params & params, llama_flash_error * err);
    llama_flash_requirements requirements() const;
    int32_t                  divided(uint64_t bytes, llama_flash_memory & out, llama_flash_error * err) const; // what set_memory would do
    int32_t                  set_memory(uint64_t bytes, llama_flash_error * err);
    void                     note_needs(uint32_t n_ubatch); // tokens that the work space has room for
    void                     note_memory();                 // what there is now
    int32_t                  resize(uint64_t bytes, bool urgent, llama_flash_resize & out, llama_flash_error * err); // resize.cpp

    // of resize(), the tests' too: where the way leads, and its steps

    void plan_resize(uint64_t bytes);
    bool give_back_one(bool & stuck);
    bool take_one();

    // warm.cpp

    uint64_t hot(uint64_t * ids, uint64_t capacity) const;
    int32_t  warm(const uint64_t * ids, uint64_t n, uint64_t & done, llama_flash_error * err);

    uint64_t                 slots_touched() const; // bytes
    bool                     trace_tensor(uint32_t index, llama_flash_trace_tensor & out) const; // trace.cpp

    // residency.cpp

    uint64_t describe_tensors(llama_flash_tensor * out, uint64_t capacity) const;
    int32_t  residency(uint8_t * place, uint32_t * age, uint64_t n_records, llama_flash_error * err) const;
    int32_t take_error(llama_flash_error * err);

    // ops (mul_mat.cpp, ffn.cpp): thread 0 only, under the lock

    void begin_op(const std::string & tensor); // takes the lock; may fail
    void end_op();                             // gives it back
    uint8_t * ring_room(ring & r, flash_record & record, uint32_t index);
    void      fetch(uint32_t index);           // starts the read of a record that has a place
    void      forget(flash_record & record);   // it is on flash only
    void      release(uint32_t index);         // a ring record has been computed
    void      drop_ring(ring & r);             // empties a ring; waits for reads into it
    bool      check_file(const flash_record & wanted); // false (and failed) if its file changed since it was bound
    bool      check_record(flash_record & r);          // does r.check; false (and failed): its bytes are not what they were
    bool      check_record(flash_record & r, uint32_t sum);

    bool forked() const; // this process is a child of the one that made the session; costs no system call

    bool failed() const { return reads.failed(); }

    // state

    std::atomic<uint32_t>    refs{ 1 };
    llama_flash_params       params = {};
    llama_flash_memory       memory = {};
    memory_needs             needs;    // from end_binding on
    standing_parts           standing; // of `memory`
    bool                     bound  = false;

    uint64_t                                 process = 0; // forks between this program's begin and the process that made the session
    std::unique_ptr<weight_loader>           loader; // until end_binding
    std::vector<std::unique_ptr<flash_file>> files;
    std::vector<flash_tensor>                tensors;
    std::vector<flash_record>                records;
    std::unordered_map<const void *, size_t> by_address;
    std::unordered_map<std::string, bool>    row_names;   // tables whose rows are picked by number; true: only that
    std::vector<std::vector<uint32_t>>       groups;      // tensors by group
    std::vector<uint32_t>                    class_bytes;   // slot size by class
    uint32_t                                 n_expert_max = 0;
    uint64_t                                 tokens       = 0; // the most that any tensor has seen
    uint64_t                                 panel_tokens = 0; // the same of panels, which have a clock of their own

    read_queue            reads; // closed before the memory that it writes to goes
    instruments           notes;
    slot_cache            cache;
    std::vector<uint8_t *> slot_data;  // by slot
    std::vector<uint8_t>   slot_fresh; // by slot: nothing has been read to it, so that its pages may not be there yet
    ring                  expert_ring;
    ring                  panel_ring;
    std::vector<mapping>  slot_memory; // by class
    mapping               ring_memory;
    std::vector<mapping>  homes;

    // the op in progress, see mul_mat.cpp
    struct op_state {
        session_lock              lock;
        uint64_t                  stamp = 0;
        const flash_record *      read    = nullptr; // a record of the op's tensor that it has waited for
        std::vector<const void *> table;   // n_expert addresses of this wave
        std::vector<uint32_t>     waiting; // records that are still to be computed
        std::vector<uint32_t>     arrived; // records of this wave that need repacking
        std::vector<uint32_t>     wave;    // ring records of this wave, given back after it
        std::vector<uint32_t>     plan;    // experts to stream, in order
        size_t                    planned  = 0;
        std::vector<uint64_t>     seen;    // by expert: stamp of the op that last asked for it
        std::vector<uint32_t>     count;   // by expert: tokens of the op that use it
        std::vector<uint32_t>     counts;  // of the distinct ones
        std::vector<uint32_t>     distinct;
        std::atomic<int64_t>      repack_next{ 0 };
        std::vector<int64_t>      repack_ends; // running count of row groups in `arrived`
        std::vector<uint32_t>     checking; // records of this wave whose bytes are to be checked
        std::vector<int64_t>      check_ends; // running count of pieces in `checking`
        std::vector<uint32_t>     check_sums; // of their pieces
        std::atomic<int64_t>      check_next{ 0 };
        std::vector<std::pair<uint8_t *, uint8_t *>> fresh; // in a huge page each: what is to be read to for the first time
        std::atomic<size_t>       fresh_next{ 0 };
        bool                      any  = false; // the wave has something to compute
        bool                      more = false; // another wave follows
        bool                      stop = false; // the op has failed
        const void *              data = nullptr; // panels: what to compute now
        int64_t                   row  = 0;
        int64_t                   rows = 0;
        int64_t                   begin_ns = 0;
    } op;

    // what a layer's second op (up beside gate) finds computed: the first has waited for reads meanwhile (mul_mat.cpp)
    struct early_state {
        uint32_t              tensor = 0;       // the second op's
        uint64_t              stamp  = 0;       // and its number in the session's ops
        const ggml_tensor *   input  = nullptr; // what the first op has for src[1] and src[2]
        const ggml_tensor *   ids    = nullptr;
        bool                  usable = false;
        bool                  now    = false;   // the wave is for the second op
        ggml_tensor           op     = {};      // the first op, but that it writes to `out`
        std::vector<float>    out;
        std::vector<uint64_t> done;             // by expert: stamp, if computed
    } early;

    // experts of the next layer, read before its router has spoken (mul_mat.cpp)
    struct lookahead_state {
        std::vector<router>   routers;       // by group, found on the first pass
        std::vector<int32_t>  next;          // by group: the one that is used after it; -1: not yet known, or the last
        int32_t               last  = -1;    // group of the op before
        int32_t               group = -1;    // whose experts are scored; -1: none
        uint32_t              n_used = 0;    // experts of a token
        bool                  scored = false;
        std::vector<float>    input;
        std::vector<float>    scores;        // by expert
        std::vector<uint32_t> best;          // experts, the likeliest first
    } look;

    // where a moving limit leads (resize.cpp)
    struct resize_state {
        bool          active = false;
        bool          urgent = false; // until it is done nothing is moved: what lies in a slot that vanishes is dropped
        memory_layout to;
        int64_t       last_op_ns = 0;
    } resizing;

    // neuron bundles, by layer
    std::vector<flash_bundle>  bundles;
    std::unordered_map<const void *, std::pair<uint32_t, ffn_part>> part_by_address;
    llama_flash_neuron_params  neuron_params = {};
    neuron_store               neurons{ reads, notes, bundles };
    ffn_work                   ffn;
    mapping                    neuron_slots;
    mapping                    neuron_ring_memory;
    std::vector<mapping>       neuron_homes; // resident parts and pinned records

    row_buffer rows{ reads }; // of what is picked by number

    // order in which panels are streamed
    std::vector<uint32_t> panel_order;       // unpinned panel records in order of use
    bool                  panel_order_known = false;
    size_t                panel_next        = 0; // next to fetch

    // reads of experts and panels
    struct record_reads : read_owner {
        explicit record_reads(llama_flash_session & session_) : session(session_) {}
        void ended(uint32_t index, const reader::done & done, file_state state) override { session.arrived(index, done, state); }
        llama_flash_session & session;
    } arrivals{ *this };

  private:
    friend class session_lock;

    llama_flash_session() = default;
    ~llama_flash_session() { reads.close(); }

    mutable std::mutex mutex;


    int32_t  make_records(llama_flash_error * err);
    const flash_file * file_of(int fd);
    bool     find_named_part(const ggml_tensor * tensor, uint32_t & bundle, size_t & part) const;
    bool     bind_part(const ggml_tensor * tensor, const flash_file * file, uint64_t offset);
    int32_t  check_bundles(llama_flash_error * err);
    void     lay_out_bundles();
    bool     uses_neuron_slots() const;
    const char * make_rings(uint64_t & bytes);
    const char * make_neurons(const memory_layout & to, uint64_t & bytes);
    const char * make_panels(const memory_layout & to, uint64_t & bytes);
    const char * make_slots(const memory_layout & to, uint64_t & bytes);
    bool     make_home(flash_tensor & t, uint64_t least);
    bool     make_home(flash_bundle & b, uint64_t least);
    bool     read_neurons();
    bool     check_pinned(const flash_bundle & b, uint32_t first, uint32_t n);
    bool     read_pinned();
    void     arrived(uint32_t index, const reader::done & done, file_state state);
    void     drop_all();
    standing_parts standing_now() const;
    memory_layout  layout_now() const;
    void     resize_step(int64_t until_ns);
    void     move_panels();
    bool     pin_next_panel(flash_tensor & t);
    bool     pin_more(flash_bundle & b);
};

// the i0-th of the experts that token i1 of an op passes through
inline int32_t expert_at(const ggml_tensor * ids, int64_t i0, int64_t i1) {
    return *(const int32_t *) ((const char *) ids->data + i1 * ids->nb[1] + i0 * ids->nb[0]);
}

// bytes of the whole sectors that hold the record
inline uint64_t record_span(const flash_record & r) {
    return flash_sector_ceil(r.offset + r.bytes) - flash_sector_floor(r.offset);
}

size_t   slot_bytes_of(const std::vector<flash_bundle> & bundles); // of a neuron
uint64_t n_neurons_of(const std::vector<flash_bundle> & bundles);

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
