"""The plugin's C interface: structures, enums and prototypes of libllama_flash.

Generated from plugin/include/llama_flash.h by ci/tools/generate_bindings.py (`make bindings`): do not edit. The header
says what the functions do, in which order and from which thread they are called. Opaque structures are addresses (int).
"""

from __future__ import annotations

import ctypes
import functools
import os
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

LLAMA_FLASH_API_VERSION = 10
LLAMA_FLASH_REUSE_TOKENS = 256
LLAMA_FLASH_PROMPT_HEAD = 4096


class llama_flash_code(IntEnum):
    LLAMA_FLASH_OK = 0
    LLAMA_FLASH_E_INVALID = 1  # an argument or a call out of order
    LLAMA_FLASH_E_MEMORY = 2  # the memory given is too small, or the kernel refused it
    LLAMA_FLASH_E_READ = 3  # a read failed, came up short, or the file changed since it was loaded
    LLAMA_FLASH_E_FORMAT = 4  # the file contradicts itself
    LLAMA_FLASH_E_INTERNAL = 5


class llama_flash_io_engine(IntEnum):
    LLAMA_FLASH_IO_AUTO = 0  # io_uring where built in and allowed, else the pread pool
    LLAMA_FLASH_IO_URING = 1
    LLAMA_FLASH_IO_PREAD = 2


class llama_flash_activation(IntEnum):
    LLAMA_FLASH_RELU = 0  # gated: relu(gate) * up
    LLAMA_FLASH_RELU2 = 1
    LLAMA_FLASH_FATRELU = 2
    LLAMA_FLASH_DRELU = 3


class llama_flash_neuron_mode(IntEnum):
    LLAMA_FLASH_NEURONS_LOWRANK = 0  # by the predictors; layers without one as in OFF
    LLAMA_FLASH_NEURONS_EXACT = 1  # gate (without gate: up) resident and computed in full
    LLAMA_FLASH_NEURONS_OFF = 2  # not at all: whole layers are read; of experts those that are used


class llama_flash_kind(IntEnum):
    LLAMA_FLASH_EXPERTS = 0
    LLAMA_FLASH_PANELS = 1
    LLAMA_FLASH_NEURONS = 2


class llama_flash_place(IntEnum):
    LLAMA_FLASH_IN_FILE = 0  # and nowhere else
    LLAMA_FLASH_COMING = 1  # a read is under way
    LLAMA_FLASH_PASSING = 2  # in the ring
    LLAMA_FLASH_IN_SLOT = 3
    LLAMA_FLASH_PINNED = 4


class llama_flash_use(IntEnum):
    LLAMA_FLASH_USE_MUL_MAT = 1  # a matrix, first source of a MUL_MAT with float32
    LLAMA_FLASH_USE_MUL_MAT_ID = 2  # matrices of experts, first source of a MUL_MAT_ID with float32
    LLAMA_FLASH_USE_GET_ROWS = 4  # a table whose rows are picked by number
    LLAMA_FLASH_USE_OTHER = 8  # anything else; views of it, too
    LLAMA_FLASH_USE_ROUTES = 16  # what a MUL_MAT with it gives chooses the experts of a MUL_MAT_ID
    LLAMA_FLASH_USE_DEVICE = 32  # no use: it lies in a device's own memory
    LLAMA_FLASH_USE_HOST = 64  # no use: it lies in the host's; an embedding that is the output, too, may lie in both


class llama_flash_graph(IntEnum):
    LLAMA_FLASH_GRAPH_TOKENS = 0  # of llama_decode
    LLAMA_FLASH_GRAPH_ENCODER = 1  # of llama_encode
    LLAMA_FLASH_GRAPH_EMBEDDINGS = 2  # of llama_decode, given embeddings (of an image, say) in place of tokens


class llama_flash_home(IntEnum):
    LLAMA_FLASH_HOME_PLAIN = 0  # in memory, as in the file
    LLAMA_FLASH_HOME_MATRIX = 1  # in memory, in the layout of the stock kernel of products
    LLAMA_FLASH_HOME_FLASH = 2  # in the file


class llama_flash_params(ctypes.Structure):
    _fields_: ClassVar = [
        ("io_engine", ctypes.c_uint32),
        ("io_depth", ctypes.c_uint32),
        ("io_threads", ctypes.c_uint32),
        ("read_bytes", ctypes.c_uint32),
        ("panel_bytes", ctypes.c_uint32),
        ("lookahead", ctypes.c_uint32),
        ("tries_ahead", ctypes.c_uint32),
        ("few_tokens", ctypes.c_uint32),
    ]

    io_engine: int  # enum llama_flash_io_engine
    io_depth: int  # most reads in flight at once; 0: 32
    io_threads: int  # threads of the pread pool; 0: 8
    read_bytes: int  # a record is read in pieces of at most this many bytes; 0: 1 MiB
    panel_bytes: int  # a panel is a run of rows of about this many bytes; 0: 4 MiB
    lookahead: int  # experts of the next layer that are read ahead of its router, most; 0: none
    tries_ahead: int  # 1: one more, fewer or none where that makes tokens faster, which is tried out; 0: always as many
    few_tokens: int  # an op of up to so many tokens generates, and may evict experts; a longer one is a prompt; 0: 16


class llama_flash_bundle_part(ctypes.Structure):
    _fields_: ClassVar = [
        ("type", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
    ]

    type: int  # enum ggml_type; -1: the bundle has no such part
    reserved: int
    offset: int  # of the part in a record, bytes


class llama_flash_bundle(ctypes.Structure):
    """One layer's neuron bundles (docs/reference/format.md), dense or of experts. What it points to is copied."""

    _fields_: ClassVar = [
        ("layer", ctypes.c_int32),
        ("n_ff", ctypes.c_uint32),
        ("n_embd", ctypes.c_uint32),
        ("activation", ctypes.c_uint32),
        ("threshold", ctypes.c_float),
        ("split", ctypes.c_uint32),
        ("n_expert", ctypes.c_uint32),
        ("n_expert_used", ctypes.c_uint32),
        ("record_bytes", ctypes.c_uint64),
        ("gate", llama_flash_bundle_part),
        ("up", llama_flash_bundle_part),
        ("down", llama_flash_bundle_part),
        ("up_bias", ctypes.POINTER(ctypes.c_float)),
        ("gate_bias", ctypes.POINTER(ctypes.c_float)),
        ("predictor_rank", ctypes.c_uint32),
        ("predictor_in_type", ctypes.c_int32),
        ("predictor_out_type", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
        ("predictor_in", ctypes.c_void_p),
        ("predictor_out", ctypes.c_void_p),
        ("predictor_bias", ctypes.POINTER(ctypes.c_float)),
    ]

    layer: int  # N of blk.N.ffn_bundle.weight or blk.N.ffn_bundle_exps.weight
    n_ff: int  # neurons, of one expert
    n_embd: int  # elements of a part
    activation: int  # enum llama_flash_activation
    threshold: float  # of FATRELU
    split: int  # layout: 0 bundled, 1 split
    n_expert: int  # 0: a dense block; experts have neither biases nor a predictor, and are not split
    n_expert_used: int  # most experts of a token
    record_bytes: int
    gate: llama_flash_bundle_part
    up: llama_flash_bundle_part
    down: llama_flash_bundle_part
    up_bias: Any  # [n_ff] or NULL
    gate_bias: Any  # [n_ff] or NULL
    predictor_rank: int  # 0: no predictor
    predictor_in_type: int  # enum ggml_type
    predictor_out_type: int
    reserved: int
    predictor_in: int  # [rank] rows of n_embd
    predictor_out: int  # [n_ff] rows of rank
    predictor_bias: Any  # [n_ff]


class llama_flash_neuron_params(ctypes.Structure):
    _fields_: ClassVar = [
        ("mode", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("merge_gap", ctypes.c_uint32),
        ("lookahead", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]

    mode: int  # enum llama_flash_neuron_mode
    window: int  # previous tokens whose neurons stay; UINT32_MAX: as many as have room
    n_ubatch: int  # most tokens computed at once
    merge_gap: int  # bytes not wanted that a read may cover to reach the next neuron
    lookahead: int  # 1: read ahead what the next layer's predictor expects (LOWRANK)
    reserved: int


class llama_flash_error(ctypes.Structure):
    _fields_: ClassVar = [
        ("code", ctypes.c_int32),
        ("sys_errno", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("file", ctypes.c_char * 512),
        ("tensor", ctypes.c_char * 128),
        ("message", ctypes.c_char * 512),
    ]

    code: int  # enum llama_flash_code
    sys_errno: int  # errno of the failed call, 0 if none
    offset: int  # byte offset in the file
    size: int  # bytes asked for
    file: bytes
    tensor: bytes
    message: bytes  # one line: what happened, where, what to do


class llama_flash_requirements(ctypes.Structure):
    """What the bound tensors need, known after bind_end."""

    _fields_: ClassVar = [
        ("n_expert_tensors", ctypes.c_uint32),
        ("n_panel_tensors", ctypes.c_uint32),
        ("expert_bytes", ctypes.c_uint64),
        ("panel_bytes", ctypes.c_uint64),
        ("n_experts", ctypes.c_uint64),
        ("n_panels", ctypes.c_uint64),
        ("largest_record", ctypes.c_uint64),
        ("n_bundles", ctypes.c_uint64),
        ("n_neurons", ctypes.c_uint64),
        ("neuron_bytes", ctypes.c_uint64),
        ("neuron_resident", ctypes.c_uint64),
        ("neuron_record", ctypes.c_uint64),
        ("min_memory", ctypes.c_uint64),
        ("max_memory", ctypes.c_uint64),
    ]

    n_expert_tensors: int
    n_panel_tensors: int
    expert_bytes: int  # all experts of all layers
    panel_bytes: int  # all panels
    n_experts: int  # expert records (one expert's slice of one tensor)
    n_panels: int  # panel records (a run of rows of one matrix)
    largest_record: int  # bytes of the largest record
    n_bundles: int  # layers with neuron bundles
    n_neurons: int
    neuron_bytes: int  # all of their records
    neuron_resident: int  # bytes that the mode keeps resident (EXACT)
    neuron_record: int  # bytes of the largest record's part that stays on flash
    min_memory: int  # smallest value set_memory takes
    max_memory: int  # from here on every record has its own slot


class llama_flash_memory(ctypes.Structure):
    """How memory is divided."""

    _fields_: ClassVar = [
        ("total", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("pinned", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("bookkeeping", ctypes.c_uint64),
        ("resident", ctypes.c_uint64),
        ("n_slots", ctypes.c_uint64),
        ("n_pinned", ctypes.c_uint64),
        ("n_neuron_slots", ctypes.c_uint64),
        ("n_neurons_pinned", ctypes.c_uint64),
    ]

    total: int  # as given
    slots: int  # cache of experts and neurons
    pinned: int  # panels that never leave
    stream: int  # ring through which panels and prompts stream
    bookkeeping: int  # tables, request pool, the neurons' work space
    resident: int  # gate or up matrices that EXACT keeps
    n_slots: int  # of experts
    n_pinned: int  # panels
    n_neuron_slots: int
    n_neurons_pinned: int


class llama_flash_resize(ctypes.Structure):
    """How far llama_flash_session_resize has come."""

    _fields_: ClassVar = [
        ("total", ctypes.c_uint64),
        ("least", ctypes.c_uint64),
        ("done", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]

    total: int  # bytes that it leads to: as asked for, but no less than `least` and no more than all records need
    least: int  # bytes that rings, tables, work space and resident parts use: they do not change while the model runs
    done: int  # 0: call again
    reserved: int


class llama_flash_stats(ctypes.Structure):
    _fields_: ClassVar = [
        ("bytes_read", ctypes.c_uint64),
        ("bytes_used", ctypes.c_uint64),
        ("reads", ctypes.c_uint64),
        ("hits", ctypes.c_uint64),
        ("misses", ctypes.c_uint64),
        ("panel_hits", ctypes.c_uint64),
        ("panel_reads", ctypes.c_uint64),
        ("rows_read", ctypes.c_uint64),
        ("evictions", ctypes.c_uint64),
        ("wait_ns", ctypes.c_uint64),
        ("repack_ns", ctypes.c_uint64),
        ("op_ns", ctypes.c_uint64),
        ("ops", ctypes.c_uint64),
        ("neurons_active", ctypes.c_uint64),
        ("neurons_newly_active", ctypes.c_uint64),
        ("neurons_expected", ctypes.c_uint64),
        ("experts_expected", ctypes.c_uint64),
        ("experts_foreseen", ctypes.c_uint64),
        ("layers_repeated", ctypes.c_uint64),
        ("predict_ns", ctypes.c_uint64),
        ("manage_ns", ctypes.c_uint64),
        ("retries", ctypes.c_uint64),
        ("errors", ctypes.c_uint64),
        ("resident_bytes", ctypes.c_uint64),
        ("slots_used", ctypes.c_uint64),
        ("neuron_slots_used", ctypes.c_uint64),
        ("io_engine", ctypes.c_uint32),
        ("reads_ahead", ctypes.c_uint32),
    ]

    bytes_read: int  # from flash, as asked of the device (whole sectors)
    bytes_used: int  # of these, bytes of records
    reads: int  # read requests completed
    hits: int  # experts and neurons found in slots
    misses: int  # experts and neurons that had to be read
    panel_hits: int  # pinned panels used
    panel_reads: int  # panels streamed
    rows_read: int  # rows of embedding tables
    evictions: int
    wait_ns: int  # compute threads idle for a read
    repack_ns: int  # bringing records into the kernels' layout
    op_ns: int  # inside flash ops, all of the above included
    ops: int  # flash ops computed
    neurons_active: int  # sum over tokens and layers of what was computed
    neurons_newly_active: int  # of these, not active for any of the 5 tokens before
    neurons_expected: int  # read ahead
    experts_expected: int  # records read ahead of a router
    experts_foreseen: int  # of these, those that the router then chose while they were there
    layers_repeated: int  # passes made again because the graph's activations were not the expected ones
    predict_ns: int  # finding active sets
    manage_ns: int  # memory management: slots, copies into them
    retries: int  # short reads and EINTR that were continued
    errors: int
    resident_bytes: int  # slots, pins and ring touched so far
    slots_used: int  # of experts
    neuron_slots_used: int
    io_engine: int  # the I/O engine in use
    reads_ahead: int  # experts of the next layer that are read ahead, most; 0: none are, or tokens are faster without


class llama_flash_tensor(ctypes.Structure):
    """Records of one tensor, or of one layer's bundle, numbered as llama_flash_session_residency has them."""

    _fields_: ClassVar = [
        ("name", ctypes.c_char * 128),
        ("layer", ctypes.c_int32),
        ("kind", ctypes.c_uint32),
        ("first_record", ctypes.c_uint64),
        ("n_records", ctypes.c_uint64),
        ("record_bytes", ctypes.c_uint64),
    ]

    name: bytes
    layer: int  # N of blk.N., -1: of no layer
    kind: int  # enum llama_flash_kind
    first_record: int
    n_records: int
    record_bytes: int  # of the largest


class llama_flash_context_memory(ctypes.Structure):
    """Buffers in the host's memory, pinned or not, of a context and its model, flash tensors excluded."""

    _fields_: ClassVar = [
        ("model", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("compute", ctypes.c_uint64),
    ]

    model: int  # resident weights
    context: int  # KV cache and recurrent state
    compute: int  # graph buffers


class llama_flash_trace_entry(ctypes.Structure):
    """One record that an op asked of the cache, hit or miss.."""

    _fields_: ClassVar = [
        ("token", ctypes.c_uint64),
        ("tensor", ctypes.c_uint32),
        ("record", ctypes.c_uint32),
        ("n_tokens", ctypes.c_uint32),
        ("uses", ctypes.c_uint32),
    ]

    token: int  # the cache's clock: number of the op's last token since set_memory
    tensor: int  # as llama_flash_session_trace_tensor numbers them
    record: int  # of the tensor: an expert, or a neuron of the layer's bundle
    n_tokens: int  # of the op; more than the few that generate: a prompt, which evicts nothing
    uses: int  # of these tokens, how many use the expert; of a neuron 1


class llama_flash_trace_tensor(ctypes.Structure):
    """A tensor whose records are cached: all experts' slices of one matrix, or a layer's neuron bundles."""

    _fields_: ClassVar = [
        ("name", ctypes.c_char * 128),
        ("n_records", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
        ("size_class", ctypes.c_uint32),
        ("neurons", ctypes.c_uint32),
        ("record_bytes", ctypes.c_uint64),
        ("n_slots", ctypes.c_uint64),
        ("n_pinned", ctypes.c_uint64),
    ]

    name: bytes
    n_records: int  # 0: a tensor of panels, which never occurs in traces
    group: int  # tensors of a layer that share their experts have the same
    size_class: int  # records of one class share its slots
    neurons: int  # 1: neuron bundles, whose slots are apart from the experts'
    record_bytes: int  # of a slot
    n_slots: int  # of the class, now
    n_pinned: int  # records that are not in slots but always there (neurons)


class llama_flash_probe(ctypes.Structure):
    """What a device gives, by llama_flash_probe_reads."""

    _fields_: ClassVar = [
        ("bytes", ctypes.c_uint64),
        ("reads", ctypes.c_uint64),
        ("ns", ctypes.c_uint64),
        ("latency_ns", ctypes.c_uint64),
        ("latency_p99_ns", ctypes.c_uint64),
        ("in_flight", ctypes.c_uint32),
        ("direct", ctypes.c_uint32),
        ("io_engine", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]

    bytes: int  # that arrived
    reads: int  # of a chunk each
    ns: int  # from the first submission to the last arrival
    latency_ns: int  # of a read, mean: from its submission to its arrival
    latency_p99_ns: int  # 99 of 100 reads took no longer
    in_flight: int  # most reads under way at once
    direct: int  # 1: past the page cache; 0: the file system cannot
    io_engine: int  # enum llama_flash_io_engine: the one in use
    reserved: int


class llama_flash_weight_use(ctypes.Structure):
    _fields_: ClassVar = [
        ("name", ctypes.c_char * 128),
        ("uses", ctypes.c_uint32),
        ("router", ctypes.c_uint32),
        ("norm", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]

    name: bytes
    uses: int
    router: int  # of experts: place in the array, from 1 on, of the weight that chooses them (ROUTES); 0: none is known
    norm: int  # the same of the norm that its input has passed
    reserved: int


class llama_flash_prompt_kind(ctypes.Structure):
    """What the state of a sequence consists of.."""

    _fields_: ClassVar = [
        ("supported", ctypes.c_uint32),
        ("has_cells", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("has_state", ctypes.c_uint32),
        ("cell_bytes", ctypes.c_uint64),
        ("window_bytes", ctypes.c_uint64),
    ]

    supported: int  # 0: it cannot be divided
    has_cells: int  # cells of all positions
    window: int  # cells of so many positions before the next one; 0: none
    has_state: int  # what has no cells (recurrent): llama_state_seq_get_data_ext, partial
    cell_bytes: int  # of one token; known when the sequence holds one
    window_bytes: int  # of one token of the window; the same


class llama_flash_area(ctypes.Structure):
    """Memory of K or V of one layer, of all sequences.."""

    _fields_: ClassVar = [
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("at_once", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]

    address: int
    size: int  # bytes
    at_once: int  # a sequence's first token touches all of its part, if that has no more cells than a page has elements
    reserved: int


class llama_flash_prompt_block(ctypes.Structure):
    _fields_: ClassVar = [
        ("fd", ctypes.c_int32),
        ("reserved", ctypes.c_uint32),
        ("head", ctypes.POINTER(ctypes.c_uint8)),
    ]

    fd: int
    reserved: int
    head: Any  # what the file must begin with: LLAMA_FLASH_PROMPT_HEAD bytes, of which the last 16 are not looked at


class llama_flash_worker_memory(ctypes.Structure):
    _fields_: ClassVar = [
        ("resident", ctypes.c_uint64),
        ("buffers", ctypes.c_uint64),
    ]

    resident: int  # bytes of weights in memory
    buffers: int  # of KV cache, graph buffers, activations


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    llama_flash_params,
    llama_flash_bundle_part,
    llama_flash_bundle,
    llama_flash_neuron_params,
    llama_flash_error,
    llama_flash_requirements,
    llama_flash_memory,
    llama_flash_resize,
    llama_flash_stats,
    llama_flash_tensor,
    llama_flash_context_memory,
    llama_flash_trace_entry,
    llama_flash_trace_tensor,
    llama_flash_probe,
    llama_flash_weight_use,
    llama_flash_prompt_kind,
    llama_flash_area,
    llama_flash_prompt_block,
    llama_flash_worker_memory,
)

# name: (result, arguments)
_PROTOTYPES: dict[str, tuple[type | None, list[type]]] = {
    "llama_flash_api_version": (ctypes.c_uint32, []),
    "llama_flash_build_info": (ctypes.c_char_p, []),
    "llama_flash_register": (ctypes.c_int32, []),
    "llama_flash_buffer_type": (ctypes.c_void_p, []),
    "llama_flash_session_new": (
        ctypes.c_void_p,
        [
            ctypes.POINTER(llama_flash_params),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_free": (None, [ctypes.c_void_p]),
    "llama_flash_session_bind_begin": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_error)]),
    "llama_flash_session_bind_end": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_error)]),
    "llama_flash_session_add_bundle": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(llama_flash_bundle),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_set_neurons": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(llama_flash_neuron_params),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_requirements": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_requirements)]),
    "llama_flash_session_divide": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.POINTER(llama_flash_memory),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_set_memory": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_resize": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.c_bool,
            ctypes.POINTER(llama_flash_resize),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_few_tokens": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_bool,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_memory": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_memory)]),
    "llama_flash_session_hot": (ctypes.c_uint64, [ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint64]),
    "llama_flash_session_warm": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.c_uint64,
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_trace": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_trace_take": (
        ctypes.c_uint64,
        [
            ctypes.c_void_p,
            ctypes.POINTER(llama_flash_trace_entry),
            ctypes.c_uint64,
            ctypes.POINTER(ctypes.c_uint64),
        ],
    ),
    "llama_flash_session_trace_tensor": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_trace_tensor),
        ],
    ),
    "llama_flash_session_tensors": (
        ctypes.c_uint64,
        [
            ctypes.c_void_p,
            ctypes.POINTER(llama_flash_tensor),
            ctypes.c_uint64,
        ],
    ),
    "llama_flash_session_residency": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_uint8),
            ctypes.POINTER(ctypes.c_uint32),
            ctypes.c_uint64,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_reuse": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_abort": (ctypes.c_bool, [ctypes.c_void_p]),
    "llama_flash_session_waiting": (ctypes.c_uint64, [ctypes.c_void_p, ctypes.POINTER(llama_flash_error)]),
    "llama_flash_session_take_error": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_error)]),
    "llama_flash_session_stats": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_stats)]),
    "llama_flash_get_context_memory": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_context_memory)]),
    "llama_flash_load_staging": (ctypes.c_uint64, []),
    "llama_flash_discard_compute": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_flash_probe_reads": (
        ctypes.c_int32,
        [
            ctypes.c_char_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_params),
            ctypes.POINTER(llama_flash_probe),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_graph_uses": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_weight_use),
            ctypes.c_uint64,
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_add_rows": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_bool,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_add_router": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_float),
            ctypes.POINTER(ctypes.c_float),
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_session_bind_weight": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_uint64,
            ctypes.c_int32,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_prompt_kind_of": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.POINTER(llama_flash_prompt_kind),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_kv_areas": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(llama_flash_area),
            ctypes.c_uint32,
            ctypes.POINTER(ctypes.c_uint32),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_touched": (ctypes.c_uint64, [ctypes.POINTER(llama_flash_area), ctypes.c_uint32]),
    "llama_flash_prompt_take": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.POINTER(ctypes.c_uint8),
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.POINTER(ctypes.c_uint32),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_prompt_restore": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_prompt_block),
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_params),
            ctypes.POINTER(ctypes.c_uint32),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_prompt_copy": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_checksum": (ctypes.c_uint32, [ctypes.POINTER(ctypes.c_uint8), ctypes.c_uint64]),
    "llama_flash_remote_connect": (
        ctypes.c_int32,
        [
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_remote_settle": (ctypes.c_bool, [ctypes.c_char_p]),
    "llama_flash_remote_bind_begin": (
        ctypes.c_int32,
        [
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_remote_bind_end": (ctypes.c_int32, [ctypes.POINTER(llama_flash_error)]),
    "llama_flash_worker_new": (
        ctypes.c_void_p,
        [
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_worker_free": (None, [ctypes.c_void_p]),
    "llama_flash_worker_add_weight": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_uint32,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_uint32,
            ctypes.c_uint64,
            ctypes.c_uint32,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_worker_on_many": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_worker_expect": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.c_uint64,
            ctypes.POINTER(llama_flash_error),
        ],
    ),
    "llama_flash_worker_serve": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(llama_flash_error)]),
    "llama_flash_worker_take_refusal": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_error)]),
    "llama_flash_worker_get_memory": (ctypes.c_int32, [ctypes.c_void_p, ctypes.POINTER(llama_flash_worker_memory)]),
    "llama_flash_load_model": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
    "llama_flash_new_context": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
}


def library_path() -> Path:
    """Where libllama_flash is: beside libllama, which LLAMA_CPP_LIB_PATH may place elsewhere."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override is not None:
        return Path(override) / "libllama_flash.so"
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib" / "libllama_flash.so"


@functools.cache
def load() -> ctypes.CDLL:
    """The plugin with its prototypes set. Raises OSError if it is missing or was built from another header."""
    import llama_cpp  # noqa: F401  # its libllama is the one that the plugin is to find in the process

    path = library_path()
    lib = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = argtypes
    version = int(lib.llama_flash_api_version())
    if version != LLAMA_FLASH_API_VERSION:
        raise OSError(f"{path} has interface version {version}, llama_flash needs {LLAMA_FLASH_API_VERSION}")
    return lib
