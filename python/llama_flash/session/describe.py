"""A loaded model in words: the line about the load."""

from __future__ import annotations

from collections.abc import Sequence

from ..budget.rooms import Breakdown, Budget
from ..model.gguf import GgufMeta
from ..planning.placed import Plan
from ..sizes import format_size
from ..workers.division import Part

__all__ = ["line_about", "nothing_to_offload", "workers_text"]


def workers_text(parts: Sequence[Part]) -> str:
    """What lies where, to follow the line about the client."""
    return "".join(
        f"; layers {part.layers.start} to {part.layers.stop - 1} at {part.offer.endpoint}: "
        f"{format_size(part.resident)} of weights resident, {format_size(part.on_flash)} on flash"
        for part in parts
    )


def nothing_to_offload(name: str, what: str) -> str:
    kind = "" if what == "auto" else f" of what={what!r}"
    return f"{name} has no weights{kind} that could stay on flash: it runs as stock"


def line_about(
    name: str, meta: GgufMeta, plan: Plan, budget: Budget, memory: Breakdown, predictor: str, neuron_slots: int
) -> str:
    """One line: what is resident, what is on flash, and what a token is expected to read."""
    allowed = f"DRAM budget {format_size(budget.total)} ({budget.reason})"
    if plan.mode == "resident":
        return (
            f"{name}: all {format_size(memory.weights)} of weights resident, nothing on flash; {allowed}; "
            "0 B read per token"
        )
    placed = f"{name}: {format_size(memory.weights)} of weights resident, {format_size(plan.flash_bytes)} on flash; "
    if plan.bundles:
        how = {
            "exact": "exact (gate resident)" if plan.bundles.format.gated else "exact (up resident)",
            "lowrank": "by low-rank predictors (lossy)",
            "off": f"off: whole {'experts' if plan.bundles.n_expert_used else 'layers'} are read",
        }[predictor]
        return (
            f"{placed}active neurons {how}; {allowed}: {format_size(memory.slots)} of slots for "
            f"{neuron_slots} of {plan.n_neurons} neurons, {format_size(memory.pinned)} pinned, "
            f"{format_size(memory.stream)} ring"
        )
    n_expert, n_used = max(1, meta.number("expert_count")), meta.number("expert_used_count")
    experts = plan.expert_bytes * n_used // n_expert
    missed = 1 - min(1.0, memory.slots / plan.expert_bytes) if plan.expert_bytes else 0.0
    per_token = int(experts * missed) + max(0, plan.panel_bytes - memory.pinned)
    return (
        f"{placed}{allowed}: {format_size(memory.slots)} of expert slots, {format_size(memory.pinned)} pinned, "
        f"{format_size(memory.stream)} ring; expected from flash: {format_size(per_token)} per token"
        + (" with uniform routing" if experts and missed else "")
    )
