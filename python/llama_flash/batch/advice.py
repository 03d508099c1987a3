"""How many sequences a job computes at the same time, where nobody says so.

More of them share each weight that a pass reads; their KV cache takes memory from the weights that are kept. What is
the better of the two is the plan's model of a pass to say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..budget.rooms import resolve_budget
from ..errors import FlashError
from ..model.gguf import read_gguf
from ..model.shape import ContextShape
from ..native.library import trim_heap
from ..options import FlashOffload
from ..planning.planner import speeds_together
from ..server.parallel import plan_of
from ..workers.together import sequences_at_workers
from .engine import N_BATCH

__all__ = ["MOST", "parallel_for"]

MOST = 32

logger = logging.getLogger("llama_flash")


def parallel_for(model: Path, flash_offload: Mapping[str, Any], n_ctx: int, n_requests: int | None = None) -> int:
    """Which of 1, 2, 4, 8, 16 and 32 sequences are expected to generate the most tokens per second in all.

    A model that fits into memory as a whole stays there: then it is the most with which it does. Over workers, it is
    the most whose KV cache takes little of their slots.

    Args:
        n_ctx: tokens of each sequence.
        n_requests: more sequences than that are of no use; None: not known.

    Raises:
        FlashFormatError, OSError: the file cannot be read.
        FlashWorkerError: a worker cannot be used.
        ValueError, TypeError: see FlashOffload.
    """
    options = FlashOffload(**flash_offload)
    meta = read_gguf(model)
    one = ContextShape(n_ctx=n_ctx, n_batch=N_BATCH)
    if options.workers:
        choices = [n for n in (32, 16, 8, 4, 2) if n_requests is None or n // 2 < n_requests]
        return sequences_at_workers(meta, options, one, choices)[0]
    import llama_cpp  # noqa: F401  # so that its size is counted

    budget = resolve_budget(options.dram_budget, options.reserve, model_bytes=meta.file_bytes)
    room = [1]
    mode = ""
    n = 1
    while n <= MOST and (n == 1 or n_requests is None or n // 2 < n_requests):
        plan = plan_of(n, meta, options, budget, one)
        if plan is None or plan.mode != (mode or plan.mode):
            break
        mode = plan.mode
        room.append(n)
        n *= 2
    if mode != "flash" or room[-1] == 1:
        return room[-1]
    try:
        speeds = speeds_together(meta, options, budget, one, room[-1])
    except FlashError as error:  # the load will say what is wrong
        logger.debug("how many sequences are worth having is not known: %s", error)
        return 1
    finally:
        trim_heap()
    return max(speeds, key=lambda n: (speeds[n], -n))
