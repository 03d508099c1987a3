"""How many answers are computed at the same time, where nobody says.

Each has a part of the KV cache of its own, which is taken from the slots: as many as cost little.
"""

from __future__ import annotations

from dataclasses import replace

from ..budget.held import held_by_all
from ..budget.rooms import Budget, resolve_budget
from ..errors import FlashBudgetError
from ..model.gguf import GgufMeta
from ..model.mtp import drafting_head, without_mtp
from ..model.shape import ContextShape
from ..native.library import settled
from ..options import FlashOffload
from ..planning.drafted import mtp_sizes
from ..planning.placed import Plan
from ..planning.placement import make_plan
from ..sizes import format_size
from ..workers.together import sequences_at_workers

__all__ = ["choose_parallel", "plan_of"]

_CHOICES = (8, 4, 2)
_SHARE = 0.10  # of what the budget leaves for weights from flash: what the KV cache of all may take
_UNCOUNTED = 4  # where nothing is on flash and no budget is kept: llama-server's own default


def choose_parallel(meta: GgufMeta, options: FlashOffload | None, one: ContextShape) -> tuple[int, str]:
    """How many, and why, in a few words.

    Args:
        options: None: flash offload is off.
        one: the context of one answer.

    Raises:
        FlashFormatError: the file's neuron bundles contradict themselves.
        FlashWorkerError: a worker cannot be used.
    """
    if options is None:
        return _UNCOUNTED, "no budget is kept"
    if options.workers:
        return sequences_at_workers(meta, options, one, _CHOICES)
    budget = resolve_budget(options.dram_budget, options.reserve, model_bytes=meta.file_bytes)

    alone = plan_of(1, meta, options, budget, one)
    if alone is None:
        return 1, "the budget is small"
    for n in _CHOICES:
        plan = plan_of(n, meta, options, budget, one)
        if plan is None or plan.mode != alone.mode:
            continue
        kv, left = plan.expected.kv, budget.total - plan.expected.total
        if plan.mode != "flash":
            return n, f"their KV cache of {format_size(kv)} fits beside the weights"
        if kv <= _SHARE * left:
            return n, f"their KV cache of {format_size(kv)} is little beside {format_size(left)} for weights from flash"
    more = format_size(2 * alone.expected.kv)
    return 1, f"the KV cache of 2, {more}, is more than {_SHARE:.0%} of what is left for weights from flash"


def plan_of(n: int, meta: GgufMeta, options: FlashOffload, budget: Budget, one: ContextShape) -> Plan | None:
    """For n sequences, each with a context as `one`. None: the budget is too small for so many."""
    shape = replace(one, n_ctx=n * one.n_ctx, n_outputs=max(n, one.n_outputs), n_sequences=n)
    if options.draft == "mtp" and drafting_head(meta) is not None:
        shape = replace(shape, aside=shape.aside + mtp_sizes(meta, shape).beside)
    else:
        meta = without_mtp(meta)
    try:
        return make_plan(meta, options, budget, shape, held_by_all() - settled())
    except FlashBudgetError:
        return None
