"""What decoding a token costs: bytes and reads from flash, and the two clocks that run beside each other.

The model of "LLM in a flash", sections 2 and 3, for one token at a time and a cache that is warm. The formulas and what
they assume are written down in docs/explanation/cost-of-a-token.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .budget import Breakdown
from .device_profile import DeviceProfile
from .gguf_meta import GgufMeta
from .placement import Plan, expert_bytes

if TYPE_CHECKING:
    from .usage import Usage

__all__ = [
    "ASSUMED_ACTIVE",
    "Cost",
    "Traffic",
    "expect",
    "expert_misses",
    "expert_slots",
    "neuron_misses",
    "neurons_held",
    "shared_of",
    "skew_of",
]

ASSUMED_OPEN = 0.4  # share of the gates of a routed expert
ASSUMED_ACTIVE = 0.10  # share of the neurons, where the file does not say

_SECTOR = 4096
_ALIGNMENT = 32  # of tensors in a GGUF file, so that a record begins anywhere in a sector
_MARGIN = _SECTOR - _ALIGNMENT  # bytes of whole sectors beyond a record's own, on average over where it begins
_PIECE = 1 << 20  # bytes of a read, at most
_SHARED_TOKENS = 3  # see neuron_misses
_LIKELY = (
    1.3  # experts of the next layer that are not there, as its router is expected to choose, for one that is missed
)
_WRONG = 0.2  # share of the experts read ahead that are not used, see docs/measurements/2026-11-21-lookahead.md
_RUN = 256  # neurons read at once where whole layers are
_MOST_SKEW = 20.0
_SHARED_RANGE = (0.1, 100.0)


@dataclass(frozen=True)
class Traffic:
    """Records of one kind that a token reads from flash, on average."""

    kind: Literal["experts", "panels", "neurons", "rows"]
    bytes: float
    reads: float
    at_once: float  # reads that are asked for together
    hit_rate: float  # share of the records' bytes that is found in memory
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Of a token. Reading and computing overlap: a token takes as long as the slower of the two, or longer if known."""

    traffic: tuple[Traffic, ...]
    touched: float  # bytes of weights that a token computes with
    compute_seconds: float  # at least to read those from DRAM; if a run was measured, as it was
    assumptions: tuple[str, ...]
    waited_seconds: float = 0.0  # of io_seconds, that computing did not hide in a run that was measured

    @property
    def bytes_per_token(self) -> float:
        return sum(part.bytes for part in self.traffic)

    @property
    def reads_per_token(self) -> float:
        return sum(part.reads for part in self.traffic)

    @property
    def io_seconds(self) -> float:
        return sum(part.seconds for part in self.traffic)

    @property
    def tokens_per_second(self) -> float:
        return 1 / max(self.io_seconds, self.compute_seconds + self.waited_seconds, 1e-9)

    @property
    def bound_by(self) -> Literal["flash", "DRAM"]:
        return "flash" if self.io_seconds > self.compute_seconds else "DRAM"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("bytes_per_token", "reads_per_token", "io_seconds", "tokens_per_second", "bound_by")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def expect(
    meta: GgufMeta,
    plan: Plan,
    memory: Breakdown,
    needs: Any,
    profile: DeviceProfile,
    *,
    predictor: str = "none",
    window: int | None = None,
    io_depth: int = 32,
    lookahead: int = 0,
    usage: Usage | None = None,
) -> Cost:
    """Expected cost of a token.

    Args:
        memory: how the budget is divided; slots, pinned and stream are used, in bytes.
        needs: `struct llama_flash_requirements` of the plan's flash tensors; ignored where nothing is on flash.
        predictor: how active neurons are found.
        window: as in FlashOffload.
        lookahead: most experts of the next layer that are read ahead.
        usage: of the model's last run, in place of assumptions; what was seen with another predictor says nothing.
    """
    if usage and usage.predictor != predictor:
        usage = None
    assumptions = ["one token at a time, slots warm, an empty KV cache"]
    touched = _resident_touched(meta, plan)
    parts: list[Traffic] = []
    if plan.mode == "flash":
        n_used, n_expert = meta.number("expert_used_count"), max(1, meta.number("expert_count"))
        if plan.bundles:
            parts += _neurons(meta, plan, memory, needs, profile, predictor, window, io_depth, assumptions, usage)
            touched += _neurons_touched(meta, plan, needs, predictor)
        if plan.panel_bytes and needs.n_panels:
            pinned = min(plan.panel_bytes, memory.pinned)
            size = needs.panel_bytes / needs.n_panels
            streamed = needs.n_panels * (1 - pinned / plan.panel_bytes)
            parts.append(
                _records("panels", streamed, size, memory.stream / _PIECE, io_depth, profile, pinned / plan.panel_bytes)
            )
            touched += plan.panel_bytes
        for name in plan.tables:  # each is waited for before the next is asked for
            table = meta.tensors[name]
            parts.append(_records("rows", 1, table.size / table.shape[1], 1, io_depth, profile, 0.0))
        if plan.expert_bytes and needs.n_experts:
            size = needs.expert_bytes / needs.n_experts
            held = min(1.0, memory.slots / expert_slots(needs))
            used = needs.n_experts * n_used / n_expert
            layers = len({tensor.layer for tensor in plan.tensors if len(tensor.shape) == 3})
            skew = usage.skew if usage else None
            missed = expert_misses(held, skew or 0.0)
            together = used * missed / max(1, layers) * max(1.0, size / _PIECE)
            in_vain = needs.n_experts / n_expert * min(lookahead, n_used * missed * _LIKELY) * _WRONG
            parts.append(_records("experts", used * missed + in_vain, size, together, io_depth, profile, 1 - missed))
            touched += plan.expert_bytes * n_used / n_expert
            if held < 1 and skew is None:
                assumptions.append("experts are used evenly: most models read less")
            elif held < 1:
                assumptions.append("experts are used as in the last run")
    parts = [part for part in parts if part.reads > 0]
    compute, waited = touched / profile.dram, 0.0
    if usage and plan.mode == "flash":
        compute = max(compute, usage.computing)
        waited = _waited([part for part in parts if part.kind != "panels"], usage)
        assumptions.append(f"computing and waiting as in the last run, of {usage.tokens} tokens")
    return Cost(tuple(parts), touched, compute, tuple(assumptions), waited)


def _waited(parts: list[Traffic], usage: Usage) -> float:
    """Seconds in which experts and neurons are waited for: computing hides as much of their reading as before."""
    n_bytes, seconds = sum(part.bytes for part in parts), sum(part.seconds for part in parts)
    if not usage.read or not n_bytes:
        return 0.0
    hidden = max(0.0, usage.read * seconds / n_bytes - usage.waited)
    return max(0.0, seconds - hidden)


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


def expert_slots(needs: Any) -> int:
    """Bytes of slots that hold all experts: a slot takes whole sectors."""
    return int(needs.expert_bytes + _SECTOR * needs.n_experts)


def neurons_held(plan: Plan, memory: Breakdown, needs: Any) -> float:
    """Share of all neurons that slots hold. Those of experts' bundles have what the experts leave: nothing."""
    slots = 0 if plan.expert_bytes else memory.slots
    return float(min(1.0, slots / needs.neuron_record / plan.n_neurons))


def neuron_misses(
    active: float, held: float, window: int | None = None, shared: float = float(_SHARED_TOKENS)
) -> float:
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


def _records(
    kind: Literal["experts", "panels", "neurons", "rows"],
    n: float,
    size: float,
    at_once: float,
    io_depth: int,
    profile: DeviceProfile,
    hit_rate: float,
) -> Traffic:
    """n records of `size` bytes, each read in whole sectors and in pieces of at most 1 MiB."""
    span = size + _MARGIN
    pieces = max(1.0, -(-span // _PIECE))
    depth = max(1.0, min(at_once, io_depth))
    return Traffic(kind, n * span, n * pieces, at_once, hit_rate, n * span / profile.rate(span / pieces, depth))


def _neurons(
    meta: GgufMeta,
    plan: Plan,
    memory: Breakdown,
    needs: Any,
    profile: DeviceProfile,
    predictor: str,
    window: int | None,
    io_depth: int,
    assumptions: list[str],
    usage: Usage | None,
) -> Iterator[Traffic]:
    assert plan.bundles is not None
    n_layers = len(plan.bundles.layers)
    if predictor == "off" and not plan.bundles.n_expert_used:
        held = min(1.0, memory.pinned / plan.neuron_bytes) if not plan.panel_bytes else 0.0
        runs = plan.n_neurons / _RUN * (1 - held)
        size = _RUN * plan.neuron_bytes / plan.n_neurons
        yield _records("neurons", runs, size, memory.stream / _PIECE, io_depth, profile, held)
        return
    if memory.pinned >= plan.neuron_bytes:
        return  # everything fits
    active, said = _active_share(meta, plan, predictor)
    shared = float(_SHARED_TOKENS)
    if usage and usage.active and usage.shared:
        active, shared = usage.active, usage.shared
        assumptions.append("neurons are used as in the last run; those read ahead in vain are not counted")
    else:
        if not said:
            assumptions.append(f"{active:.0%} of the neurons are active: the file does not say")
        assumptions.append("tokens share neurons as in the shipped OPT model; those read ahead in vain are not counted")
    missed = neuron_misses(active, neurons_held(plan, memory, needs), window, shared)
    # neurons to read, and reads of them: a read goes on over one record that is not wanted to reach one that is
    share = active * missed
    wanted = plan.n_neurons * share
    reads = wanted * (1 - share) ** 2
    covered = wanted * (1 + share * (1 - share))
    form = plan.bundles.format
    streams = len(form.parts) - (predictor == "exact") if form.split else 1
    size = covered * needs.neuron_record / max(reads, 1e-9) / streams
    yield _records("neurons", reads * streams, size, reads * streams / n_layers, io_depth, profile, 1 - missed)


def _neurons_touched(meta: GgufMeta, plan: Plan, needs: Any, predictor: str) -> float:
    assert plan.bundles is not None
    if predictor == "off" and not plan.bundles.n_expert_used:
        return float(plan.neuron_bytes)
    active, _ = _active_share(meta, plan, predictor)
    resident = float(needs.neuron_resident)
    return resident + active * (plan.neuron_bytes - resident)


def _active_share(meta: GgufMeta, plan: Plan, predictor: str) -> tuple[float, bool]:
    """Share of the neurons that a token activates (by predictors: that are predicted), and whether the file says so."""
    assert plan.bundles is not None
    if plan.bundles.n_expert_used:  # the same for all neurons of an expert; how many gates open, no file says
        routed = plan.bundles.n_expert_used / max(layer.n_expert for layer in plan.bundles.layers)
        return routed * (ASSUMED_OPEN if predictor == "exact" else 1.0), predictor != "exact"
    key = "flash.predictor." + ("predicted_share" if predictor == "lowrank" else "active_share")
    shares = meta.values.get(key)
    if not isinstance(shares, list):
        return ASSUMED_ACTIVE, False
    total = 0.0
    for layer in plan.bundles.layers:
        share = shares[layer.layer] if layer.layer < len(shares) else None
        if not isinstance(share, float) or not 0 <= share <= 1:
            return ASSUMED_ACTIVE, False
        total += share * layer.n_neurons
    return total / plan.n_neurons, True


def _resident_touched(meta: GgufMeta, plan: Plan) -> float:
    """Bytes of resident weights that a token computes with: one row of the embedding, and the experts it uses."""
    touched = float(plan.resident_bytes)
    if "output.weight" in meta.tensors:
        tables = (t for t in meta.tensors.values() if t.name not in plan.tables)
        touched -= sum(t.size for t in tables if re.fullmatch(r"(token|position)_embd\.weight", t.name))
    if plan.mode != "flash" or not plan.expert_bytes:
        experts = expert_bytes(meta)
        unused = 1 - meta.number("expert_used_count") / max(1, meta.number("expert_count"))
        touched -= experts * unused if experts else 0.0
    return max(touched, 0.0)
