"""What a model leaves for its next load: the records that were hot, and how experts and neurons were used."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np

from ..budget.rooms import Breakdown
from ..kept_files import fingerprint, warm_start_wanted
from ..model.gguf import GgufMeta
from ..native.handle import Session
from ..observe.history import History
from ..options import FlashOffload
from ..planning import usage
from ..planning.placed import Plan
from . import hot

__all__ = ["Memento"]

_AT_ONCE = 4096  # records that are asked for in one step


class Memento:
    """Of one model. Nothing is kept or read where the options or the environment say no."""

    def __init__(self, meta: GgufMeta, options: FlashOffload, plan: Plan) -> None:
        self._meta, self._options, self._plan = meta, options, plan
        self._mark = ""
        self.left: hot.Ids | None = None  # to be read in the background; None: not yet looked for

    @property
    def _wanted(self) -> bool:
        return self._options.warm_start and warm_start_wanted()

    def note_files(self) -> None:
        """Which version of the model's files was loaded."""
        with contextlib.suppress(OSError):  # the file is gone already
            self._mark = self._fingerprint()

    def warm(self, native: Session) -> bool:
        """Reads a few of the records that were hot when the model was last used; False: nothing is left to read."""
        if not self._wanted:
            return False
        if self.left is None:
            self.left = hot.load(self._meta.files[0], self._mark)
        if not len(self.left):
            return False
        done = native.warm(self.left[:_AT_ONCE])
        self.left = self.left[done:]
        return len(self.left) > 0

    def store_hot(self, native: Session) -> None:
        """Remembers what is in slots."""
        if not self._wanted or not len(ids := native.hot()):
            return
        with contextlib.suppress(OSError):  # the model is gone
            hot.save(self._meta.files[0], self._mark or self._fingerprint(), np.asarray(ids))

    def store_usage(
        self,
        native: Session,
        history: History,
        since: float,
        memory: Breakdown,
        predictor: str,
        acceptance: float | None = None,
    ) -> None:
        """Remembers how experts and neurons were used, for plans.

        Args:
            since: when memory was moved last, as calls began.
            acceptance: share of the drafted tokens that were accepted.
        """
        if not self._wanted:
            return
        calls = [call for call in history.calls() if call.began > since]
        with contextlib.suppress(OSError):  # the model is gone
            seen = usage.observe(calls, self._plan, memory, native.requirements(), predictor)
            if seen is None and acceptance is not None:
                seen = usage.load(self._meta.files)
            if seen is not None:
                usage.save(self._meta.files, replace(seen, acceptance=acceptance))

    def _fingerprint(self) -> str:
        """Of the files, and of what numbers the records."""
        names, panel_bytes = [t.name for t in self._plan.tensors], self._options.panel_bytes
        return fingerprint(self._meta.files, f"{names} {panel_bytes} {self._plan.n_neurons}")
