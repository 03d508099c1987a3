"""What is measured, and what it should reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchlib.child import Work
from benchlib.models import (
    DENSE,
    DENSE_Q4,
    DENSE_REAL,
    GPT_OSS_120B,
    MOE_K_SKEWED,
    MOE_K_UNIFORM,
    MOE_REAL,
    MOE_REAL_16,
    MOE_SKEWED,
    MOE_UNIFORM,
    QWEN3_30B,
    RELU,
    RELU_Q8,
    RELU_WHOLE,
    BenchModel,
)


@dataclass(frozen=True)
class Targets:
    over_naive: float | None = None  # at least this many times naive's tok/s
    over_resident: float | None = None
    over_limit: float | None = None  # of the slower of two clocks, see limits.py
    reads_at_most_the_rest: bool = False  # bytes read per token <= file size - cap
    first_token: float | None = None  # at most this many times what reading its bytes takes, and less than naive's
    first_touch: bool = False  # first_token is beside the first touch of the memory that it takes, where that is slower


@dataclass(frozen=True)
class Case:
    name: str
    model: BenchModel
    cap_share: float  # of the model file; 0: cap_bytes
    work: Work = "decode"
    targets: Targets = Targets()
    spec: dict[str, Any] = field(default_factory=dict)  # fields of child.Spec
    flash: dict[str, Any] = field(default_factory=dict)  # options of FlashOffload
    cached: bool = False  # computing is slower or faster than the resident run's: measured with all of it cached

    cap_bytes: int = 0
    beside_all: bool = False  # naive, and resident where that fits into the machine's memory, whatever the targets

    def cap(self, model_bytes: int) -> int:
        """Bytes. Of a model of fewer layers, the same share as of the whole one."""
        if not self.cap_bytes:
            return int(model_bytes * self.cap_share)
        return min(self.cap_bytes, int(model_bytes * self.cap_bytes / self.model.n_bytes()))

    @property
    def drafts(self) -> bool:
        """Whether several tokens share a pass, beside a run with one token at a time."""
        return bool(self.spec.get("draft"))


# A KV cache of 1024 tokens of the dense model would take 0.3 GB.
_DENSE_SPEC = {"n_ctx": 256, "n_ubatch": 64, "warm_up": 16, "tokens": 64, "min_tokens": 4}
_PROMPT = {"tokens": 512}
_DENSE_PROMPT = {"tokens": 512, "n_ctx": 512}
_FIRST = {"tokens": 32, "n_ctx": 512}
_RELU_SPEC = {"warm_up": 40, "tokens": 60, "n_ctx": 128, "n_ubatch": 64}
_DRAFT = {"n_ctx": 512, "warm_up": 32, "tokens": 96, "draft": 10}


def _targets(work: Work, kind: str, share: float) -> Targets:
    """kind: "skewed", "uniform", "relu" or "dense"."""
    half = share >= 0.5
    if work == "prompt":
        return Targets(over_resident=0.85 if half else 0.7)
    if work == "first":
        return Targets(first_token=1.3)
    limit = {"dense": 0.9, "relu": 0.8}.get(kind, 0.85)
    resident = {"skewed": 0.6, "relu": 1.3}.get(kind) if half else None
    return Targets(over_limit=limit, over_resident=resident)


def _label(name: str, work: str, cap: str) -> str:
    return f"{name}-{cap}" if work in ("decode", "text") else f"{name}-{work}-{cap}"


def _cases(name: str, kind: str, model: BenchModel, spec: dict[str, Any], prompt: dict[str, Any]) -> list[Case]:
    result = []
    for share in (0.5, 0.25):
        percent = f"{share:.0%}".rstrip("%")
        for work, fields in (("decode", spec), ("prompt", prompt), ("first", _FIRST)):
            label = _label(name, work, percent)
            flash = {"predictor": "lowrank"} if kind == "relu" else {}
            targets = _targets(work, kind, share)  # type: ignore[arg-type]
            cached = kind == "relu" and work == "decode"
            result.append(Case(label, model, share, work, targets, fields, flash, cached))  # type: ignore[arg-type]
    return result


LIMITS = (
    *_cases("moe", "skewed", MOE_SKEWED, {}, _PROMPT),
    *_cases("moe-uniform", "uniform", MOE_UNIFORM, {}, _PROMPT)[::3],
    *_cases("moe-k", "skewed", MOE_K_SKEWED, {}, _PROMPT)[::3],
    *_cases("moe-k-uniform", "uniform", MOE_K_UNIFORM, {}, _PROMPT)[::3],
    *_cases("relu", "relu", RELU, _RELU_SPEC, _PROMPT),
    *_cases("relu-q8", "relu", RELU_Q8, _RELU_SPEC, _PROMPT)[::3],
    *_cases("dense-q4", "dense", DENSE_Q4, _DENSE_SPEC, _DENSE_PROMPT),
    Case("dense-q4-draft-50", DENSE_Q4, 0.5, "copy", Targets(over_limit=1.8), _DRAFT),
    # all of it, repacked and with what the loader takes beside: nothing stays on flash
    Case("moe-fits", MOE_SKEWED, 2.5, targets=Targets(over_resident=0.98)),
)
# not a slice of its layers: what is needed whatever their number takes a smaller share of the cap
WHOLE = tuple(_cases("relu-whole", "relu", RELU_WHOLE, _RELU_SPEC | {"max_seconds": 60.0}, _PROMPT)[:1])
_WHOLE_SPEC: dict[Work, dict[str, Any]] = {
    "decode": {"max_seconds": 60.0},  # until slots are warm
    "prompt": _PROMPT | {"warm_prompts": 1},  # one passes by all weights
    "first": _FIRST,
}


def _whole_cases(name: str, model: BenchModel, decode: dict[int, Targets]) -> Iterator[Case]:
    """decode: by cap, in GiB."""
    targets = {"prompt": Targets(over_resident=0.85), "first": Targets(first_token=1.5, first_touch=True)}
    for gib, of_decode in decode.items():
        for work, spec in _WHOLE_SPEC.items():
            label, wanted = _label(name, work, f"{gib}gib"), targets.get(work, of_decode)
            yield Case(label, model, 0.0, work, wanted, spec, cap_bytes=gib << 30, beside_all=True)


# whole models of today, and caps of today's machines
FULL = tuple(_whole_cases("full", QWEN3_30B, {8: Targets(over_resident=0.9), 4: Targets(over_resident=0.75)}))
HUGE = tuple(_whole_cases("huge", GPT_OSS_120B, {16: Targets(over_limit=0.85), 8: Targets()}))
_REAL_TARGETS = Targets(over_naive=1.5, over_limit=0.85)
# an ubatch of an inflated model's neurons is large
_REAL_SPEC = {"n_ctx": 256, "n_ubatch": 32, "warm_up": 64, "tokens": 128}
# real routing and real text, beside the synthetic models' random ones
REAL = (
    *(
        Case(f"{name}-{share:.0%}".rstrip("%"), model, share, "text", _REAL_TARGETS, _REAL_SPEC)
        for name, model in (("moe-real", MOE_REAL), ("dense-real", DENSE_REAL))
        for share in (0.5, 0.25)
    ),
    Case("dense-real-draft-50", DENSE_REAL, 0.5, "text", Targets(over_limit=0.9), _REAL_SPEC | {"draft": 10}),
)
# an ubatch of 512 would take a cap's most
_INFLATED_SPEC: dict[Work, dict[str, Any]] = {
    "text": _REAL_SPEC,
    "prompt": _WHOLE_SPEC["prompt"] | {"n_ubatch": 64},
    "first": _FIRST | {"n_ubatch": 32},
}
_INFLATED_TARGETS: dict[Work, Targets] = {
    "text": _REAL_TARGETS,
    "prompt": Targets(over_resident=0.85),
    "first": Targets(first_token=1.5, first_touch=True),
}
# real routing at the size of a large machine's memory and of a small one's
INFLATED = tuple(
    Case(
        _label(f"inflated-{gb}gb", work, f"{share:.0%}".rstrip("%")),
        model,
        share,
        work,
        _INFLATED_TARGETS[work],
        spec,
        beside_all=True,
    )
    for gb, model in ((4, MOE_REAL), (16, MOE_REAL_16))
    for share in (0.5, 0.25)
    for work, spec in _INFLATED_SPEC.items()
)
CASES = (
    Case("moe-50-naive", MOE_SKEWED, 0.50, targets=Targets(over_naive=3.0, over_resident=0.35)),
    Case("moe-25-naive", MOE_SKEWED, 0.25, targets=Targets(over_naive=2.5)),
    Case("moe-uniform-50-naive", MOE_UNIFORM, 0.50, targets=Targets(over_naive=2.7)),
    Case("dense-50-naive", DENSE, 0.50, targets=Targets(over_naive=1.8, reads_at_most_the_rest=True), spec=_DENSE_SPEC),
)
MATRIX_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)
MATRIX = tuple(
    Case(f"matrix-{model.name}-{share:.0%}", model, share, spec=spec)
    for model, spec in ((MOE_SKEWED, {}), (MOE_UNIFORM, {}), (DENSE, _DENSE_SPEC))
    for share in MATRIX_SHARES
)
