"""What pictures are made of: plain numbers of one model at one moment, which another process can draw."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..archives import open_archive, write_archive
from ..device.kept import recall
from ..device.profile import DeviceProfile
from .history import Call
from .residency import Residency, Reuse, Tensor
from .stats import Counters, FlashStats

__all__ = ["Snapshot", "take"]


@dataclass(frozen=True)
class Snapshot:
    """Of one model's flash offload. `llm.flash.snapshot()` returns it."""

    model: str  # the file's name
    mode: str  # as FlashStats.mode
    predictor: str  # as FlashStats.predictor
    budget: int  # bytes
    flash_memory: int  # bytes of it for slots, pins and rings
    calls: tuple[Call, ...]  # the last ones
    decoded_before: int  # tokens generated before those calls
    window: float | None  # as FlashSession.window
    picks_neurons: bool  # neurons are chosen for a token; else whole layers pass by, or there are none
    reuse: Reuse  # empty where nothing is on flash, or after close()
    residency: Residency | None  # None there
    profile: DeviceProfile | None  # as kept for the model's device; None if none is
    drafts: tuple[tuple[int, int], ...] = ()  # of the last passes that checked drafts: drafted tokens, accepted ones

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file for `load`, as a whole or not at all. Raises OSError."""
        head = {name: getattr(self, name) for name in _PLAIN}
        head["drafts"] = self.drafts
        head["profile"] = None if self.profile is None else self.profile.as_dict()
        head["tensors"] = None if self.residency is None else [asdict(tensor) for tensor in self.residency.tensors]
        nothing = np.zeros(0, np.uint8)
        write_archive(
            path,
            head=np.frombuffer(json.dumps(head).encode(), np.uint8),
            calls=np.array([_row(call) for call in self.calls], np.float64).reshape(len(self.calls), _COLUMNS),
            reuse=self.reuse,
            place=nothing if self.residency is None else self.residency.place,
            age=nothing if self.residency is None else self.residency.age,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """What `save` wrote. Raises OSError, or ValueError if it is something else."""
        with open_archive(path, "a snapshot") as file:
            head = json.loads(file["head"].tobytes())
            tensors = head.pop("tensors")
            profile = head.pop("profile")
            drafts = tuple((drafted, accepted) for drafted, accepted in head.pop("drafts", ()))
            residency = None
            if tensors is not None:
                residency = Residency(tuple(Tensor(**tensor) for tensor in tensors), file["place"], file["age"])
            return cls(
                **head,
                calls=tuple(_call(row) for row in file["calls"].tolist()),
                reuse=file["reuse"],
                residency=residency,
                profile=None if profile is None else DeviceProfile.from_dict(profile),
                drafts=drafts,
            )


_PLAIN = ("model", "mode", "predictor", "budget", "flash_memory", "decoded_before", "window", "picks_neurons")
_COUNTERS = fields(Counters)
_COLUMNS = 3 + len(_COUNTERS)  # of a call: when it began and ended, its counters, its sequences


def take(
    model: Path,
    stats: FlashStats,
    calls: Sequence[Call],
    *,
    window: float | None,
    picks_neurons: bool,
    reuse: Reuse,
    residency: Residency | None,
    drafts: Sequence[tuple[int, int]] = (),
) -> Snapshot:
    """Of a model as it is now. calls: the last ones, the oldest first; the others as in Snapshot."""
    try:
        profile = recall(model)
    except OSError:  # the file is gone
        profile = None
    return Snapshot(
        model=model.name,
        mode=stats.mode,
        predictor=stats.predictor,
        budget=stats.budget.total,
        flash_memory=stats.memory.flash,
        calls=tuple(calls),
        decoded_before=max(0, stats.decode.calls - sum(call.is_generation for call in calls)),
        window=window,
        picks_neurons=picks_neurons,
        reuse=reuse,
        residency=residency,
        profile=profile,
        drafts=tuple(drafts),
    )


def _row(call: Call) -> list[Any]:
    return [call.began, call.ended, *(getattr(call.counters, f.name) for f in _COUNTERS), call.sequences]


def _call(row: list[float]) -> Call:
    values: list[Any] = [
        value if f.type == "float" else int(value) for f, value in zip(_COUNTERS, row[2:], strict=False)
    ]
    sequences = int(row[2 + len(_COUNTERS)]) if len(row) == _COLUMNS else 1  # of older files: there was one
    return Call(row[0], row[1], Counters(*values), sequences)
