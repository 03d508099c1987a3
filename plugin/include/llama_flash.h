// llama-flash: weights of a llama.cpp model that stay in the GGUF file ("flash tensors").
//
// This is the plugin's only public header; python/llama_flash/native/bindings.py is generated from it.
//
// Life of a session, in this order:
//   llama_flash_register()                  once per process, before the first model is loaded
//   llama_flash_session_new()               one session per model
//   llama_flash_session_add_bundle()        for each layer whose feed-forward block the file stores as neuron bundles
//   llama_flash_session_bind_begin()        on the thread that loads the model
//     llama_flash_load_model()              with tensor_buft_overrides that name llama_flash_buffer_type()
//   llama_flash_session_bind_end()
//     llama_flash_new_context()             with llama_flash_abort as abort callback, the session as its data
//   llama_flash_session_set_neurons()       with bundles: how their active sets are found; before set_memory
//   llama_flash_session_set_memory()        nothing can be computed before; may be called again between decodes
//     llama_decode() ...                    after each: llama_flash_session_take_error()
//   llama_flash_session_free()              before or after the model is freed: the model's buffers hold a reference
//
// Threads: bind_begin, the load of the model and bind_end belong to one thread. All other calls with a session may come from any
// thread; they wait until the op in progress has ended, but for abort, which waits for nothing. One thread decodes at a time per session:
// an error is the session's, and the context that meets it must be the one that caused it. A session that was freed must not be used.
//
// Fork: in a child of the process that has made it, a session cannot be used, and nothing waits for what its parent's threads held when
// they were left behind. Calls that return a code (bind_begin, bind_end, add_bundle, add_rows, bind_weight, set_neurons, requirements,
// divide, set_memory, resize, few_tokens, memory, warm, trace, trace_tensor, residency, reuse, take_error, stats) return LLAMA_FLASH_E_INVALID, with a zeroed
// result where they have one; those that return a number (hot, tensors, trace_take) return 0. abort returns true, so that llama_decode
// stops before it begins; its results would be void. free closes the files. Sessions that the child makes itself work as any.
//
// Errors: functions that return int32_t return LLAMA_FLASH_OK or an error code and fill *err (may be NULL). No
// exception and no abort crosses this boundary. All sizes are in bytes, all times in nanoseconds.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#    define LLAMA_FLASH_API __attribute__((visibility("default")))
#else
#    define LLAMA_FLASH_API
#endif

#define LLAMA_FLASH_API_VERSION 10

// how far llama_flash_session_reuse looks back, in tokens
#define LLAMA_FLASH_REUSE_TOKENS 256

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct llama_context_params;
struct llama_model;
struct llama_model_params;

// opaque: the flash tensors of one model, their slots and their reader
struct llama_flash_session;

enum llama_flash_code {
    LLAMA_FLASH_OK         = 0,
    LLAMA_FLASH_E_INVALID  = 1, // an argument or a call out of order
    LLAMA_FLASH_E_MEMORY   = 2, // the memory given is too small, or the kernel refused it
    LLAMA_FLASH_E_READ     = 3, // a read failed, came up short, or the file changed since it was loaded
    LLAMA_FLASH_E_FORMAT   = 4, // the file contradicts itself
    LLAMA_FLASH_E_INTERNAL = 5,
};

enum llama_flash_io_engine {
    LLAMA_FLASH_IO_AUTO  = 0, // io_uring where built in and allowed, else the pread pool
    LLAMA_FLASH_IO_URING = 1,
    LLAMA_FLASH_IO_PREAD = 2,
};

struct llama_flash_params {
    uint32_t io_engine;   // enum llama_flash_io_engine
    uint32_t io_depth;    // most reads in flight at once; 0: 32
    uint32_t io_threads;  // threads of the pread pool; 0: 8
    uint32_t read_bytes;  // a record is read in pieces of at most this many bytes; 0: 1 MiB
    uint32_t panel_bytes; // a panel is a run of rows of about this many bytes; 0: 4 MiB
    uint32_t lookahead;   // experts of the next layer that are read ahead of its router, most; 0: none
    uint32_t tries_ahead; // 1: one more, fewer or none where that makes tokens faster, which is tried out; 0: always as many
    uint32_t few_tokens;  // an op of up to so many tokens generates, and may evict experts; a longer one is a prompt; 0: 16
};

// the function between up (gate) and down, see docs/reference/format.md
enum llama_flash_activation {
    LLAMA_FLASH_RELU    = 0, // gated: relu(gate) * up
    LLAMA_FLASH_RELU2   = 1,
    LLAMA_FLASH_FATRELU = 2,
    LLAMA_FLASH_DRELU   = 3,
};

// how a token's active neurons are found
enum llama_flash_neuron_mode {
    LLAMA_FLASH_NEURONS_LOWRANK = 0, // by the predictors; layers without one as in OFF
    LLAMA_FLASH_NEURONS_EXACT   = 1, // gate (without gate: up) resident and computed in full
    LLAMA_FLASH_NEURONS_OFF     = 2, // not at all: whole layers are read; of experts those that are used
};

struct llama_flash_bundle_part {
    int32_t  type; // enum ggml_type; -1: the bundle has no such part
    uint32_t reserved;
    uint64_t offset; // of the part in a record, bytes
};

// One layer's neuron bundles (docs/reference/format.md), dense or of experts. What it points to is copied
struct llama_flash_bundle {
    int32_t                        layer;         // N of blk.N.ffn_bundle.weight or blk.N.ffn_bundle_exps.weight
    uint32_t                       n_ff;          // neurons, of one expert
    uint32_t                       n_embd;        // elements of a part
    uint32_t                       activation;    // enum llama_flash_activation
    float                          threshold;     // of FATRELU
    uint32_t                       split;         // layout: 0 bundled, 1 split
    uint32_t                       n_expert;      // 0: a dense block; experts have neither biases nor a predictor, and are not split
    uint32_t                       n_expert_used; // most experts of a token
    uint64_t                       record_bytes;
    struct llama_flash_bundle_part gate;
    struct llama_flash_bundle_part up;
    struct llama_flash_bundle_part down;
    const float *                  up_bias;           // [n_ff] or NULL
    const float *                  gate_bias;         // [n_ff] or NULL
    uint32_t                       predictor_rank;    // 0: no predictor
    int32_t                        predictor_in_type; // enum ggml_type
    int32_t                        predictor_out_type;
    uint32_t                       reserved;
    const void *                   predictor_in;   // [rank] rows of n_embd
    const void *                   predictor_out;  // [n_ff] rows of rank
    const float *                  predictor_bias; // [n_ff]
};

struct llama_flash_neuron_params {
    uint32_t mode;      // enum llama_flash_neuron_mode
    uint32_t window;    // previous tokens whose neurons stay; UINT32_MAX: as many as have room
    uint32_t n_ubatch;  // most tokens computed at once
    uint32_t merge_gap; // bytes not wanted that a read may cover to reach the next neuron
    uint32_t lookahead; // 1: read ahead what the next layer's predictor expects (LOWRANK)
    uint32_t reserved;
};

struct llama_flash_error {
    int32_t  code;      // enum llama_flash_code
    int32_t  sys_errno; // errno of the failed call, 0 if none
    uint64_t offset;    // byte offset in the file
    uint64_t size;      // bytes asked for
    char     file[512];
    char     tensor[128];
    char     message[512]; // one line: what happened, where, what to do
};

// what the bound tensors need, known after bind_end
struct llama_flash_requirements {
    uint32_t n_expert_tensors;
    uint32_t n_panel_tensors;
    uint64_t expert_bytes;   // all experts of all layers
    uint64_t panel_bytes;    // all panels
    uint64_t n_experts;      // expert records (one expert's slice of one tensor)
    uint64_t n_panels;       // panel records (a run of rows of one matrix)
    uint64_t largest_record; // bytes of the largest record
    uint64_t n_bundles;      // layers with neuron bundles
    uint64_t n_neurons;
    uint64_t neuron_bytes;    // all of their records
    uint64_t neuron_resident; // bytes that the mode keeps resident (EXACT)
    uint64_t neuron_record;   // bytes of the largest record's part that stays on flash
    uint64_t min_memory;      // smallest value set_memory takes
    uint64_t max_memory;      // from here on every record has its own slot
};

// how memory is divided
struct llama_flash_memory {
    uint64_t total;       // as given
    uint64_t slots;       // cache of experts and neurons
    uint64_t pinned;      // panels that never leave
    uint64_t stream;      // ring through which panels and prompts stream
    uint64_t bookkeeping; // tables, request pool, the neurons' work space
    uint64_t resident;    // gate or up matrices that EXACT keeps
    uint64_t n_slots;     // of experts
    uint64_t n_pinned;    // panels
    uint64_t n_neuron_slots;
    uint64_t n_neurons_pinned;
};

// how far llama_flash_session_resize has come
struct llama_flash_resize {
    uint64_t total; // bytes that it leads to: as asked for, but no less than `least` and no more than all records need
    uint64_t least; // bytes that rings, tables, work space and resident parts use: they do not change while the model runs
    uint32_t done;  // 0: call again
    uint32_t reserved;
};

struct llama_flash_stats {
    uint64_t bytes_read;  // from flash, as asked of the device (whole sectors)
    uint64_t bytes_used;  // of these, bytes of records
    uint64_t reads;       // read requests completed
    uint64_t hits;        // experts and neurons found in slots
    uint64_t misses;      // experts and neurons that had to be read
    uint64_t panel_hits;  // pinned panels used
    uint64_t panel_reads; // panels streamed
    uint64_t rows_read;   // rows of embedding tables
    uint64_t evictions;
    uint64_t wait_ns;              // compute threads idle for a read
    uint64_t repack_ns;            // bringing records into the kernels' layout
    uint64_t op_ns;                // inside flash ops, all of the above included
    uint64_t ops;                  // flash ops computed
    uint64_t neurons_active;       // sum over tokens and layers of what was computed
    uint64_t neurons_newly_active; // of these, not active for any of the 5 tokens before
    uint64_t neurons_expected;     // read ahead
    uint64_t experts_expected;     // records read ahead of a router
    uint64_t experts_foreseen;     // of these, those that the router then chose while they were there
    uint64_t layers_repeated;      // passes made again because the graph's activations were not the expected ones
    uint64_t predict_ns;           // finding active sets
    uint64_t manage_ns;            // memory management: slots, copies into them
    uint64_t retries;              // short reads and EINTR that were continued
    uint64_t errors;
    uint64_t resident_bytes; // slots, pins and ring touched so far
    uint64_t slots_used;     // of experts
    uint64_t neuron_slots_used;
    uint32_t io_engine;   // the I/O engine in use
    uint32_t reads_ahead; // experts of the next layer that are read ahead, most; 0: none are, or tokens are faster without
};

enum llama_flash_kind {
    LLAMA_FLASH_EXPERTS = 0,
    LLAMA_FLASH_PANELS  = 1,
    LLAMA_FLASH_NEURONS = 2,
};

// records of one tensor, or of one layer's bundle, numbered as llama_flash_session_residency has them
struct llama_flash_tensor {
    char     name[128];
    int32_t  layer; // N of blk.N., -1: of no layer
    uint32_t kind;  // enum llama_flash_kind
    uint64_t first_record;
    uint64_t n_records;
    uint64_t record_bytes; // of the largest
};

// where a record is
enum llama_flash_place {
    LLAMA_FLASH_IN_FILE = 0, // and nowhere else
    LLAMA_FLASH_COMING  = 1, // a read is under way
    LLAMA_FLASH_PASSING = 2, // in the ring
    LLAMA_FLASH_IN_SLOT = 3,
    LLAMA_FLASH_PINNED  = 4,
};

// buffers in the host's memory, pinned or not, of a context and its model, flash tensors excluded
struct llama_flash_context_memory {
    uint64_t model;   // resident weights
    uint64_t context; // KV cache and recurrent state
    uint64_t compute; // graph buffers
};

LLAMA_FLASH_API uint32_t     llama_flash_api_version(void);
LLAMA_FLASH_API const char * llama_flash_build_info(void); // version, I/O engines built in

// Adds the CPU_FLASH buffer type to the CPU backend. Call before any model is loaded and while nothing computes.
LLAMA_FLASH_API int32_t llama_flash_register(void);

// The ggml_backend_buffer_type_t to name in llama_model_tensor_buft_override.buft.
LLAMA_FLASH_API void * llama_flash_buffer_type(void);

// params may be NULL (defaults). Returns NULL and fills *err on failure (an I/O engine that is not available, say).
LLAMA_FLASH_API struct llama_flash_session * llama_flash_session_new(const struct llama_flash_params * params, struct llama_flash_error * err);
LLAMA_FLASH_API void                         llama_flash_session_free(struct llama_flash_session * session);

LLAMA_FLASH_API int32_t llama_flash_session_bind_begin(struct llama_flash_session * session, struct llama_flash_error * err);
LLAMA_FLASH_API int32_t llama_flash_session_bind_end(struct llama_flash_session * session, struct llama_flash_error * err);

// LLAMA_FLASH_E_FORMAT, with the reason, if the description contradicts itself so that memory would be touched that is not the
// session's. Whether the file keeps to its format is for its reader to check (python/llama_flash/model/bundles.py).
LLAMA_FLASH_API int32_t llama_flash_session_add_bundle(struct llama_flash_session * session, const struct llama_flash_bundle * bundle, struct llama_flash_error * err);

// After bind_end, before set_memory (which has to follow again after a change).
LLAMA_FLASH_API int32_t llama_flash_session_set_neurons(struct llama_flash_session * session, const struct llama_flash_neuron_params * params, struct llama_flash_error * err);

LLAMA_FLASH_API int32_t llama_flash_session_requirements(const struct llama_flash_session * session, struct llama_flash_requirements * out);

// How set_memory would divide so many bytes, after bind_end; nothing is allocated or read. LLAMA_FLASH_E_MEMORY if bytes < min_memory.
LLAMA_FLASH_API int32_t llama_flash_session_divide(const struct llama_flash_session * session, uint64_t bytes, struct llama_flash_memory * out, struct llama_flash_error * err);

// Gives the session `bytes` of DRAM for slots, pins, ring and bookkeeping. Drops what was cached.
// Pinned panels are read here. LLAMA_FLASH_E_MEMORY if bytes < min_memory.
LLAMA_FLASH_API int32_t llama_flash_session_set_memory(struct llama_flash_session * session, uint64_t bytes, struct llama_flash_error * err);

// Changes the memory given while the model runs, also in the middle of a decode, and keeps what is cached as far as it fits. Moves
// on by a few milliseconds and returns: to be called until out->done. Ops that run meanwhile move on as well. urgent: give back
// at once, even if what is dropped for it would have been worth keeping.
LLAMA_FLASH_API int32_t llama_flash_session_resize(struct llama_flash_session * session, uint64_t bytes, bool urgent, struct llama_flash_resize * out, struct llama_flash_error * err);

// few: from now on ops compute few tokens at once, until it is said otherwise. What of the ring of experts only longer ops need
// becomes slots; !few: it is a ring again. The memory given stays the same. Like a resize it is reached in steps: llama_flash_session_resize
// with the same bytes says when. A longer op that comes too soon computes the same, with fewer reads in flight.
LLAMA_FLASH_API int32_t llama_flash_session_few_tokens(struct llama_flash_session * session, bool few, struct llama_flash_error * err);

LLAMA_FLASH_API int32_t llama_flash_session_memory(const struct llama_flash_session * session, struct llama_flash_memory * out);

// Warm start: which records are in slots (experts and neurons), the most used first. Returns how many there are, fills the first
// `capacity`. The numbers mean the same in every session on the same files with the same flash tensors and read sizes.
LLAMA_FLASH_API uint64_t llama_flash_session_hot(const struct llama_flash_session * session, uint64_t * ids, uint64_t capacity);

// Starts to read records (as llama_flash_session_hot numbers them) into empty slots, a few MiB, and returns; *done: how many of the ids
// are dealt with. To be called again with the rest until *done is n. Ids that make no sense are passed over.
LLAMA_FLASH_API int32_t llama_flash_session_warm(struct llama_flash_session * session, const uint64_t * ids, uint64_t n, uint64_t * done, struct llama_flash_error * err);

// Entries of one op follow one another, ops in the order in which they ran; an op is known by its tensor and token. Its records:
// while decoding in order of appearance, of a prompt (and neurons) ascending.
//
// One record that an op asked of the cache, hit or miss.
struct llama_flash_trace_entry {
    uint64_t token;    // the cache's clock: number of the op's last token since set_memory
    uint32_t tensor;   // as llama_flash_session_trace_tensor numbers them
    uint32_t record;   // of the tensor: an expert, or a neuron of the layer's bundle
    uint32_t n_tokens; // of the op; more than the few that generate: a prompt, which evicts nothing
    uint32_t uses;     // of these tokens, how many use the expert; of a neuron 1
};

// a tensor whose records are cached: all experts' slices of one matrix, or a layer's neuron bundles
struct llama_flash_trace_tensor {
    char     name[128];
    uint32_t n_records;    // 0: a tensor of panels, which never occurs in traces
    uint32_t group;        // tensors of a layer that share their experts have the same
    uint32_t size_class;   // records of one class share its slots
    uint32_t neurons;      // 1: neuron bundles, whose slots are apart from the experts'
    uint64_t record_bytes; // of a slot
    uint64_t n_slots;      // of the class, now
    uint64_t n_pinned;     // records that are not in slots but always there (neurons)
};

// Begins a trace, with room for `capacity` entries (24 bytes each, beside the memory given); 0: ends it. Off at first. Prompts (more than 16
// tokens) ask nothing of the cache of neurons: there, traces have no entries for them.
LLAMA_FLASH_API int32_t llama_flash_session_trace(struct llama_flash_session * session, uint64_t capacity, struct llama_flash_error * err);

// Moves up to `capacity` entries, the oldest, to `entries`; returns how many. *lost: entries since the last call for which there was no room.
LLAMA_FLASH_API uint64_t llama_flash_session_trace_take(struct llama_flash_session * session, struct llama_flash_trace_entry * entries, uint64_t capacity,
                                                        uint64_t * lost);

// Tensor number `index` of traces; LLAMA_FLASH_E_INVALID: there are no more.
LLAMA_FLASH_API int32_t  llama_flash_session_trace_tensor(const struct llama_flash_session * session, uint32_t index, struct llama_flash_trace_tensor * out);
// Tensors and bundles on flash, by the numbers of their records, which follow one another without a gap. Returns how many there are,
// fills the first `capacity`. They stay the same from bind_end on; before, there are none.
LLAMA_FLASH_API uint64_t llama_flash_session_tensors(const struct llama_flash_session * session, struct llama_flash_tensor * out, uint64_t capacity);

// Where each of the n_records records of all tensors is, between two ops. place: enum llama_flash_place. age: tokens computed
// since the last one that used it, 0: the last token did; UINT32_MAX: none did since set_memory. A neuron is used when it is chosen as
// active; that it passes by with its whole layer (prompts, the mode OFF) is no use, unless it gets a slot on the way. Each array
// may be NULL. LLAMA_FLASH_E_INVALID if n_records is not the number of all records, before set_memory, and in a forked child.
LLAMA_FLASH_API int32_t llama_flash_session_residency(const struct llama_flash_session * session, uint8_t * place, uint32_t * age, uint64_t n_records,
                                                      struct llama_flash_error * err);

// Reuse by distance, counted over all ops of few tokens since the session began. counts[d], 0 < d < LLAMA_FLASH_REUSE_TOKENS:
// uses of experts and active neurons whose last use was d tokens before, 1: by the token before. counts[0]: all other uses. counts has
// LLAMA_FLASH_REUSE_TOKENS elements. LLAMA_FLASH_E_INVALID in a forked child.
LLAMA_FLASH_API int32_t llama_flash_session_reuse(const struct llama_flash_session * session, uint64_t * counts, struct llama_flash_error * err);

// ggml_abort_callback: true once a flash op has failed, so that llama_decode stops. data: the session.
LLAMA_FLASH_API bool llama_flash_abort(void * data);

// For how long a read has been waited for, in nanoseconds, and which (its file, offset and size, in *read); 0: none is. Unlike other
// calls it waits for nothing: where a drive does not answer, it is the one that says so.
LLAMA_FLASH_API uint64_t llama_flash_session_waiting(const struct llama_flash_session * session, struct llama_flash_error * read);

// Moves the first error since the last call to *err and lets the session compute again.
// Returns its code, LLAMA_FLASH_OK if there was none.
LLAMA_FLASH_API int32_t llama_flash_session_take_error(struct llama_flash_session * session, struct llama_flash_error * err);

LLAMA_FLASH_API int32_t llama_flash_session_stats(const struct llama_flash_session * session, struct llama_flash_stats * out);

LLAMA_FLASH_API int32_t llama_flash_get_context_memory(const struct llama_context * ctx, struct llama_flash_context_memory * out);

// Bytes of the host's memory through which the engine's loader may send weights to this process' devices, until the load is over; 0: there
// is no device that takes them in this way.
LLAMA_FLASH_API uint64_t llama_flash_load_staging(void);

// Gives the memory of the context's graph buffers back to the system, until the next graph needs it: what a prompt has touched, a token
// has no use for. Between two llama_decode or llama_encode, in the thread that calls them.
LLAMA_FLASH_API int32_t llama_flash_discard_compute(struct llama_context * ctx);

// what a device gives, by llama_flash_probe_reads
struct llama_flash_probe {
    uint64_t bytes;          // that arrived
    uint64_t reads;          // of a chunk each
    uint64_t ns;             // from the first submission to the last arrival
    uint64_t latency_ns;     // of a read, mean: from its submission to its arrival
    uint64_t latency_p99_ns; // 99 of 100 reads took no longer
    uint32_t in_flight;      // most reads under way at once
    uint32_t direct;         // 1: past the page cache; 0: the file system cannot
    uint32_t io_engine;      // enum llama_flash_io_engine: the one in use
    uint32_t reserved;
};

// Reads chunks at random offsets (multiples of their size) of the file with the I/O engine that decoding uses, params->io_depth of
// them in flight, until `duration_ms` have passed and all that was asked for has arrived. Takes 32 MiB of memory at most, or
// one chunk. chunk: bytes, a multiple of 4096, at most the file's size. params may be NULL (defaults); params->read_bytes is
// not used: each chunk is one read.
LLAMA_FLASH_API int32_t llama_flash_probe_reads(const char * path, uint32_t chunk, uint32_t duration_ms, const struct llama_flash_params * params,
                                                struct llama_flash_probe * out, struct llama_flash_error * err);

// How a graph uses a weight: bits of llama_flash_weight_use.uses
enum llama_flash_use {
    LLAMA_FLASH_USE_MUL_MAT    = 1,  // a matrix, first source of a MUL_MAT with float32
    LLAMA_FLASH_USE_MUL_MAT_ID = 2,  // matrices of experts, first source of a MUL_MAT_ID with float32
    LLAMA_FLASH_USE_GET_ROWS   = 4,  // a table whose rows are picked by number
    LLAMA_FLASH_USE_OTHER      = 8,  // anything else; views of it, too
    LLAMA_FLASH_USE_ROUTES     = 16, // what a MUL_MAT with it gives chooses the experts of a MUL_MAT_ID
    LLAMA_FLASH_USE_DEVICE     = 32, // no use: it lies in a device's own memory
    LLAMA_FLASH_USE_HOST       = 64, // no use: it lies in the host's; an embedding that is the output, too, may lie in both
};

// which of a model's graphs
enum llama_flash_graph {
    LLAMA_FLASH_GRAPH_TOKENS     = 0, // of llama_decode
    LLAMA_FLASH_GRAPH_ENCODER    = 1, // of llama_encode
    LLAMA_FLASH_GRAPH_EMBEDDINGS = 2, // of llama_decode, given embeddings (of an image, say) in place of tokens
};

struct llama_flash_weight_use {
    char     name[128];
    uint32_t uses;
    uint32_t router; // of experts: place in the array, from 1 on, of the weight that chooses them (ROUTES); 0: none is known
    uint32_t norm;   // the same of the norm that its input has passed
    uint32_t reserved;
};

// How the graph of a ubatch of n_tokens tokens uses the tensors that it is given: weights, caches and inputs, by their names.
// graph: enum llama_flash_graph. *n: how many there are, 0 if the model has no such graph; the first `capacity` are filled. Nothing is
// computed and no buffer is allocated, so ctx may be of a model without memory (no_alloc).
LLAMA_FLASH_API int32_t llama_flash_graph_uses(struct llama_context * ctx, uint32_t n_tokens, uint32_t graph, struct llama_flash_weight_use * out,
                                               uint64_t capacity, uint64_t * n, struct llama_flash_error * err);

// Before the model is loaded: rows of the tensor of this name are picked by number (GET_ROWS), and read one by one. only: nothing
// else is done with it, so that it has no panels.
LLAMA_FLASH_API int32_t llama_flash_session_add_rows(struct llama_flash_session * session, const char * name, bool only, struct llama_flash_error * err);

// Before the model is loaded: the router that chooses the experts of the tensor of this name, where ops cannot read it because it lies
// on a device. weight: [n_expert] rows of n_embd; norm: [n_embd], weights of the norm that its input has passed, or NULL. Copied.
LLAMA_FLASH_API int32_t llama_flash_session_add_router(struct llama_flash_session * session, const char * experts, const float * weight, const float * norm,
                                                       uint32_t n_embd, uint32_t n_expert, struct llama_flash_error * err);

// Binds a weight to the bytes at `offset` of a file without a model: between session_new (add_bundle) and bind_end, so that
// requirements can be asked before anything is loaded. Such a session cannot compute. type: enum ggml_type; ne: as ggml's.
LLAMA_FLASH_API int32_t llama_flash_session_bind_weight(struct llama_flash_session * session, const char * name, const char * path, uint64_t offset,
                                                        int32_t type, int64_t ne0, int64_t ne1, int64_t ne2, struct llama_flash_error * err);

// Prompts that were computed before, in blocks of tokens (docs/explanation/prompts.md). These calls take a context and no session, and
// belong to the thread that computes with it, or to one that knows that nobody does.

// What the state of a sequence consists of.
struct llama_flash_prompt_kind {
    uint32_t supported;    // 0: it cannot be divided
    uint32_t has_cells;    // cells of all positions
    uint32_t window;       // cells of so many positions before the next one; 0: none
    uint32_t has_state;    // what has no cells (recurrent): llama_state_seq_get_data_ext, partial
    uint64_t cell_bytes;   // of one token; known when the sequence holds one
    uint64_t window_bytes; // of one token of the window; the same
};

LLAMA_FLASH_API int32_t llama_flash_prompt_kind_of(struct llama_context * ctx, int32_t seq, struct llama_flash_prompt_kind * out, struct llama_flash_error * err);

// Memory of K or V of one layer, of all sequences.
struct llama_flash_area {
    uint64_t address;
    uint64_t size;    // bytes
    uint32_t at_once; // a sequence's first token touches all of its part, if that has no more cells than a page has elements
    uint32_t reserved;
};

// All memory that the context keeps for sequences, valid as long as the context: the first n areas, and how many there are. Fails with
// LLAMA_FLASH_E_INVALID where some of it is of another kind (recurrent), or not the host's.
LLAMA_FLASH_API int32_t llama_flash_kv_areas(const struct llama_context * ctx, struct llama_flash_area * areas, uint32_t n, uint32_t * n_areas, struct llama_flash_error * err);

// Bytes of these areas that are in memory: pages that nobody has touched are not. Areas may be gone. May be called by any thread.
LLAMA_FLASH_API uint64_t llama_flash_touched(const struct llama_flash_area * areas, uint32_t n);

// Copies `size` bytes at `offset` of the state of positions [p0, p1) of the sequence to `to`, in the order of files. window: of its
// window. *total: bytes of all of it. *sum: of the checksum, where offset is a multiple of 64 KiB and `size` is one, or ends the state.
// LLAMA_FLASH_E_INVALID: not all of the positions are in memory.
LLAMA_FLASH_API int32_t llama_flash_prompt_take(struct llama_context * ctx, int32_t seq, bool window, int32_t p0, int32_t p1, uint64_t offset, uint64_t size,
                                                uint8_t * to, uint64_t * total, uint32_t * sum, struct llama_flash_error * err);

// size of the head of a block's file; what follows has whole sectors of 4096 bytes
#define LLAMA_FLASH_PROMPT_HEAD 4096

struct llama_flash_prompt_block {
    int32_t         fd;
    uint32_t        reserved;
    const uint8_t * head; // what the file must begin with: LLAMA_FLASH_PROMPT_HEAD bytes, of which the last 16 are not looked at
};

// Reads n blocks of block_tokens tokens from their files into the sequence, from position p0 on; what it had from there is removed before.
// tokens: of positions p0 on. *n_good: how many of the first ones are whole and right; the sequence has these, and no more.
// LLAMA_FLASH_E_MEMORY: there is no room. The last 16 bytes of a head: bytes of the body, 64 bits; two checksums, of the body and
// of the head before its own, 32 bits each.
LLAMA_FLASH_API int32_t llama_flash_prompt_restore(struct llama_context * ctx, int32_t seq, bool window, int32_t p0, const int32_t * tokens, uint32_t block_tokens,
                                                   const struct llama_flash_prompt_block * blocks, uint32_t n, const struct llama_flash_params * params,
                                                   uint32_t * n_good, struct llama_flash_error * err);

// Copies positions [p0, p1) and the window before p1 from one sequence to another, which has the same tokens before p0. tokens: of
// positions 0 on. LLAMA_FLASH_E_INVALID: not all of it is there, or it has parts without cells; LLAMA_FLASH_E_MEMORY: no room.
LLAMA_FLASH_API int32_t llama_flash_prompt_copy(struct llama_context * ctx, int32_t from, int32_t to, int32_t p0, int32_t p1, const int32_t * tokens,
                                                struct llama_flash_error * err);

// CRC32C by pieces, as heads of files have it: never 0.
LLAMA_FLASH_API uint32_t llama_flash_checksum(const uint8_t * data, uint64_t size);

// A model divided among hosts (docs/explanation/workers.md). Sockets are connected, and closed by these calls.

// The client, before the load: the worker's connection for data. *device: its ggml_backend_dev_t, for llama_model_params.devices. endpoint:
// names the worker; a connection takes the place of the one before with the same name. LLAMA_FLASH_E_READ: the worker did not answer.
LLAMA_FLASH_API int32_t llama_flash_remote_connect(const char * endpoint, int32_t fd, void ** device, struct llama_flash_error * err);

// Waits until the worker has done all that it was sent. false: the connection is lost, and what was computed since is void.
LLAMA_FLASH_API bool llama_flash_remote_settle(const char * endpoint);

// Around the load, on its thread: weights of workers are named to them, not sent. files: the shards, in order. bind_end:
// LLAMA_FLASH_E_FORMAT: a worker does not have one of them; its name is in err->tensor.
LLAMA_FLASH_API int32_t llama_flash_remote_bind_begin(const char * const * files, uint32_t n, struct llama_flash_error * err);
LLAMA_FLASH_API int32_t llama_flash_remote_bind_end(struct llama_flash_error * err);

// opaque: a worker's side of one client
struct llama_flash_worker;

// how a worker has a weight
enum llama_flash_home {
    LLAMA_FLASH_HOME_PLAIN  = 0, // in memory, as in the file
    LLAMA_FLASH_HOME_MATRIX = 1, // in memory, in the layout of the stock kernel of products
    LLAMA_FLASH_HOME_FLASH  = 2, // in the file
};

struct llama_flash_worker_memory {
    uint64_t resident; // bytes of weights in memory
    uint64_t buffers;  // of KV cache, graph buffers, activations
};

// session: new, without a model; the worker holds a reference. files: the shards. limit: bytes of memory for buffers, and for a message;
// weights: bytes of all weights. NULL: *err says why.
LLAMA_FLASH_API struct llama_flash_worker * llama_flash_worker_new(struct llama_flash_session * session, const char * const * files, uint32_t n_files,
                                                                   uint32_t n_threads, uint64_t limit, uint64_t weights, struct llama_flash_error * err);
LLAMA_FLASH_API void                        llama_flash_worker_free(struct llama_flash_worker * worker);

// Before serve: a weight of the file. type: enum ggml_type; ne: 4 numbers of elements; home: enum llama_flash_home.
LLAMA_FLASH_API int32_t llama_flash_worker_add_weight(struct llama_flash_worker * worker, const char * name, uint32_t type, const int64_t * ne, uint32_t file,
                                                      uint64_t offset, uint32_t home, struct llama_flash_error * err);

// Before serve: whom to tell, on its thread, that the client is about to touch more of its buffers than was expected, or one that it has
// asked for since the session has its memory.
LLAMA_FLASH_API int32_t llama_flash_worker_on_many(struct llama_flash_worker * worker, void (*many)(void * data), void * data, struct llama_flash_error * err);

// The client says that it computes few tokens at once: until this is called again, so many bytes of its buffers are touched at most.
// UINT64_MAX: as many as there are. Before more is touched, `many` is called, once.
LLAMA_FLASH_API int32_t llama_flash_worker_expect(struct llama_flash_worker * worker, uint64_t bytes, struct llama_flash_error * err);

// Serves one connection; returns when the client has left or sent what is refused. Once per worker. After the client's load:
// llama_flash_session_bind_end and set_memory of the session, from another thread.
LLAMA_FLASH_API int32_t llama_flash_worker_serve(struct llama_flash_worker * worker, int32_t fd, struct llama_flash_error * err);

// Moves why something was refused to *err; LLAMA_FLASH_OK: nothing was. Errors of reads are the session's (take_error).
LLAMA_FLASH_API int32_t llama_flash_worker_take_refusal(struct llama_flash_worker * worker, struct llama_flash_error * err);

LLAMA_FLASH_API int32_t llama_flash_worker_get_memory(const struct llama_flash_worker * worker, struct llama_flash_worker_memory * out);

// llama_model_load_from_file and llama_init_from_model of the engine, with or without flash tensors: where the engine would end the
// process with an assert, they return NULL. reason: gets the lines of the engine's log that say why they failed, the last of `size`
// bytes, "" if they did not; may be NULL. What the engine logs goes to its log callback, too.
LLAMA_FLASH_API struct llama_model *   llama_flash_load_model(const char * path, const struct llama_model_params * params, char * reason, size_t size);
LLAMA_FLASH_API struct llama_context * llama_flash_new_context(struct llama_model * model, const struct llama_context_params * params, char * reason,
                                                               size_t size);

#ifdef __cplusplus
}
#endif
