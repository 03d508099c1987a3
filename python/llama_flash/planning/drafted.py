"""What drafts are expected to bring: tokens per second by how many of the drafted tokens are accepted.

The formulas are in docs/explanation/drafts.md. Nothing here is measured; what a run shows takes its place
(drafts/passes.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..budget.rooms import Breakdown
from ..model.bundles import read_bundles
from ..model.gguf import GgufMeta, read_gguf
from ..model.mtp import drafting_head, without_mtp
from ..model.shape import ContextShape
from ..native.params import Requirements
from .cost import Cost
from .lent import FEW_TOKENS
from .misses import USUAL_SKEW, expert_slots, experts_together, neurons_together
from .placed import Plan

__all__ = [
    *("ACCEPTANCES", "MOST_DRAFTED", "DraftPlan", "DraftSizes", "Drafted"),
    *("beside_mtp", "draft_batch", "draft_sizes", "drafted", "mtp_params", "mtp_sizes", "pass_shape"),
]

MOST_DRAFTED = FEW_TOKENS - 1  # tokens: with the one before them they are few

ACCEPTANCES = (0.5, 0.7, 0.9)  # shares of the drafted tokens, for plans

_PANELS = 0.01  # of a pass: a further token's, where reading all weights takes the time
_DRAM = 0.15  # ... where all weights are in memory: large matrices are read once for several tokens
_ROUTED = 0.5  # ... at least, where each token has experts or neurons of its own
_ACTIVE = 0.1  # share of the neurons

_BATCH = 256  # tokens of a draft model's pass over a text that is new, and of a head's
_LEAST_BATCH = 16
_WIDEST = 64 << 20  # bytes of its feed-forward block's values, of which a graph has a few


@dataclass(frozen=True)
class Drafted:
    """Drafts of the best length for an acceptance."""

    acceptance: float
    length: int  # drafted tokens of a pass; 0: none pay
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class DraftPlan:
    """What drafts cost and bring. Sizes in bytes."""

    source: str  # "ngram", "mtp", "model"
    bytes: int  # of memory: a draft model's or a head's weights, KV cache and buffers
    without: float  # tokens per second without drafts, and with that memory for the model
    expected: tuple[Drafted, ...]  # for some acceptances
    seen: Drafted | None  # for the one that was seen in the last run
    reason: str = ""  # why not by the file's head, where "auto" has found one

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class DraftSizes:
    """Of a draft model, or of the model's own head, in bytes."""

    weights: int = 0
    heap: int = 0  # vocabulary, graphs
    beside: int = 0  # KV cache, graph buffers, logits, states: touched when they are used
    read: int = 0  # of weights, for a guess

    @property
    def bytes(self) -> int:
        return self.weights + self.heap + self.beside


def draft_batch(meta: GgufMeta, n_ctx: int) -> int:
    """Tokens that a draft model computes at once, so that graph buffers stay small beside its weights."""
    widest = 4 * max(1, meta.number("feed_forward_length"))
    return min(n_ctx, _BATCH, max(_LEAST_BATCH, _WIDEST // widest))


def draft_sizes(path: str | os.PathLike[str], n_ctx: int) -> DraftSizes:
    """What a draft model takes beside the model that it drafts for; n_ctx: tokens of that one's context.

    Raises:
        FlashFormatError, FlashError: it cannot be loaded.
        OSError: it cannot be read.
    """
    from .dry_run import engine_sizes  # for plans: not in memory otherwise

    meta = without_mtp(read_gguf(path))  # its own head makes no drafts
    n_batch = draft_batch(meta, n_ctx)
    sizes = engine_sizes(meta, None, ContextShape(n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch))
    weights = sum(tensor.size for tensor in meta.tensors.values()) + sizes.doubled
    return DraftSizes(weights, sizes.heap, sizes.kv + sizes.compute + 4 * meta.n_vocab, weights)


def mtp_sizes(meta: GgufMeta, shape: ContextShape) -> DraftSizes:
    """What drafts of the model's own head take; shape: of the model's context.

    Raises:
        FlashFormatError, FlashError: the engine does not take the file, or has no such context.
    """
    from ..model.no_alloc import context_params, no_alloc_context
    from ..native.calls import context_memory

    head = drafting_head(meta)
    assert head is not None
    params = context_params(shape)
    own = mtp_params(params)
    with no_alloc_context(str(meta.files[0]), read_bundles(meta), own, devices=shape.devices, mtp=True) as (_, context):
        buffers = context_memory(context)
    beside = beside_mtp(params, meta.n_vocab, meta.number("embedding_length"), own.n_outputs_max)
    return DraftSizes(head.bytes, 0, int(buffers.context + buffers.compute) + beside, head.read_bytes(meta))


def mtp_params(params: Any) -> Any:
    """llama_context_params of a head's context; params: of the model's."""
    import llama_cpp

    own = type(params).from_buffer_copy(params)
    own.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_MTP
    own.n_batch = own.n_ubatch = min(_BATCH, params.n_batch)
    own.n_outputs_max = own.n_seq_max = max(1, params.n_seq_max)
    own.n_outputs_max_per_seq = own.n_samplers = 0
    own.samplers = own.ctx_other = None
    own.embeddings, own.cb_eval = False, llama_cpp.ggml_backend_sched_eval_callback()
    return own


def beside_mtp(params: Any, n_vocab: int, n_embd: int, n_texts: int) -> int:
    """Bytes beside the buffers of a head's context: logits, and states of the model's last layer.

    params: llama_context_params of the model's.
    """
    batch = min(_BATCH, params.n_batch)
    states = params.n_batch + params.n_ubatch + (batch + 64) * (1 + n_texts)
    return 4 * (n_vocab * n_texts + n_embd * int(states))


def pass_shape(
    meta: GgufMeta, plan: Plan, memory: Breakdown, needs: Requirements | None, skew: float | None = None
) -> Callable[[int], float]:
    """What a pass with so many tokens takes, in passes with one: panels are read once, of experts and neurons those
    that any of the tokens needs."""
    if plan.mode != "flash" or needs is None:
        further = _ROUTED if meta.number("expert_count") else _DRAM
        return lambda n: 1 + further * (n - 1)
    if plan.bundles or plan.neuron_bytes:
        return lambda n: max(1 + _ROUTED * (n - 1), neurons_together(n, _ACTIVE, 0.0))
    if plan.expert_bytes and needs.n_experts:
        share = meta.number("expert_used_count") / max(1, meta.number("expert_count"))
        held = min(1.0, memory.slots / expert_slots(needs))
        routing = USUAL_SKEW if skew is None else skew
        return lambda n: max(1 + _ROUTED * (n - 1), experts_together(n, share, held, routing))
    return lambda n: 1 + _PANELS * (n - 1)


def drafted(cost: Cost, shape: Callable[[int], float], acceptance: float, per_guess: float = 0.0) -> Drafted:
    """The best length and what it brings, if each guess is taken with the same chance.

    Args:
        cost: of a token without drafts.
        per_guess: seconds to draft a token.
    """
    one = 1 / cost.tokens_per_second
    best = Drafted(acceptance, 0, cost.tokens_per_second)
    expected = reach = 1.0
    for n in range(1, FEW_TOKENS):
        reach *= acceptance
        expected += reach
        rate = expected / (one * shape(n + 1) + n * per_guess)
        if rate > best.tokens_per_second:
            best = Drafted(acceptance, n, rate)
    return best
