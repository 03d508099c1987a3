"""Prompts that llama-server computes, kept on flash and given back: the store's end at the server.

All of it runs in the thread of the server's main loop, between two calls of the engine, but for the writes, which have
a thread of their own. While others get answers, a piece is written only now and then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..errors import FlashError
from ..native import prompts as native
from ..native.prompts import Tokens
from ..prompts.heads import BLOCK
from ..prompts.identity import adapter_text
from ..prompts.saving import Saving
from ..prompts.store import PromptStore
from ..session.session import FlashSession

__all__ = ["ServerPrompts"]

logger = logging.getLogger("llama_flash")

_SHARE = 0.01  # of the time in which others get answers
_NAP = 0.0005  # seconds until a write may have ended
_LEAST_GAIN = 32  # tokens: for fewer, another sequence is not copied

# what a sequence holds: time and number of its tokens
_Mark = tuple[int, int]


class ServerPrompts:
    """Of one server; a native.server.Prompts. Nothing is kept until `begin`."""

    block = BLOCK

    def __init__(self) -> None:
        self._store: PromptStore | None = None
        self._before_state: Callable[[], None] = lambda: None
        self._states: dict[int, dict[int, bytes]] = {}  # by sequence
        self._savings: dict[int, tuple[_Mark, Saving]] = {}
        self._done: dict[int, _Mark] = {}  # nothing is left to be kept of these
        self._writer = ThreadPoolExecutor(1, "llama-flash-prompts")
        self._writing: tuple[int, Future[tuple[bool, float]]] | None = None
        self._busy_until = 0.0
        self._adapters: dict[str, str] = {"": ""}  # what is known of the files, by what the server says of them

    def begin(self, session: FlashSession) -> None:
        """The model is loaded."""
        self._store, self._before_state = session.prompts, session.before_state

    def recall(
        self, context: int, seq: int, tokens: Tokens, n_past: int, other: int, n_other: int, adapters: str
    ) -> int:
        """Tokens of the prompt that the sequence has, after what another one or the store has was added."""
        if self._store is None:
            return n_past
        self._leave(seq)
        states = self._states.setdefault(seq, {})
        for n in [n for n in states if n > n_past]:
            del states[n]
        n_other = min(n_other, len(tokens) - 1) if other >= 0 else 0
        adapters = self._marked(adapters)
        found = self._store.find(tokens, n_past, adapters)
        if n_other >= max(found, n_past + _LEAST_GAIN):
            self._before_state()
            try:
                native.copy(context, other, seq, n_past, n_other, tokens)
                return n_other
            except native.NotThere as error:
                logger.debug("%s", error)
            except FlashError as error:  # what the sequence had may be gone
                logger.warning("a prompt was not copied: %s", error)
                native.clear(context, seq)
                n_past = 0
        if found > n_past:
            self._before_state()
            return self._store.recall(context, seq, tokens, n_past, adapters)
        return n_past

    def keep(
        self, context: int, seq: int, tokens: Callable[[], Tokens], n: int, stamp: int, idle: bool, adapters: str
    ) -> bool:
        """Writes a piece of what the sequence has computed, if it is the time; whether there is more to do.

        Args:
            tokens: of the sequence, n of them.
            stamp: another one for other tokens; -1 while they are being computed.
            idle: nobody gets an answer.
        """
        if self._store is None:
            return False
        if stamp < 0:
            if n % BLOCK == 0:
                self._store.snapshot(context, seq, self._states.setdefault(seq, {}), n)
            return False
        mark = (stamp, n)
        if self._done.get(seq) == mark:
            return False
        if not self._may_write(idle):
            return idle
        saving = self._saving_of(seq, mark, tokens, adapters)
        if saving is None or not np.array_equal(tokens()[: len(saving.tokens)], saving.tokens):
            self._done[seq] = mark
            self._leave(seq)
            return False
        began = time.monotonic()
        if not saving.take(context):
            self._done[seq] = mark
            self._leave(seq)
            return False
        self._writing = seq, self._writer.submit(self._write, saving, time.monotonic() - began)
        return idle

    def _write(self, saving: Saving, taken: float) -> tuple[bool, float]:
        """In the writer's thread: whether it was written, and the seconds that it cost, those of taking it included."""
        assert self._store is not None
        began = time.monotonic()
        return self._store.write(saving), taken + time.monotonic() - began

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.shutdown()
        for seq in list(self._savings):
            self._leave(seq)
        if self._store is not None:
            self._store.close()

    def _may_write(self, idle: bool) -> bool:
        """Whether a piece may be taken now; the result of the last one is looked at."""
        if self._writing is not None:
            seq, result = self._writing
            if idle and not result.done():
                time.sleep(_NAP)
            if not result.done():
                return False
            self._writing = None
            written, seconds = result.result()
            self._busy_until = time.monotonic() + seconds / _SHARE
            if not written and seq in self._savings:
                self._done[seq] = self._savings[seq][0]
                self._leave(seq)
        return idle or time.monotonic() >= self._busy_until

    def _saving_of(self, seq: int, mark: _Mark, tokens: Callable[[], Tokens], adapters: str) -> Saving | None:
        if seq in self._savings and self._savings[seq][0] == mark:
            return self._savings[seq][1]
        self._leave(seq)
        assert self._store is not None
        saving = self._store.saving(seq, tokens(), dict(self._states.get(seq, {})), self._marked(adapters))
        if saving is not None:
            self._savings[seq] = mark, saving
        return saving

    def _leave(self, seq: int) -> None:
        if self._writing is not None and self._writing[0] == seq:
            self._writing[1].exception()  # waits for it
            self._writing = None
        if seq in self._savings:
            self._savings.pop(seq)[1].close()

    def _marked(self, adapters: str) -> str:
        """Lines of path and scale, with marks of the files."""
        if adapters not in self._adapters:
            lines = [line.rpartition(":") for line in adapters.splitlines()]
            self._adapters[adapters] = "\n".join(adapter_text(path, float(scale)) for path, _, scale in lines)
        return self._adapters[adapters]
