"""What is planned for beside flash memory and idle while a model decodes.

Graph buffers are as large as a prompt needs them, the KV cache and the caller's logits as large as the context can get.
What of them is not in use while a token at a time is computed is lent to flash, and is given back before a prompt.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from ..budget.rooms import MACHINE, Breakdown, Budget, reserve_of
from ..model.shape import ContextShape
from ..native.caches import AtOnce

__all__ = ["FEW_TOKENS", "Growth", "few_tokens", "lent_of"]

FEW_TOKENS = 16  # drafts, and batches of a caller: computed at once at most, while the rest of the buffers is lent
_LEAST_TOKENS = 8  # that are expected from one look of the controller to the next
_SECONDS = 2.0  # twice the time between two looks, if nothing calls for one sooner
_SPARE = 16 << 20  # bytes of pages that calls of few tokens touch beside what is expected of them
_ROWS = 2 << 20  # bytes of pages of a KV cache, for each of a few tokens
_PAGE_CELLS = mmap.PAGESIZE // 2  # of one row of a V cache that lies across its rows: F16
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def few_tokens(n_sequences: int) -> int:
    """Tokens of a pass that generates, at most, in a context of so many sequences: there is one of each."""
    return max(FEW_TOKENS, n_sequences)


class Growth:
    """Of what a model takes beside flash memory while it decodes, from how fast it does.

    Args:
        memory: as planned.
        shape: of the context.
        at_once: what the first token of a sequence touches at once; None: not known, or there is no context yet.

    Attributes:
        most_touched: bytes that calls of few tokens touch between two looks at most, in pages; what touches more
            computes many.
    """

    def __init__(self, memory: Breakdown, shape: ContextShape, at_once: AtOnce | None = None) -> None:
        self._n_ctx = shape.n_ctx
        self._cells = memory.kv + memory.outputs
        self._most = memory.compute + self._cells
        few = min(few_tokens(shape.n_sequences), shape.n_ubatch)
        logits = min(memory.compute, memory.outputs)  # a graph has them, too
        self._graphs = (memory.compute - logits) * few // shape.n_ubatch
        self._graphs += logits * min(few, shape.n_outputs) // shape.n_outputs
        cells = max(1, shape.n_ctx // shape.n_sequences)  # of each sequence
        self._at_once, self._caches = at_once, 0
        if not shape.flash_attn and cells > _PAGE_CELLS:  # all rows reach their next page with the same token
            self._caches = memory.kv * _PAGE_CELLS // cells
        elif shape.n_sequences > 1:  # one that begins touches all pages of its V cache, and more may begin at once
            self._caches = memory.kv
        if shape.aside:  # a prompt that is brought back, or put there, touches its memory at once
            self._graphs += self._cells
        self._huge_pages = b"[always]" in _read(_HUGE_PAGES)  # one token touches a huge page of each layer
        rows = min(memory.kv, few * _ROWS) if shape.flash_attn else memory.kv
        self.most_touched = self._most if self._huge_pages else min(self._most, 2 * self._graphs + rows + _SPARE)
        self._tokens = 0
        self._last: tuple[float, int] | None = None  # (seconds, tokens)
        self._rate = 0.0  # tokens per second

    def add(self, n_tokens: int) -> None:
        """So many more were computed."""
        self._tokens += n_tokens

    def soon(self, now: float) -> int:
        """Bytes that may be touched until the next look. To be asked at each, with its time."""
        tokens = self._tokens
        if self._last is not None and now > self._last[0]:
            rate = (tokens - self._last[1]) / (now - self._last[0])
            self._rate = max(rate, self._rate / 2)
        self._last = (now, tokens)
        if self._huge_pages:
            return self._most
        expected = max(_LEAST_TOKENS, int(self._rate * _SECONDS))
        caches = self._caches
        if caches and self._at_once is not None:  # what has been touched counts with what there is
            caches = min(caches, self._at_once.untouched())
        return min(self._most, self._graphs + caches + self._cells * min(expected, self._n_ctx) // self._n_ctx)


def lent_of(memory: Breakdown, shape: ContextShape, budget: Budget, reserve: int | str | None) -> int:
    """Bytes of a plan's memory that flash has while tokens are generated and the context is still empty.

    Args:
        memory: as planned.
        reserve: as in FlashOffload.
    """
    if budget.reason == MACHINE:  # others may take it at once
        return 0
    idle = memory.compute + memory.kv + memory.outputs - Growth(memory, shape).soon(0.0)
    return idle + budget.reserve - reserve_of(budget.total, reserve, 0)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a kernel without them
        return b""
