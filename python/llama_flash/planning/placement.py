"""Which weights stay on flash, decided before the model is loaded.

Sizes of weights are exact (they are in the GGUF file); KV cache and graph buffers are estimated here, and measured once
the context exists (session.py). Says nothing about slots: how memory is split is the plugin's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ..budget.rooms import Breakdown, Budget, refuse
from ..errors import FlashFormatError
from ..model.bundles import Bundles, read_bundles
from ..model.gguf import GgufMeta, TensorInfo
from ..model.graphs import Graphs, Use, graphs_of
from ..model.mtp import drafting_head
from ..model.shape import ContextShape
from ..native.params import Mode, Requirements
from ..options import FlashOffload, Predictor
from ..sizes import parse_size
from .advice import advice_for
from .on_devices import at_devices
from .placed import Plan

__all__ = [
    "Kind",
    "choose_predictor",
    "estimate",
    "expert_bytes",
    "kind_of",
    "kinds_of",
    "least_for_neurons",
    "make_plan",
    "select",
    "work_bytes",
]

# Kinds of weights in the order in which they go to flash: of tables a token needs a row; experts cost the fewest bytes
# per token for the memory they free, then dense feed-forward weights, then every other matrix.
Kind = Literal["rows", "experts", "ffn", "all"]
_TIERS: tuple[tuple[Kind, ...], ...] = (
    ("rows", "experts"),
    ("rows", "experts", "ffn"),
    ("rows", "experts", "ffn", "all"),
)
_ASKED: dict[str, tuple[Kind, ...]] = {"experts": ("experts",), "ffn": ("experts", "ffn"), "all": _TIERS[-1]}
_FEED_FORWARD = re.compile(r"ffn_|channel_mix_")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_(exps|chexps)\.weight")
_LAYER_SHARE = 0.2  # of a layer's neurons: with fewer slots, active neurons would be read twice for a token
_EXACT_SHARE = 0.10  # of the neurons: with room for fewer beside what exact keeps resident, lowrank is better
_ROWS = 1 << 20  # bytes to read rows of tables to
_SMALLEST = 64 << 10  # bytes of a weight that is worth a read

_PLAIN_TYPES = (0, 1, 30)  # enum ggml_type of F32, F16, BF16: computed on as they are in the file
_LOAD_PIECES = 16 << 20  # bytes of the buffer through which weights are read, and of the heap that it leaves behind

# bytes per element of a KV cache, by enum ggml_type
_KV_BYTES = {0: 4.0, 1: 2.0, 2: 18 / 32, 3: 20 / 32, 6: 22 / 32, 7: 24 / 32, 8: 34 / 32, 20: 18 / 32, 30: 2.0}
_HEAP_PER_TOKEN = 300  # bytes of the engine's heap per vocabulary entry: strings, maps, merges
_ENGINE_HEAP = 16 << 20  # graphs, thread pool, tensor tables


def kind_of(name: str, use: Use) -> Kind | None:
    """As what a weight may stay on flash: by how graphs use it. None: it has to be in memory."""
    if use == Use.MUL_MAT_ID:
        return "experts"
    if use == Use.GET_ROWS:
        return "rows"
    if use == Use.MUL_MAT:
        return "ffn" if _FEED_FORWARD.search(name) else "all"
    return "all" if use == Use.MUL_MAT | Use.GET_ROWS else None  # an embedding that is the output matrix, too


def kinds_of(what: str) -> tuple[tuple[Kind, ...], ...]:
    """The kinds that may go to flash, as few as possible first; what: as in FlashOffload."""
    return ((), *_TIERS) if what == "auto" else (_ASKED[what],)


def select(meta: GgufMeta, kinds: Container[Kind | None], uses: Mapping[str, Use]) -> tuple[TensorInfo, ...]:
    """The weights of `kinds` that are worth leaving on flash, in the file's order."""
    return tuple(
        tensor
        for tensor in meta.tensors.values()
        if tensor.size >= _SMALLEST and kind_of(tensor.name, uses.get(tensor.name, Use(0))) in kinds
    )


def expert_bytes(meta: GgufMeta) -> int:
    """Bytes of all experts, by the names that mixtures have."""
    return sum(tensor.size for tensor in meta.tensors.values() if _EXPERTS.fullmatch(tensor.name))


def estimate(meta: GgufMeta, shape: ContextShape) -> Breakdown:
    """KV cache, graph buffers and logits of a context, and the engine's heap (as `interpreter`), in bytes.

    An upper bound for plain attention; models with sliding windows or recurrent layers need less.
    """
    n_layer = meta.number("block_count")
    n_embd = meta.number("embedding_length")
    n_vocab = meta.n_vocab
    n_ctx = shape.n_ctx or meta.number("context_length", 4096)
    cells = -(-n_ctx // (256 * shape.n_sequences)) * 256  # of each sequence; the engine pads
    n_ctx = cells * shape.n_sequences
    heads = meta.per_layer("attention.head_count", n_layer, 1)
    kv_heads = meta.per_layer("attention.head_count_kv", n_layer, max(heads, default=1))
    head = n_embd // max(1, max(heads, default=1))
    k_dim, v_dim = meta.number("attention.key_length", head), meta.number("attention.value_length", head)
    latent = meta.number("attention.kv_lora_rank")  # MLA keeps one latent vector and the rotated part
    k_type, v_type = _KV_BYTES.get(shape.type_k, 4.0), _KV_BYTES.get(shape.type_v, 4.0)
    if latent:
        kv = n_ctx * n_layer * (latent + meta.number("rope.dimension_count", 64)) * k_type
    else:
        kv = n_ctx * sum(kv_heads) * (k_dim * k_type + v_dim * v_type)

    n_used = meta.number("expert_used_count")
    ff = max(meta.number("feed_forward_length"), n_used * meta.number("expert_feed_forward_length"))
    rows = shape.n_ubatch
    layer = rows * 4 * (3 * ff + (4 + 2 * n_used) * n_embd)
    n_head = max(heads, default=1)
    masks = rows * cells * 6  # as float32, and as the kernels want it
    scores = 0 if shape.flash_attn else rows * cells * n_head * 4
    attention = scores + masks + rows * (8 * n_head * k_dim + 16 * n_embd)
    logits = 4 * (min(rows, shape.n_outputs) * n_vocab + 2 * rows * n_embd)
    per_output = 4 * (n_vocab + (n_embd if shape.embedding else 0))
    return Breakdown(
        interpreter=_ENGINE_HEAP + n_vocab * _HEAP_PER_TOKEN,
        kv=int(kv),
        compute=max(layer, attention, logits) + work_bytes(meta, shape),
        outputs=shape.n_outputs * per_output + shape.n_scores * 4 * n_vocab + shape.aside + shape.prompts,
    )


def work_bytes(meta: GgufMeta, shape: ContextShape) -> int:
    """Bytes of the thread pool's work buffer, which no interface reports: activations in the weights' dot type."""
    n_used = meta.number("expert_used_count")
    ff = max(meta.number("feed_forward_length"), n_used * meta.number("expert_feed_forward_length"))
    return shape.n_ubatch * 2 * max(ff, meta.number("embedding_length")) + (1 << 20)


def make_plan(
    meta: GgufMeta,
    options: FlashOffload,
    budget: Budget,
    shape: ContextShape,
    interpreter: int,
    ask: Callable[[GgufMeta, ContextShape], Graphs] = graphs_of,
) -> Plan:
    """Chooses the flash tensors.

    Args:
        interpreter: bytes that the process holds before the model is loaded.
        ask: tells how graphs use the weights, and their sizes; asked only where something may have to stay on flash.

    Raises:
        FlashBudgetError: if even with everything on flash the budget cannot work, or loading would overrun it.
        FlashFormatError: the file's neuron bundles contradict themselves.
    """
    bundles = read_bundles(meta)
    weights = sum(tensor.size for tensor in meta.tensors.values()) - (bundles.neuron_bytes if bundles else 0)
    estimated = estimate(meta, shape)

    def plan_for(kinds: tuple[Kind, ...], uses: Mapping[str, Use], graphs: Graphs | None = None) -> Plan:
        tensors = select(meta, kinds, uses)
        tables = {t.name: uses[t.name] == Use.GET_ROWS for t in tensors if uses[t.name] & Use.GET_ROWS}
        rows = sum(tensor.size for tensor in tensors if tables.get(tensor.name))
        experts = sum(tensor.size for tensor in tensors if uses[tensor.name] == Use.MUL_MAT_ID)
        on_flash = sum(tensor.size for tensor in tensors)
        mode: Literal["flash", "nothing"] = "flash" if tensors or bundles else "nothing"
        panels, context = on_flash - rows - experts, estimated
        plan = Plan(mode, tensors, weights - on_flash, experts, panels, context, bundles, tables, rows)
        if graphs is not None:
            graphs, plan = at_devices(meta, plan, options, shape, graphs, ask)
            context = replace(context, kv=graphs.kv, compute=graphs.compute + work_bytes(meta, shape))
        return _expecting(plan, context, interpreter, budget.reserve)

    def fits(plan: Plan) -> bool:
        return max(plan.expected.total, _load_peak(meta, plan)) <= budget.total

    whole = plan_for((), {})
    if not bundles and all(tensor.size < _SMALLEST for tensor in meta.tensors.values()):
        return whole
    auto = options.what == "auto" and not bundles
    if auto and fits(whole):
        return replace(whole, mode="resident")
    graphs = ask(meta, shape)
    uses = _may_leave(graphs.uses, meta, options)
    if not select(meta, _TIERS[-1], uses) and not bundles:
        return plan_for((), {}, graphs)
    if options.what != "auto":
        chosen = plan_for(_ASKED[options.what], uses, graphs)
        if chosen.mode != "nothing":
            _check(meta, chosen, options, budget, shape)
        return chosen
    whole = plan_for((), {}, graphs)
    if auto and fits(whole):
        return replace(whole, mode="resident")
    uses = {name: use for name, use in uses.items() if name not in graphs.on_device}  # there is room for them
    candidates = [plan_for(kinds, uses, graphs) for kinds in ((), *_TIERS)]
    return _first_with_room([plan for plan in candidates if plan.mode == "flash"], meta, options, budget, shape)


def _expecting(plan: Plan, context: Breakdown, interpreter: int, reserve: int) -> Plan:
    held = interpreter + context.interpreter + plan.heap_bytes
    return replace(plan, expected=replace(context, interpreter=held, weights=plan.resident_bytes, reserve=reserve))


def _may_leave(uses: Mapping[str, Use], meta: GgufMeta, options: FlashOffload) -> Mapping[str, Use]:
    """Without what a head that makes drafts multiplies by, too: each of its guesses would read that."""
    head = drafting_head(meta) if options.draft == "mtp" else None
    return {name: use for name, use in uses.items() if head is None or name not in head.shared}


def is_sure(meta: GgufMeta, plan: Plan, options: FlashOffload, budget: Budget) -> bool:
    """Whether the budget is sure to be enough for a plan of make_plan, which refuses what is sure to fail only."""
    if plan.mode != "flash":
        return True
    room = int(_LAYER_SHARE * plan.neuron_bytes / len(plan.bundles.layers)) if plan.bundles else 0
    return plan.expected.total + _beside(meta, plan, options) + room <= budget.total


def _first_with_room(
    candidates: Sequence[Plan], meta: GgufMeta, options: FlashOffload, budget: Budget, shape: ContextShape
) -> Plan:
    """The first for which the budget is sure to be enough, else the last. Raises FlashBudgetError."""
    for plan in candidates:
        if is_sure(meta, plan, options, budget):
            return plan
    _check(meta, candidates[-1], options, budget, shape)
    return candidates[-1]


def choose_predictor(
    path: str, bundles: Bundles, asked: Predictor, left: int, needs_of: Callable[[Mode], Requirements]
) -> Requirements:
    """How active neurons are found: the last mode that `needs_of` was called with. Returns what that one needs.

    Args:
        left: bytes there are for the flash tensors.
        needs_of: what the flash tensors need in a mode.

    Raises:
        FlashFormatError: "lowrank" was asked for, and the file has no predictors.
    """
    if asked == "lowrank" and bundles.n_expert_used:
        raise FlashFormatError(f"{path}: predictor='lowrank', but experts have no predictors: choose 'exact' or 'off'")
    if asked == "lowrank" and not bundles.has_predictors:
        raise FlashFormatError(
            f"{path}: predictor='lowrank', but the file has no predictors for all layers: calibrate it "
            "(python -m gguf_tools calibrate), or choose 'exact' or 'off'"
        )
    if asked != "auto":
        return needs_of(asked)
    needs = needs_of("exact")
    rest = needs.neuron_bytes - needs.neuron_resident
    if left >= needs.min_memory + int(_EXACT_SHARE * rest):
        return needs
    if bundles.has_predictors:
        return needs_of("lowrank")
    # whole dense layers are too much to read for every token; whole experts in the gates' memory are not
    return needs if left >= needs.min_memory and not bundles.n_expert_used else needs_of("off")


def _beside(meta: GgufMeta, plan: Plan, options: FlashOffload) -> int:
    """Bytes that must be left beside all that is expected: for the flash tensors, and for the load before them."""
    return max(_least_flash(meta, plan, options), _load_peak(meta, plan) - plan.expected.total)


def _least_flash(meta: GgufMeta, plan: Plan, options: FlashOffload) -> int:
    """About the memory without which the plugin cannot compute: two records of each shape in flight."""
    n_expert = max(1, meta.number("expert_count"))
    panel = parse_size(options.panel_bytes)
    read_whole = [t for t in plan.tensors if not plan.tables.get(t.name)]
    records = (t.size // n_expert if len(t.shape) == 3 else min(t.size, panel) for t in read_whole)
    neurons = least_for_neurons(plan.bundles, exact=options.predictor == "exact") if plan.bundles else 0
    rows = _ROWS if plan.tables else 0
    return 8 * max(records, default=0) + (4 << 20) + rows + neurons


def least_for_neurons(bundles: Bundles, *, exact: bool = False) -> int:
    """About the bytes without which bundles cannot be computed: two runs of records, a prompt's sums and tables.

    exact: with what that way of finding active neurons keeps resident.
    """
    widest = max(layer.n_ff for layer in bundles.layers)
    columns = max(1, bundles.n_expert_used)  # of a token
    rows = columns * (bundles.format.n_embd + (widest if bundles.format.gated else 0)) + 1024
    rows += bundles.format.n_embd if bundles.n_expert_used else 0
    tables = 28 * bundles.n_neurons + (bundles.n_neurons * bundles.format.parts[0].row_bytes if exact else 0)
    return 3 * 256 * bundles.format.record_bytes + 4 * 512 * rows + tables + (6 << 20)


def _load_peak(meta: GgufMeta, plan: Plan) -> int:
    """Most bytes that the process takes while the weights are read, before there are a KV cache and buffers.

    A weight that is repacked is there twice for a moment; the engine loads the largest of these first. The others are
    read in pieces, straight to where they stay; what goes to a device passes through memory. The embedding is not
    repacked, nor is what is not quantised.
    """
    on_flash = {tensor.name for tensor in plan.tensors}
    if plan.bundles:
        on_flash.update(layer.tensor.name for layer in plan.bundles.layers)
    elsewhere = on_flash | plan.on_device
    resident = [tensor for tensor in meta.tensors.values() if tensor.name not in elsewhere]
    repacked = sorted((tensor.size for tensor in resident if _may_be_repacked(tensor)), reverse=True)
    peak = plan.resident_bytes + plan.staging
    read = 0
    for size in repacked:
        read += size
        peak = max(peak, read + size)
    return plan.expected.interpreter + peak + _LOAD_PIECES


def _may_be_repacked(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 1 and tensor.name != "token_embd.weight" and tensor.type not in _PLAIN_TYPES


def _check(meta: GgufMeta, plan: Plan, options: FlashOffload, budget: Budget, shape: ContextShape) -> None:
    """Refuses what is sure to fail before anything is loaded; what is only likely to fail is measured later."""
    expected = plan.expected
    certain = expected.interpreter + plan.resident_bytes + expected.kv + expected.reserve
    if max(certain, _load_peak(meta, plan)) > budget.total:
        advice = advice_for(meta, plan, options, shape)
        raise refuse(budget, expected, _beside(meta, plan, options), options.reserve, advice=advice)
