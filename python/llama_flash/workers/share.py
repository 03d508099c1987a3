"""A worker's share of its process' memory: what the controller knows of it, and how it moves. In bytes."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from ..budget.controller import Controller, FlashEvent
from ..budget.rooms import Breakdown, Budget, refuse, reserve_of, resolve_budget
from ..model.shape import ContextShape
from ..native.handle import Session
from ..native.library import IO_ENGINES
from ..native.remote import Worker
from ..observe.stats import Counters, FlashStats
from ..options import FlashOffload
from ..planning.hot import Records
from ..planning.lent import Growth

__all__ = ["WorkerShare"]

logger = logging.getLogger("llama_flash")

_STEP = 0.0005  # seconds until reads that are in the way may have ended
_LONGEST = 1.0  # seconds; a prompt that finds a shorter ring is slower, not wrong
_IO_NAMES = {int(number): name for name, number in IO_ENGINES.items()}


class WorkerShare:
    """A controller.Session.

    Args:
        budget: of the process that computes and of the one that listens, together.
        door: of that, what the one that listens takes; 0 where a limit counts it.
        beside: what the process held before flash had any memory, without weights.
        hot: what was in slots when these layers were last used, of the version of the file that is bound.
    """

    def __init__(
        self,
        path: Path,
        options: FlashOffload,
        native: Session,
        worker: Worker,
        budget: Budget,
        door: int,
        beside: int,
        hot: Records,
    ) -> None:
        self._path, self._options, self._native, self._hot = path, options, native, hot
        self._worker, memory = worker, worker.memory()
        self.budget, self._door = budget, door
        self.memory = Breakdown(
            interpreter=beside, weights=memory.resident, compute=memory.buffers, reserve=budget.reserve
        )
        self.granted = self.least = self.most = 0
        self._moving = False
        self._shape: ContextShape | None = None
        self._growth: Growth | None = None
        self.decoding = False  # calls are of few tokens, as the client says
        self._n_computed = 0  # tokens

    def expect(self, kv: int, shape: ContextShape) -> None:
        """The client's context, of whose buffers so many bytes are KV cache: what of it may be lent."""
        kv = min(kv, self.memory.compute)
        self.memory = replace(self.memory, kv=kv, compute=self.memory.compute - kv)
        self._shape, self._growth = shape, Growth(self.memory, shape)

    def compute_few(self, few: bool) -> None:
        """Whether calls are of few tokens from now on. If not, what was lent has been given back when this returns."""
        if not self._options.follow or self._growth is None or few == self.decoding:
            return
        controller = Controller.of_process()
        with controller.locked():  # whose thread moves it, too
            self.decoding = few
            self._worker.expect(self._growth.most_touched if few else None)
            self._native.few_tokens(few)
            end = time.monotonic() + _LONGEST
            while not few and not self._native.resize(self.granted).done and time.monotonic() < end:
                time.sleep(_STEP)  # until its ring is there again
            self._note()
        if few:
            controller.look_soon()
        else:
            controller.recall()

    def compute_many(self) -> None:
        """The client is about to touch more than calls of few tokens do, whatever it has said, or further buffers."""
        try:
            if self._has_grown():
                logger.warning("the client has asked for further buffers: slots give back memory")
            elif self.decoding:
                said = "the client has said that its calls are of few tokens, and sends more: slots give back memory"
                logger.warning(said)
            self.compute_few(False)
            Controller.of_process().recall()
        except Exception:  # the thread computes for the client
            logger.exception("what was lent to slots could not be given back")

    def _has_grown(self) -> bool:
        """Whether there are more buffers than were known. From now on they are."""
        with Controller.of_process().locked():
            more = int(self._worker.memory().buffers) - self.memory.kv - self.memory.compute
            if more <= 0 or self._shape is None:
                return False
            self.memory = replace(self.memory, compute=self.memory.compute + more)
            self._growth = Growth(self.memory, self._shape)
        return True

    def computed(self, n_tokens: int) -> None:
        """So many more were."""
        self._n_computed += n_tokens
        if self._growth is not None:
            self._growth.add(n_tokens)

    def keep(self) -> None:
        """Remembers what is in slots, for the next client that has these layers computed here."""
        if self._n_computed:
            self._hot.store(self._native)

    def give(self, n_bytes: int) -> None:
        """The first memory. From then on it follows the limits.

        Raises FlashReadError: filling pinned panels failed.
        """
        self.most = self._native.requirements().max_memory
        self.granted = min(n_bytes, self.most)
        self._native.set_memory(self.granted)
        self.least = self._native.resize(self.granted).least
        self._note()
        if self._options.follow:
            Controller.of_process().join(self)

    def set_budget(self, dram_budget: int | str, model_bytes: int) -> None:
        """See FlashSession.set_budget.

        Raises:
            FlashBudgetError: it leaves too little; nothing has changed.
            ValueError: not a budget.
        """
        budget = resolve_budget(dram_budget, self._options.reserve, model_bytes=model_bytes)

        def check(needed: int) -> None:
            if budget.total - self._door - budget.reserve < needed:
                bare = replace(self.memory, slots=0, pinned=0, stream=0, bookkeeping=0, reserve=budget.reserve)
                raise refuse(budget, bare, self.least, self._options.reserve)

        asked = None if budget.asked is None else max(1, budget.asked - self._door)
        Controller.of_process().ask(self, asked, check)

    def _note(self) -> None:
        given = self._native.memory()
        self.memory = replace(
            self.memory, slots=given.slots, pinned=given.pinned, stream=given.stream, bookkeeping=given.bookkeeping
        )

    # what the controller asks

    @property
    def asked(self) -> int | None:
        return None if self.budget.asked is None else max(1, self.budget.asked - self._door)

    def reserve(self, total: int, rise: int | None = None) -> int:
        return reserve_of(total, self._options.reserve, rise)

    @property
    def fixed(self) -> int:
        return self.memory.weights + self.memory.kv + self.memory.compute

    @property
    def certain(self) -> int:
        return self.memory.weights

    def soon(self, now: float) -> int:
        if self._growth is None:
            return self.fixed
        if self.decoding:
            self._worker.expect(self._growth.most_touched)  # from now on
        return self._growth.soon(now)

    @property
    def interpreter(self) -> int:
        return self.memory.interpreter

    @property
    def touched(self) -> int:
        return int(self._native.stats().resident_bytes)

    def move(self, n_bytes: int, urgent: bool) -> bool:
        if n_bytes == self.granted and not self._moving:
            return True
        self.granted = n_bytes
        self._moving = not self._native.resize(n_bytes, urgent).done
        if not self._moving:
            self._note()
        return not self._moving

    def limited(self, total: int, reserve: int, beside: int, reason: str) -> None:
        self.budget = replace(self.budget, total=total + self._door, reserve=reserve, reason=reason)
        self.memory = replace(self.memory, reserve=reserve, interpreter=beside)

    def warm(self) -> bool:
        return self._hot.warm(self._native)

    def tell(self, event: FlashEvent) -> None:
        if event.kind == "short":
            logger.warning("%s leaves less than flash memory that cannot be given back", event.reason)

    def describe(self) -> dict[str, object]:
        raw = self._native.stats()
        counters = Counters.from_struct(raw)
        stats = FlashStats(
            mode="flash",
            predictor="none",
            io_engine=_IO_NAMES.get(raw.io_engine, "?"),
            budget=self.budget,
            memory=self.memory,
            slots_in_use=raw.resident_bytes,
            resident_weights=self.memory.weights,
            flash_weights=self.most,
            total=counters,
            decode=counters,
        )
        amounts = {"granted": self.granted, "least": self.least, "most": self.most}
        return {"path": str(self._path.resolve()), **amounts, **stats.as_dict()}
