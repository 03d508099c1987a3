"""What a load with workers would do: which layers lie where, what memory is for, what crosses the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..budget.held import held_by_all
from ..budget.rooms import Breakdown, Budget, kept_budget
from ..errors import FlashWorkerError
from ..model.gguf import GgufMeta, read_gguf
from ..model.graphs import Graphs, graphs_of
from ..model.shape import ContextShape
from ..native.library import settled
from ..options import FlashOffload
from ..planning.placed import Plan
from .client import Workers
from .division import Part
from .placing import parts_of, plan_at_client

__all__ = ["DividedPlan", "Traffic", "plan_workers", "traffic_of"]

# of the engine's messages, as measured (tests/workers/test_traffic.py)
_TENSOR = 319  # bytes of a message with a tensor, beside its data
_TENSORS = 6  # that a worker gets for a token
_CONTROL = 18  # bytes of the question whether it went well, and of its answer


@dataclass(frozen=True)
class Traffic:
    """Bytes that cross for a generated token, with the context full, about."""

    up: int  # to the worker
    down: int


@dataclass(frozen=True)
class DividedPlan:
    """Sizes in bytes."""

    model: str
    budget: Budget  # of the client
    client: Breakdown  # expected; what is left of the budget is for flash, where something is
    client_flash: int  # weights on flash at the client
    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]  # of each worker

    def as_dict(self) -> dict[str, Any]:
        workers = [
            {
                "worker": part.offer.endpoint,
                "other_cpu": part.offer.other_cpu,
                "layers": [part.layers.start, part.layers.stop - 1],
                "budget": part.offer.budget,
                "held": part.offer.held,
                "reserve": part.offer.reserve,
                "resident": part.resident,
                "on_flash": part.on_flash,
                "kv": part.kv,
                "compute": part.compute,
                "flash_rate": part.offer.flash_rate,
                "dram_rate": part.offer.dram_rate,
                "expected_seconds": part.seconds,
                "left_for_flash": part.left if part.on_flash else 0,
                "bytes_up_per_token": traffic.up,
                "bytes_down_per_token": traffic.down,
            }
            for part, traffic in zip(self.parts, self.traffic, strict=True)
        ]
        return {
            "model": self.model,
            "budget": self.budget.total,
            "client": self.client.as_dict(),
            "client_on_flash": self.client_flash,
            "workers": workers,
        }


def plan_workers(model: str | os.PathLike[str], options: FlashOffload, shape: ContextShape) -> DividedPlan:
    """Asks the workers what they have, and divides the model. Nothing is loaded.

    Raises:
        FlashWorkerError: a worker cannot be used, or has too little memory.
        FlashBudgetError: the client's own budget is too small.
        FlashError: the model cannot be divided.
    """
    import llama_cpp  # noqa: F401  # registers the plugin

    meta = read_gguf(model)
    if not options.workers:
        raise FlashWorkerError("no workers are named")
    budget = kept_budget(options.dram_budget, options.reserve, meta.file_bytes)
    graphs: Graphs = graphs_of(meta, shape)
    client: Plan = plan_at_client(meta, options, budget, shape, held_by_all() - settled(), graphs)
    workers = Workers(options, meta)
    try:
        parts = parts_of(meta, workers.offers, options.what, shape)
    finally:
        workers.close()
    traffic = traffic_of(meta, parts, shape, shape.n_ctx)
    return DividedPlan(str(model), budget, client.expected, client.flash_bytes, tuple(parts), tuple(traffic))


def traffic_of(meta: GgufMeta, parts: Sequence[Part], shape: ContextShape, n_cells: int) -> list[Traffic]:
    """Of plain attention, whose sizes the file says.

    n_cells: of the KV cache that are in use.
    """
    n_embd = meta.number("embedding_length")
    heads = max(1, meta.number("attention.head_count"))
    kv_heads = meta.number("attention.head_count_kv", heads)
    value = kv_heads * meta.number("attention.value_length", n_embd // heads)
    cells = -(-n_cells // 256) * 256
    # the hidden state, its position, the mask, and where keys and values of the token go
    data = 4 * n_embd + 4 + (2 if shape.flash_attn else 4) * cells + 8 + (8 if shape.flash_attn else 8 * value)
    up = data + _TENSORS * _TENSOR + _CONTROL
    down = 4 * n_embd + 20 + _CONTROL
    return [Traffic(up + (_TENSOR if i == len(parts) - 1 else 0), down) for i in range(len(parts))]
