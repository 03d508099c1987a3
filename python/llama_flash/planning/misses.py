"""How many experts and neurons a token misses, given what slots hold, and back.

The formulas of docs/explanation/cost-of-a-token.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..budget.rooms import Breakdown
from ..native.params import Requirements
from .placed import Plan

__all__ = [
    "SHARED_TOKENS",
    "USUAL_SKEW",
    "expert_misses",
    "expert_slots",
    "experts_together",
    "neuron_misses",
    "neurons_held",
    "neurons_together",
    "shared_of",
    "skew_of",
]

SHARED_TOKENS = 3.0  # see neuron_misses

# Of routing, see expert_misses: what most mixtures show, the middle of 3.6 to 5.2. The shipped one has 3.6 to 4.8 on
# recorded traces, Qwen3.6-35B 4.2 (91 % found with 8 of about 18 GB, turboquant-mlx); prompts that change their subject
# have less, down to 1.5. Where each figure is from: docs/explanation/cost-of-a-token.md.
USUAL_SKEW = 4.5

_SECTOR = 4096
_MOST_SKEW = 20.0
_SHARED_RANGE = (0.1, 100.0)
_STEPS = 200  # of the sums below


def expert_misses(held: float, skew: float = 0.0) -> float:
    """Share of a token's experts that is not in slots, which hold the share `held` of all.

    Used evenly, 1 - held of them are missed; models that prefer some miss exp(-skew x held) of that, as measured on
    recorded traces (docs/explanation/cost-of-a-token.md).
    """
    held = min(1.0, held)
    return (1 - held) * math.exp(-skew * held)


def skew_of(held: float, missed: float) -> float | None:
    """The skew with which expert_misses(held) is `missed`; None where that cannot be told."""
    if not (0 < held < 1 and missed > 0):
        return None
    return min(_MOST_SKEW, max(0.0, -math.log(missed / (1 - held)) / held))


def expert_slots(needs: Requirements) -> int:
    """Bytes of slots that hold all experts: a slot takes whole sectors."""
    return int(needs.expert_bytes + _SECTOR * needs.n_experts)


def neurons_held(plan: Plan, memory: Breakdown, needs: Requirements) -> float:
    """Share of all neurons that slots hold. Those of experts' bundles have what the experts leave: nothing."""
    slots = 0 if plan.expert_bytes else memory.slots
    return float(min(1.0, slots / needs.neuron_record / plan.n_neurons))


def neuron_misses(active: float, held: float, window: int | None = None, shared: float = SHARED_TOKENS) -> float:
    """Share of a token's active neurons that is not in slots.

    Args:
        active: share of the neurons that a token activates.
        held: share of the neurons that slots hold.
        window: tokens whose neurons stay, None: as many as have room.
        shared: after so many tokens in slots the misses are half of what they would be if all neurons were alike.

    Slots hold the neurons of held/active tokens. If all neurons were alike, (1 - held) would be missed. Tokens share
    neurons, and some neurons are used more than others: that divides the misses by 1 + held/active/shared, 3 as with
    the shipped OPT model at five sizes of the cache, exact and by predictors. The paper's OPT 6.7B misses half as many.
    """
    if window is not None:
        held = min(held, active * window)
    return (1 - min(1.0, held)) / (1 + held / active / shared) if active > 0 else 0.0


def shared_of(active: float, held: float, missed: float) -> float | None:
    """The `shared` with which neuron_misses(active, held) is `missed`; None where that cannot be told."""
    if not (active > 0 and 0 < held < 1 and 0 < missed < 1 - held):
        return None
    least, most = _SHARED_RANGE
    return min(most, max(least, held / active / ((1 - held) / missed - 1)))


def experts_together(n: int, used: float, held: float, skew: float = 0.0) -> float:
    """How many times the experts that one token misses n tokens of different texts miss together, each counted once.

    Args:
        used: share of the experts that a token uses.
        held: share of the experts that slots hold: those that are used most. 0: all experts are counted.
        skew: see expert_misses, which says how often the expert at each rank is used.
    """
    return _together(n, held, lambda rank: used * math.exp(-skew * rank) * (1 + skew * (1 - rank)))


def neurons_together(n: int, active: float, held: float, shared: float = SHARED_TOKENS) -> float:
    """The same of active neurons; active, held, shared: see neuron_misses."""
    common = 1 / (active * shared) if active > 0 else 0.0
    return _together(n, held, lambda rank: active * (1 + common) / (1 + common * rank) ** 2)


def _together(n: int, held: float, chance: Callable[[float], float]) -> float:
    """chance: that a token uses what has this rank, from 0 (used most) to 1."""
    if n == 1:
        return 1.0
    ranks = [held + (1 - held) * (i + 0.5) / _STEPS for i in range(_STEPS)]
    chances = [min(1.0, chance(rank)) for rank in ranks]
    one = sum(chances)
    return sum(1 - (1 - each) ** n for each in chances) / one if one > 0 else 1.0
