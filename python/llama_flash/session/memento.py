"""What a model leaves for its next load: the records that were hot, and how experts and neurons were used."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from ..budget.rooms import Breakdown
from ..model.gguf import GgufMeta
from ..native.handle import Session
from ..observe.history import History
from ..options import FlashOffload
from ..planning import usage
from ..planning.hot import Records
from ..planning.placed import Plan

__all__ = ["Memento"]


class Memento:
    """Of one model. Nothing is kept or read where the options or the environment say no."""

    def __init__(self, meta: GgufMeta, options: FlashOffload, plan: Plan) -> None:
        self._meta, self._plan = meta, plan
        names = [t.name for t in plan.tensors]
        self.hot = Records(meta.files, options, f"{names} {options.panel_bytes} {plan.n_neurons}")

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
        if not self.hot.wanted:
            return
        calls = [call for call in history.calls() if call.began > since]
        with contextlib.suppress(OSError):  # the model is gone
            seen = usage.observe(calls, self._plan, memory, native.requirements(), predictor)
            if seen is None and acceptance is not None:
                seen = usage.load(self._meta.files)
            if seen is not None:
                usage.save(self._meta.files, replace(seen, acceptance=acceptance))
