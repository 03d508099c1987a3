"""How many sequences a job computes at the same time, where nobody says so.

More of them share each weight that a pass reads; their KV cache takes memory from the weights that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..budget.rooms import resolve_budget
from ..model.gguf import read_gguf
from ..model.shape import ContextShape
from ..options import FlashOffload
from ..planning.lent import FEW_TOKENS
from ..server.parallel import plan_of

__all__ = ["MOST", "parallel_for"]

MOST = FEW_TOKENS  # with more tokens in a pass the cache would take it for a prompt, which evicts nothing
_KV_SHARE = 0.25  # of the memory that is left for weights on flash and for KV caches


def parallel_for(model: Path, flash_offload: Mapping[str, Any], n_ctx: int, n_requests: int | None = None) -> int:
    """The largest of 1, 2, 4, 8, 16 whose KV cache takes a quarter at most of what it and flash weights share.

    A model that fits into memory as a whole stays there: then it is the largest with which it does.

    Args:
        n_ctx: tokens of each sequence.
        n_requests: more sequences than that are of no use; None: not known.

    Raises:
        FlashFormatError, OSError: the file cannot be read.
        ValueError, TypeError: see FlashOffload.
    """
    options = FlashOffload(**flash_offload)
    meta = read_gguf(model)
    import llama_cpp  # noqa: F401  # so that its size is counted

    budget = resolve_budget(options.dram_budget, options.reserve, model_bytes=meta.file_bytes)
    one = ContextShape(n_ctx=n_ctx)
    best, mode = 1, ""
    n = 1
    while n <= MOST and (n == 1 or n_requests is None or n // 2 < n_requests):
        plan = plan_of(n, meta, options, budget, one)
        if plan is None:
            break
        mode = mode or plan.mode
        shared = budget.total - plan.expected.total + plan.expected.kv
        if plan.mode != mode or (mode == "flash" and plan.expected.kv > _KV_SHARE * shared):
            break
        best = n
        n *= 2
    return best
