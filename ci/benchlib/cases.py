"""What is measured, and what it should reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchlib.child import Work
from benchlib.models import DENSE, MOE_SKEWED, MOE_UNIFORM, BenchModel


@dataclass(frozen=True)
class Targets:
    over_naive: float | None = None  # at least this many times naive's tok/s
    over_resident: float | None = None
    reads_at_most_the_rest: bool = False  # bytes read per token <= file size - cap


@dataclass(frozen=True)
class Case:
    name: str
    model: BenchModel
    cap_share: float  # of the model file
    work: Work = "decode"
    targets: Targets = Targets()
    spec: dict[str, Any] = field(default_factory=dict)  # fields of child.Spec


# A KV cache of 1024 tokens of the dense model would take 0.3 GB.
_DENSE_SPEC = {"n_ctx": 256, "n_ubatch": 64, "warm_up": 16, "tokens": 64, "min_tokens": 4}

CASES = (
    Case("moe-50", MOE_SKEWED, 0.50, targets=Targets(over_naive=3.0, over_resident=0.35)),
    Case("moe-25", MOE_SKEWED, 0.25, targets=Targets(over_naive=2.5)),
    Case("prompt-50", MOE_SKEWED, 0.50, "prompt", Targets(over_resident=0.6), {"tokens": 512}),
    Case("moe-uniform-50", MOE_UNIFORM, 0.50, targets=Targets(over_naive=2.7)),
    Case("dense-50", DENSE, 0.50, targets=Targets(over_naive=1.8, reads_at_most_the_rest=True), spec=_DENSE_SPEC),
)
MATRIX_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)
MATRIX = tuple(
    Case(f"matrix-{model.name}-{share:.0%}", model, share, spec=spec)
    for model, spec in ((MOE_SKEWED, {}), (MOE_UNIFORM, {}), (DENSE, _DENSE_SPEC))
    for share in MATRIX_SHARES
)
