"""How a model was used when it last ran: what its next plans expect where they would have to assume.

A few numbers per model in a small file of the user's cache folder, written when the model is closed. Nothing but plans
depends on it: one that is missing, damaged or of another version of the model is as good as none.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from ..budget.rooms import Breakdown
from ..kept_files import cache_folder, fingerprint, keep, name_for, read_kept, warm_start_wanted
from ..native.params import Requirements
from ..observe.history import Call
from ..observe.stats import Counters
from ..options import FlashOffload
from .misses import expert_slots, neurons_held, shared_of, skew_of
from .placed import Plan

__all__ = ["LEAST_TOKENS", "Usage", "later_half", "load", "observe", "save", "usage_of"]

logger = logging.getLogger("llama_flash")

LEAST_TOKENS = 24  # decoded one after the other, for means that are worth keeping

_VERSION = 1
_PAUSE = 3.0  # times the usual: between these two tokens the program waited for something else


@dataclass(frozen=True)
class Usage:
    """Of the last decoded tokens of a run, none of them with memory that moved."""

    tokens: int
    computing: float  # seconds of a token in which no read was waited for
    read: float = 0.0  # bytes of experts or neurons for a token; 0 where panels were read too
    waited: float = 0.0  # seconds of a token in which these were waited for
    skew: float | None = None  # of the routing, see misses.expert_misses; None: not seen
    shared: float | None = None  # see misses.neuron_misses
    active: float | None = None  # share of the neurons that a token activates
    acceptance: float | None = None  # share of the drafted tokens that were accepted
    predictor: str = "none"  # how active neurons were found; with another one all of this says nothing

    def __post_init__(self) -> None:
        told = [n for n in (self.skew, self.shared, self.active, self.acceptance) if n is not None]
        numbers = (self.tokens, self.computing, self.read, self.waited, *told)
        if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
            raise ValueError("numbers that are none")
        if not isinstance(self.predictor, str):
            raise ValueError("a predictor without a name")


def later_half(calls: Sequence[Call], sequences: int | None = None) -> tuple[Counters, float] | None:
    """Counters and seconds of the later half of the tokens that were decoded one after the other, when slots are warm.

    None: they are too few. calls: the oldest first; sequences: that had a token in each, None: any number.
    """
    steps = [
        (now.ended - before.ended, now) for before, now in pairwise(calls) if now.is_generation and before.is_generation
    ]
    if sequences is not None:
        steps = [(seconds, call) for seconds, call in steps if call.sequences == sequences]
    steps = steps[len(steps) // 2 :]
    if not steps:
        return None
    usual = median(seconds for seconds, _ in steps)
    steps = [(seconds, call) for seconds, call in steps if seconds <= _PAUSE * usual]
    if len(steps) < LEAST_TOKENS:
        return None
    return sum((call.counters for _, call in steps), Counters()), sum(seconds for seconds, _ in steps)


def observe(calls: Sequence[Call], plan: Plan, memory: Breakdown, needs: Requirements, predictor: str) -> Usage | None:
    """What can be learnt from the later half of the decoded tokens in `calls`; None: they are too few.

    Args:
        calls: the last ones, the oldest first, all with the memory as it is now.
        memory, needs: as in cost.expect.
    """
    half = later_half(calls, sequences=1)  # several in a pass share its time and its reads
    if half is None:
        return None
    seen, seconds = half
    found = Usage(
        tokens=seen.tokens,
        computing=max(0.0, seconds - seen.wait_seconds) / seen.tokens,
        predictor=predictor,
    )
    if not seen.panel_reads:  # their order is known, so that they are read ahead and the slower of two clocks counts
        found = replace(found, read=seen.bytes_per_token, waited=seen.wait_per_token)
    if seen.hit_rate is None:
        return found
    missed = 1 - seen.hit_rate
    if plan.expert_bytes:
        return replace(found, skew=skew_of(memory.slots / expert_slots(needs), missed))
    if not plan.n_neurons or not seen.neurons_active:
        return found
    active = seen.neurons_active / seen.tokens / plan.n_neurons
    shared = shared_of(active, neurons_held(plan, memory, needs), missed)
    return replace(found, shared=shared, active=active)


def save(files: Sequence[Path], usage: Usage) -> None:
    """Keeps it for the model of these files; what was not seen this time stays as it was seen before."""
    before = load(files)
    if before is not None:
        usage = replace(usage, skew=before.skew if usage.skew is None else usage.skew)
        usage = replace(usage, acceptance=before.acceptance if usage.acceptance is None else usage.acceptance)
        if usage.shared is None and usage.active is None and before.predictor == usage.predictor:
            usage = replace(usage, shared=before.shared, active=before.active)
    content = {"version": _VERSION, "fingerprint": fingerprint(files, ""), "usage": asdict(usage)}
    try:
        keep(_path(files[0]), json.dumps(content).encode())
    except OSError as error:
        logger.debug("how the model was used is not kept: %s", error)


def load(files: Sequence[Path]) -> Usage | None:
    """What is known of the model of these files."""
    try:
        content = json.loads(read_kept(_path(files[0])))
        if content["version"] != _VERSION or content["fingerprint"] != fingerprint(files, ""):
            return None
        return Usage(**content["usage"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.debug("how the model was used is ignored: %s", error)
        return None


def usage_of(files: Sequence[Path], options: FlashOffload) -> Usage | None:
    """What was kept of the model's last run, where options and environment allow to look."""
    return load(files) if options.warm_start and warm_start_wanted() else None


def _path(model: Path) -> Path:
    return cache_folder() / "usage" / name_for(model, "json")
