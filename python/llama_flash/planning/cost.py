"""What decoding a token costs: bytes and reads from flash, and the two clocks that run beside each other.

The model of "LLM in a flash", sections 2 and 3, for one token at a time and a cache that is warm; or for a token of
each of several sequences in one pass, which reads once what they need together. The formulas and what they assume are
written down in docs/explanation/cost-of-a-token.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ..budget.rooms import Breakdown
from ..device.profile import DeviceProfile
from ..model.gguf import GgufMeta
from ..model.mtp import mtp_head, without_mtp
from ..native.params import Requirements
from .misses import (
    SHARED_TOKENS,
    USUAL_SKEW,
    expert_misses,
    expert_slots,
    experts_together,
    neuron_misses,
    neurons_held,
    neurons_together,
)
from .placed import Plan
from .placement import expert_bytes
from .usage import Usage

__all__ = ["ASSUMED_ACTIVE", "Cost", "Traffic", "expect"]

ASSUMED_OPEN = 0.4  # share of the gates of a routed expert
ASSUMED_ACTIVE = 0.10  # share of the neurons, where the file does not say

_SECTOR = 4096
_ALIGNMENT = 32  # of tensors in a GGUF file, so that a record begins anywhere in a sector
_MARGIN = _SECTOR - _ALIGNMENT  # bytes of whole sectors beyond a record's own, on average over where it begins
_PIECE = 1 << 20  # bytes of a read, at most
_LIKELY = (
    1.3  # experts of the next layer that are not there, as its router is expected to choose, for one that is missed
)
_WRONG = 0.2  # share of the experts read ahead that are not used, see docs/measurements/2026-11-21-lookahead.md
_RUN = 256  # neurons read at once where whole layers are
# of the first token's computing: a further one's in the same pass, see the page above
_FURTHER = 0.6  # with weights of its own, in part: experts, neurons
_FURTHER_SHARED = 0.25  # with the same weights, which are read from memory once for all tokens


@dataclass(frozen=True)
class Traffic:
    """Records of one kind that a pass reads from flash, on average."""

    kind: Literal["experts", "panels", "neurons", "rows"]
    bytes: float
    reads: float
    at_once: float  # reads that are asked for together
    hit_rate: float  # share of the records' bytes that is found in memory
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Of a pass. Reading and computing overlap: it takes as long as the slower of the two, or longer if known."""

    traffic: tuple[Traffic, ...]
    touched: float  # bytes of weights that a pass computes with
    compute_seconds: float  # at least to read those from DRAM; if a run was measured, as it was
    assumptions: tuple[str, ...]
    waited_seconds: float = 0.0  # of io_seconds, that computing did not hide in a run that was measured
    usual: Cost | None = None  # if the routing, even here, is as most mixtures show; None: it is known, or no matter
    tokens: int = 1  # of a pass, each of another sequence

    @property
    def bytes_per_token(self) -> float:
        return sum(part.bytes for part in self.traffic) / self.tokens

    @property
    def reads_per_token(self) -> float:
        return sum(part.reads for part in self.traffic) / self.tokens

    @property
    def io_seconds(self) -> float:
        return sum(part.seconds for part in self.traffic)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.tokens / max(self.io_seconds, self.compute_seconds + self.waited_seconds, 1e-9)

    @property
    def bound_by(self) -> Literal["flash", "DRAM"]:
        return "flash" if self.io_seconds > self.compute_seconds else "DRAM"

    @property
    def tokens_per_second_range(self) -> tuple[float, float]:
        """The least and the most to expect: the same where nothing is left open."""
        return self.tokens_per_second, (self.usual or self).tokens_per_second

    @property
    def bytes_per_token_range(self) -> tuple[float, float]:
        """The least and the most to expect: the same where nothing is left open."""
        return (self.usual or self).bytes_per_token, self.bytes_per_token

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("bytes_per_token", "reads_per_token", "io_seconds", "tokens_per_second", "bound_by")
        ranges = ("tokens_per_second_range", "bytes_per_token_range")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["traffic"] = [asdict(part) for part in self.traffic]
        values["usual"] = self.usual.as_dict() if self.usual else None
        return {**values, **{name: getattr(self, name) for name in (*names, *ranges)}}


def expect(
    meta: GgufMeta,
    plan: Plan,
    memory: Breakdown,
    needs: Requirements | None,
    profile: DeviceProfile,
    *,
    predictor: str = "none",
    window: int | None = None,
    io_depth: int = 32,
    lookahead: int = 0,
    usage: Usage | None = None,
    tokens: int = 1,
    awake: float = 1.0,
) -> Cost:
    """Expected cost of a pass; a range (`usual`) where experts are read and their routing was never seen.

    Args:
        memory: how the budget is divided; slots, pinned and stream are used, in bytes.
        needs: of the plan's flash tensors; None where nothing is on flash.
        predictor: how active neurons are found.
        window: as in FlashOffload.
        lookahead: most experts of the next layer that are read ahead.
        usage: of the model's last run, in place of assumptions; what was seen with another predictor says nothing.
        tokens: of a pass, each of another sequence.
        awake: share of the time in which a CPU quota lets the threads run.
    """
    if usage and usage.predictor != predictor:
        usage = None
    skew = usage.skew if usage else None
    load = _Load(meta, plan, memory, needs, predictor, window, io_depth, lookahead, usage, skew, tokens)
    cost = _expect(load, profile, awake)
    if skew is None and any(part.kind == "experts" for part in cost.traffic):
        return replace(cost, usual=_expect(replace(load, skew=USUAL_SKEW), profile, awake))
    return cost


def _expect(load: _Load, profile: DeviceProfile, awake: float) -> Cost:
    """One figure: by the skew that `load` has, else by even routing."""
    plan, usage = load.plan, load.usage
    n = load.tokens
    said = "one token" if n == 1 else f"{n} tokens of different texts"
    assumptions = [f"{said} at a time, slots warm, an empty KV cache"]
    parts: list[Traffic] = []
    if plan.mode == "flash":
        if plan.bundles:
            parts += _neurons(load, profile, assumptions)
        parts += _panels(load, profile)
        for name in plan.tables:  # each is waited for before the next is asked for
            table = load.meta.tensors[name]
            parts.append(_records("rows", n, table.size / table.shape[1], n, load.io_depth, profile, 0.0))
        parts += _experts(load, profile, assumptions)
    parts = [part for part in parts if part.reads > 0]
    touched = _touched(load)
    dram = profile.dram * awake
    compute, waited = _touched(replace(load, tokens=1)) / dram, 0.0
    if usage and plan.mode == "flash":
        compute = max(compute, usage.computing)
    further = _further(load)
    longer = 1 + further * (n - 1)
    if usage and plan.mode == "flash":
        waited = _waited([part for part in parts if part.kind != "panels"], usage, longer)
        assumptions.append(f"computing and waiting as in the last run, of {usage.tokens} tokens")
    if n > 1:
        assumptions.append(f"each further token of a pass computes for {further:.0%} of the first one's time")
    if awake < 1:
        assumptions.append(f"a CPU quota lets the threads run for {awake:.0%} of the time")
    compute = max(compute * longer, touched / dram)
    return Cost(tuple(parts), touched, compute, tuple(assumptions), waited, tokens=n)


def _further(load: _Load) -> float:
    """Of the first token's computing: that of each further one in the same pass."""
    one = replace(load, tokens=1)
    own = 0.0  # of what a token computes with: what it does not share with all others
    if load.plan.bundles and load.plan.mode == "flash":
        own += _neurons_touched(load.meta, load.plan, load.flash, load.predictor, 1)
    own += expert_bytes(load.meta) * _routed_share(one)
    share = min(1.0, own / max(_touched(one), 1.0))
    return _FURTHER * share + _FURTHER_SHARED * (1 - share)


@dataclass(frozen=True)
class _Load:
    """A model as it would be loaded; see expect."""

    meta: GgufMeta
    plan: Plan
    memory: Breakdown
    needs: Requirements | None
    predictor: str
    window: int | None
    io_depth: int
    lookahead: int
    usage: Usage | None
    skew: float | None  # of the routing; None: even
    tokens: int = 1  # of a pass

    @property
    def flash(self) -> Requirements:
        """What the flash tensors need: there are some."""
        assert self.needs is not None
        return self.needs


def _waited(parts: list[Traffic], usage: Usage, longer: float) -> float:
    """Seconds in which experts and neurons are waited for: computing hides as much of their reading as before.

    longer: how many times as long it goes on.
    """
    n_bytes, seconds = sum(part.bytes for part in parts), sum(part.seconds for part in parts)
    if not usage.read or not n_bytes:
        return 0.0
    hidden = max(0.0, usage.read * seconds / n_bytes - usage.waited) * longer
    return max(0.0, seconds - hidden)


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


def _panels(load: _Load, profile: DeviceProfile) -> Iterator[Traffic]:
    plan, memory = load.plan, load.memory
    if not plan.panel_bytes or not load.flash.n_panels:
        return
    pinned = min(plan.panel_bytes, memory.pinned)
    size = load.flash.panel_bytes / load.flash.n_panels
    streamed = load.flash.n_panels * (1 - pinned / plan.panel_bytes)
    share = pinned / plan.panel_bytes
    yield _records("panels", streamed, size, memory.stream / _PIECE, load.io_depth, profile, share)


def _experts(load: _Load, profile: DeviceProfile, assumptions: list[str]) -> Iterator[Traffic]:
    meta, plan = load.meta, load.plan
    if not plan.expert_bytes or not load.flash.n_experts:
        return
    n_used, n_expert = meta.number("expert_used_count"), max(1, meta.number("expert_count"))
    n_records = load.flash.n_experts
    size = load.flash.expert_bytes / n_records
    held = min(1.0, load.memory.slots / expert_slots(load.flash))
    used = n_records * n_used / n_expert
    layers = len({tensor.layer for tensor in plan.tensors if len(tensor.shape) == 3})
    share, skew = n_used / n_expert, load.skew or 0.0
    missed = expert_misses(held, skew) * experts_together(load.tokens, share, held, skew)
    of_all = experts_together(load.tokens, share, 0.0, skew)
    together = used * missed / max(1, layers) * max(1.0, size / _PIECE)
    in_vain = n_records / n_expert * min(load.lookahead, n_used * missed * _LIKELY) * _WRONG
    found = 1 - missed / of_all
    yield _records("experts", used * missed + in_vain, size, together, load.io_depth, profile, found)
    if held < 1 and load.skew is None:
        assumptions.append("experts are used evenly, or as most mixtures use them (the faster figure)")
    elif held < 1 and load.usage and load.usage.skew is not None:
        assumptions.append("experts are used as in the last run")
    elif held < 1:
        assumptions.append("experts are used as most mixtures use them")


def _neurons(load: _Load, profile: DeviceProfile, assumptions: list[str]) -> Iterator[Traffic]:
    meta, plan, memory, needs, predictor = load.meta, load.plan, load.memory, load.flash, load.predictor
    assert plan.bundles is not None
    n_layers = len(plan.bundles.layers)
    if predictor == "off" and not plan.bundles.n_expert_used:
        held = min(1.0, memory.pinned / plan.neuron_bytes) if not plan.panel_bytes else 0.0
        runs = plan.n_neurons / _RUN * (1 - held)
        size = _RUN * plan.neuron_bytes / plan.n_neurons
        yield _records("neurons", runs, size, memory.stream / _PIECE, load.io_depth, profile, held)
        return
    if memory.pinned >= plan.neuron_bytes:
        return  # everything fits
    active, said = _active_share(meta, plan, predictor)
    shared, usage = SHARED_TOKENS, load.usage
    if usage and usage.active and usage.shared:
        active, shared = usage.active, usage.shared
        assumptions.append("neurons are used as in the last run; those read ahead in vain are not counted")
    else:
        if not said:
            assumptions.append(f"{active:.0%} of the neurons are active: the file does not say")
        assumptions.append("tokens share neurons as in the shipped OPT model; those read ahead in vain are not counted")
    held = neurons_held(plan, memory, needs)
    missed = neuron_misses(active, held, load.window, shared)
    kept = held if load.window is None else min(held, active * load.window)
    missed *= neurons_together(load.tokens, active, kept, shared)
    of_all = neurons_together(load.tokens, active, 0.0, shared)
    # neurons to read, and reads of them: a read goes on over one record that is not wanted to reach one that is
    share = active * missed
    wanted = plan.n_neurons * share
    reads = wanted * (1 - share) ** 2
    covered = wanted * (1 + share * (1 - share))
    form = plan.bundles.format
    streams = len(form.parts) - (predictor == "exact") if form.split else 1
    size = covered * needs.neuron_record / max(reads, 1e-9) / streams
    found = 1 - missed / of_all
    yield _records("neurons", reads * streams, size, reads * streams / n_layers, load.io_depth, profile, found)


def _touched(load: _Load) -> float:
    """Bytes of weights that a pass computes with."""
    meta, plan = load.meta, load.plan
    routed = _routed_share(load)
    touched = _resident_touched(meta, plan, routed)
    if plan.mode != "flash":
        return touched
    if plan.bundles:
        touched += _neurons_touched(meta, plan, load.flash, load.predictor, load.tokens)
    if plan.panel_bytes and load.flash.n_panels:
        touched += plan.panel_bytes
    if plan.expert_bytes and load.flash.n_experts:
        touched += plan.expert_bytes * routed
    return touched


def _routed_share(load: _Load) -> float:
    """Of the experts: those that a pass computes with."""
    used = load.meta.number("expert_used_count") / max(1, load.meta.number("expert_count"))
    return used * experts_together(load.tokens, used, 0.0, load.skew or 0.0)


def _neurons_touched(meta: GgufMeta, plan: Plan, needs: Requirements, predictor: str, tokens: int) -> float:
    assert plan.bundles is not None
    if predictor == "off" and not plan.bundles.n_expert_used:
        return float(plan.neuron_bytes)
    active, _ = _active_share(meta, plan, predictor)
    active = min(1.0, active * neurons_together(tokens, active, 0.0))
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


def _resident_touched(meta: GgufMeta, plan: Plan, routed: float) -> float:
    """Bytes of resident weights that a pass computes with: one row of the embedding, and the experts it uses."""
    head, meta = mtp_head(meta), without_mtp(meta)  # which no pass computes
    touched = float(plan.resident_bytes) - (head.bytes if head else 0)
    if "output.weight" in meta.tensors:
        tables = (t for t in meta.tensors.values() if t.name not in plan.tables)
        touched -= sum(t.size for t in tables if re.fullmatch(r"(token|position)_embd\.weight", t.name))
    if plan.mode != "flash" or not plan.expert_bytes:
        experts = expert_bytes(meta)
        touched -= experts * (1 - routed) if experts else 0.0
    return max(touched, 0.0)
