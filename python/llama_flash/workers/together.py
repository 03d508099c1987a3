"""How many sequences a model that is divided among workers computes at the same time, where nobody says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import FlashWorkerError
from ..model.gguf import GgufMeta
from ..model.shape import ContextShape
from ..options import FlashOffload
from ..sizes import format_size
from .client import Workers
from .division import Part
from .placing import parts_of

__all__ = ["sequences_at_workers"]

_SHARE = 0.10  # of what a worker's budget leaves for flash: what the KV cache of all may take


def sequences_at_workers(
    meta: GgufMeta, options: FlashOffload, one: ContextShape, choices: Sequence[int]
) -> tuple[int, str]:
    """The most of `choices` whose KV cache is little beside what each worker has for slots; and why, in a few words.

    Args:
        one: the context of one sequence.
        choices: from the most to the least; one sequence is what is left.

    Raises:
        FlashWorkerError: a worker cannot be used, or has too little memory for one sequence.
        FlashError: the model cannot be divided.
    """
    workers = Workers(options, meta)
    try:
        offers = workers.offers
    finally:
        workers.close()

    def parts(n: int) -> list[Part]:
        shape = replace(one, n_ctx=n * one.n_ctx, n_outputs=max(n, one.n_outputs), n_sequences=n)
        return parts_of(meta, offers, options.what, shape)

    alone = parts(1)
    for n in choices:
        try:
            many = parts(n)
        except FlashWorkerError:  # too little memory for so many
            continue
        if all(_cost_little(part, first) for part, first in zip(many, alone, strict=True)):
            kv = max(part.kv for part in many)
            return n, f"their KV cache of {format_size(kv)} is little beside what the workers have"
    return 1, "the workers' budgets are small"


def _cost_little(part: Part, alone: Part) -> bool:
    """Whether the worker keeps nothing more on flash, and nearly as many slots, as for one sequence."""
    if not part.on_flash:
        return True
    return bool(alone.on_flash) and part.kv <= _SHARE * part.left
