"""What of a model stays with the client, and the parts of the workers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..budget.rooms import Breakdown, Budget
from ..errors import FlashError
from ..model.bundles import read_bundles
from ..model.gguf import GgufMeta
from ..model.graphs import Graphs, graphs_of
from ..model.shape import ContextShape
from ..options import FlashOffload
from ..planning.placed import Plan
from ..planning.placement import make_plan, work_bytes
from .division import Offer, Part, divide_model

__all__ = ["at_client", "bundled_names", "check_divisible", "names_pattern", "parts_of", "plan_at_client"]


def check_divisible(lora_path: str | None) -> None:
    """Refuses what cannot be divided. Raises FlashError."""
    if lora_path:
        raise FlashError(
            "an adapter (lora_path) would have to be sent to the workers: load the model without one of them"
        )


def at_client(meta: GgufMeta) -> GgufMeta:
    """The model as the client holds it: embedding, output matrix, and what else belongs to no layer."""
    here = {name: t for name, t in meta.tensors.items() if t.layer is None and not name.startswith("rope_f")}
    values = {key: value for key, value in meta.values.items() if not key.startswith("flash.")}  # bundles are of layers
    return replace(meta, tensors=here, values=values)


def plan_at_client(
    meta: GgufMeta, options: FlashOffload, budget: Budget, shape: ContextShape, interpreter: int, graphs: Graphs
) -> Plan:
    """What stays on flash of the weights that no worker has.

    Args:
        interpreter: as make_plan takes it.
        graphs: of the whole model; the KV cache lies with its layers.

    Raises:
        FlashBudgetError: the budget is too small.
    """
    here = replace(graphs, kv=0)
    plan = make_plan(at_client(meta), options, budget, shape, interpreter, lambda *_: here)
    expected = replace(plan.expected, kv=0)
    return replace(plan, mode="resident" if plan.mode == "nothing" else plan.mode, expected=expected)


def names_pattern(names: Iterable[str]) -> list[str]:
    """Regular expressions (ECMAScript) that match these names and no others."""
    return [f"^{re.escape(name)}$" for name in names]


def parts_of(meta: GgufMeta, offers: Sequence[Offer], what: str, shape: ContextShape) -> list[Part]:
    """See divide_model."""
    graphs = graphs_of(meta, replace(shape, n_outputs=shape.n_sequences))  # the client computes logits
    expected = Breakdown(kv=graphs.kv, compute=graphs.compute + work_bytes(meta, shape))
    return divide_model(meta, offers, what, graphs.uses, expected, read_bundles(meta))


def bundled_names(meta: GgufMeta, part: Part) -> list[str]:
    """Names of the weights as which the loader presents the bundles of a worker's layers."""
    bundles = read_bundles(meta)
    return [] if bundles is None else bundles.of_layers(part.layers).part_names()
