"""One model's share of the process' memory: what was granted, where it goes, and how the controller moves it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import replace
from typing import Any

from ..budget.controller import Callback, Controller, FlashEvent
from ..budget.held import granted
from ..budget.rooms import Breakdown, Budget, refuse, reserve_of, resolve_budget
from ..errors import FlashError
from ..model.shape import ContextShape
from ..native.caches import AtOnce
from ..native.calls import discard_compute
from ..native.handle import Session
from ..native.params import Requirements
from ..options import FlashOffload
from ..planning.lent import FEW_TOKENS, Growth, few_tokens
from ..sizes import format_size
from .account import Account
from .memento import Memento

__all__ = ["Share"]

logger = logging.getLogger("llama_flash")

_STEP = 0.0005  # seconds until reads that are in the way may have ended
_LONGEST = 1.0  # seconds; a prompt that finds a shorter ring is slower, not wrong
_MOVED = 0.05  # share of the memory that must have moved, for what was seen before not to count


class Share:
    """What the controller knows of a model: a controller.Session. Sizes in bytes.

    `budget` and `memory` say where the budget of the process goes, from the first estimates on; what can be moved is
    there with the first `give`.
    """

    def __init__(self, path: str, options: FlashOffload, account: Account) -> None:
        self.path, self._options, self._account = path, options, account
        self.budget: Budget
        self.memory = Breakdown()
        self.native: Session | None = None
        self.memento: Memento | None = None
        self.neuron_slots = 0
        self.settled = 0.0  # when memory was moved last, by time.monotonic()
        self._settled_bytes = 0  # of slots and pinned since
        self._beside = 0  # of this model beside flash and interpreter
        self._growth: Growth
        self._decoding = False
        self._few = FEW_TOKENS
        self._context: Any = None
        self._granted = self._least = self._most = 0  # flash memory: on the way to, at least, at most
        self._moving = self._urgent = self._short = False
        self._callbacks: list[Callback] = []

    def adopt(self, native: Session) -> None:
        """The session that the memory is of; freed by `close`."""
        self.native = native
        granted.add(self)

    def close(self) -> None:
        """Frees the session and its memory, if there is one."""
        native, self.native = self.native, None
        granted.discard(self)
        if native is not None:
            native.close()

    def give(self, n_bytes: int, needs: Requirements, context: Any, shape: ContextShape) -> None:
        """The first memory, of `n_bytes` that there are for it: as much of them as is of use.

        Args:
            context: llama_context pointer; shape: of it.

        Raises:
            FlashReadError: filling pinned panels failed.
        """
        assert self.native is not None
        self._context, self._growth = context, Growth(self.memory, shape, AtOnce.of(context))
        self._few = few_tokens(shape.n_sequences)
        self._beside = self.memory.fixed - self.memory.interpreter
        self._granted, self._most = min(n_bytes, needs.max_memory), needs.max_memory
        self.native.set_memory(self._granted)
        self._least = self.native.resize(self._granted).least
        self.note_memory()

    def before_call(self, n_tokens: int) -> None:
        """Before the engine computes so many tokens: what only prompts need is lent to flash while there are few."""
        if n_tokens <= self._few:
            if not self._decoding and self._options.follow and self.native is not None:
                discard_compute(self._context)
                self._compute_few(True)
        elif self._decoding:
            self._decoding = False
            self._compute_few(False)
            Controller.of_process().recall()

    def after_call(self, n_tokens: int) -> None:
        """After it: what so few tokens take of the graph buffers has been touched."""
        if self.native is None or not self._options.follow:
            return
        self._growth.add(n_tokens)
        if n_tokens <= self._few and not self._decoding:
            self._decoding = True
            Controller.of_process().look_soon()

    def _compute_few(self, few: bool) -> None:
        """Whether calls are of few tokens from now on. The ops that follow make more slots; a prompt finds its ring."""
        native = self.native
        if native is None:
            return
        with native.using() as is_open:
            if is_open:
                native.few_tokens(few)
                end = time.monotonic() + _LONGEST
                while not few and not native.resize(native.memory().total).done and time.monotonic() < end:
                    time.sleep(_STEP)
                self.note_memory()

    def note_memory(self) -> None:
        """Enters what the plugin has made of the memory into `memory`."""
        assert self.native is not None
        given = self.native.memory()
        before = self.memory
        self.memory = replace(
            before,
            slots=given.slots,
            pinned=given.pinned,
            stream=given.stream,
            bookkeeping=given.bookkeeping,
            weights=self._beside - before.beside_weights + given.resident,
        )
        self.neuron_slots = given.n_neuron_slots
        held = given.slots + given.pinned
        if abs(held - self._settled_bytes) > _MOVED * held:
            self.settled, self._settled_bytes = time.monotonic(), held

    @property
    def told(self) -> Breakdown:
        """`memory`, of which less than nothing is left for the interpreter where parts of a model are lent to flash:
        these parts are told as they are in use."""
        memory = self.memory
        lent = {}
        missing = -memory.interpreter
        for part in ("compute", "kv", "outputs"):
            if missing > 0:
                lent[part] = max(0, getattr(memory, part) - missing)
                missing -= getattr(memory, part) - lent[part]
        return replace(memory, interpreter=0, **lent) if lent else memory

    def set_budget(self, dram_budget: int | str, model_bytes: int) -> None:
        """See FlashSession.set_budget."""
        replace(self._options, dram_budget=dram_budget)  # checks it
        if self.native is None or not self._options.follow:
            raise FlashError("there is no flash memory to be moved: everything is resident, or follow=False")
        budget = resolve_budget(dram_budget, self._options.reserve, model_bytes=model_bytes)

        def check(needed: int) -> None:
            if budget.total - budget.reserve < needed:
                rest = needed - self._least - self._beside
                bare = replace(self.memory, interpreter=rest, slots=0, pinned=0, bookkeeping=0, reserve=budget.reserve)
                bare = replace(bare, weights=bare.weights - self._kept())
                raise refuse(budget, bare, self._least, self._options.reserve)

        Controller.of_process().ask(self, budget.asked, check)

    def on_event(self, callback: Callback) -> None:
        self._callbacks.append(callback)

    def promised(self) -> int:
        """Granted, and not touched yet."""
        native = self.native
        if native is None:
            return 0
        with native.using() as is_open:
            touched = int(native.stats().resident_bytes) - self._kept() if is_open else 0
            return max(0, self.memory.flash - touched) if is_open else 0

    def _kept(self) -> int:
        """Resident parts that count as weights and are part of the flash memory."""
        return self.memory.weights + self.memory.beside_weights - self._beside

    # what the controller asks

    @property
    def asked(self) -> int | None:
        return self.budget.asked

    def reserve(self, total: int, rise: int | None = None) -> int:
        return reserve_of(total, self._options.reserve, rise)

    @property
    def fixed(self) -> int:
        return self._beside

    @property
    def certain(self) -> int:
        return self._beside - self.memory.beside_weights

    @property
    def decoding(self) -> bool:
        return self._decoding

    def soon(self, now: float) -> int:
        return self._growth.soon(now)

    @property
    def interpreter(self) -> int:
        return self.memory.interpreter

    @property
    def granted(self) -> int:
        return self._granted

    @property
    def least(self) -> int:
        return self._least

    @property
    def most(self) -> int:
        return self._most

    @property
    def touched(self) -> int:
        native = self.native
        if native is None:
            return 0
        with native.using() as is_open:
            return int(native.stats().resident_bytes) if is_open else 0

    def move(self, n_bytes: int, urgent: bool) -> bool:
        native = self.native
        if native is None:
            return True
        with native.using() as is_open:
            if not is_open or (n_bytes == self._granted and not self._moving):
                return True
            # what has begun in a hurry ends in a hurry
            self._urgent = urgent or (self._urgent and self._moving and n_bytes == self._granted)
            self._granted = n_bytes
            done = bool(native.resize(n_bytes, self._urgent).done)
            self._moving = not done
            if done:
                self.note_memory()
            return done

    def limited(self, total: int, reserve: int, beside: int, reason: str) -> None:
        self.budget = replace(self.budget, total=total, reserve=reserve, reason=reason)
        self.memory = replace(self.memory, reserve=reserve, interpreter=beside)

    def warm(self) -> bool:
        native, memento = self.native, self.memento
        if native is None or memento is None:
            return False
        with native.using() as is_open:
            return is_open and memento.hot.warm(native)

    def tell(self, event: FlashEvent) -> None:
        if event.kind == "short":
            if self._short:
                return  # once is enough
            logger.warning(
                "%s: %s leaves less than the %s of flash memory that cannot be given back while the model is loaded",
                os.path.basename(self.path),
                event.reason,
                format_size(event.after),
            )
        self._short = event.kind == "short" or (self._short and event.kind != "grow")
        for callback in list(self._callbacks):
            try:
                callback(event)
            except Exception:
                logger.exception("a callback of on_event failed")

    def describe(self) -> dict[str, object]:
        flash = {"granted": self._granted, "least": self._least, "most": self._most}
        native = self.native
        with contextlib.nullcontext() if native is None else native.using():
            stats = self._account.stats(self.budget, self.told, native)
        return {"path": os.path.abspath(self.path), **flash, **stats.as_dict()}
