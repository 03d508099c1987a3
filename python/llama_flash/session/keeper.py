"""Keeps what one `llama_cpp.Llama` computes, and gives it back: the store's end at a Llama.

What is written is copied out of the context between two calls, while nobody has the turn, and written by a thread of
its own. It is the beginning of the text as this Llama has computed it, token by token: what came into the context in
another way (a saved state, a picture) is not kept, nor what follows it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..prompts.heads import BLOCK
from ..prompts.identity import adapter_text
from ..prompts.saving import Saving
from ..prompts.store import PromptStore

__all__ = ["PromptKeeper"]

_LOOK = 0.02  # seconds between two looks whether the turn is free


class PromptKeeper:
    """Of one Llama.

    Args:
        lora_path: adapter that is applied.
    """

    def __init__(self, store: PromptStore, llm: Any, lora_path: str | None) -> None:
        self._store, self._llm = store, weakref.ref(llm)
        self._adapters = adapter_text(lora_path, float(getattr(llm, "lora_scale", 1.0)))
        self._tokens = np.zeros(int(llm._n_ctx), np.int32)
        self._known = 0  # the first tokens of the context, which were computed here
        self._states: dict[int, bytes] = {}
        self._lock = threading.Lock()  # of the saving: a piece is taken and written by one thread
        self._saving: Saving | None = None
        self._next: Saving | None = None  # takes its place
        self._wake = threading.Event()
        self._ended = False
        self._thread: threading.Thread | None = None

    # calls of Llama, in its turn

    def recall(self, llm: Any, tokens: Sequence[int]) -> int:
        """Before a prompt is computed: its beginning from the store, if that has more of it than the context.

        Returns how many tokens the context has then and go without being computed; 0: as if there were no store.
        """
        wanted = np.asarray(tokens, np.int32)
        n_past = self._in_context(llm, wanted)
        if not self._store.find(wanted, n_past, self._adapters):
            # what can not be taken back can still be gone on with
            return n_past if self._store.kind.has_state and n_past < len(wanted) else 0
        llm.flash.before_state()
        n = self._store.recall(llm._ctx.ctx, 0, wanted, n_past, self._adapters)
        llm.input_ids[:n] = wanted[:n]
        llm.n_tokens, llm._requires_eval = n, True
        self._tokens[:n] = wanted[:n]
        self._known = n
        self._drop_states(n)
        return n

    def _in_context(self, llm: Any, wanted: Any) -> int:
        n = min(len(wanted), int(llm.n_tokens))
        differ = np.nonzero(llm.input_ids[:n] != wanted[:n])[0]
        n = int(differ[0]) if len(differ) else n
        if self._store.kind.has_state and not n == llm.n_tokens == self._known:
            return 0  # nothing of it can be taken back
        return n

    def pieces(self, llm: Any, tokens: list[int]) -> Iterator[list[int]]:
        """Tokens as they are computed at once: where a state without cells is to be kept, up to the end of a block."""
        n_past, end = int(llm.n_tokens), int(llm.n_tokens) + len(tokens)
        at = n_past
        if self._store.kind.has_state and len(tokens) > 1:
            step = max(BLOCK, llm.n_batch // BLOCK * BLOCK)
            places = {*range(-(-n_past // step) * step, end, step), end // BLOCK * BLOCK}
            for place in sorted(place for place in places if n_past < place < end):
                yield tokens[at - n_past : place - n_past]
                at = place
        yield tokens[at - n_past :]

    def computed(self, llm: Any, n_past: int, tokens: Sequence[int]) -> None:
        """The context has computed these tokens behind the first n_past."""
        if n_past <= self._known:
            self._known = n_past + len(tokens)
            self._tokens[n_past : self._known] = tokens
            self._drop_states(n_past)
            self._store.snapshot(llm._ctx.ctx, 0, self._states, self._known)

    def forget(self) -> None:
        """What the context has from now on was not computed here."""
        self._known = 0
        self._states.clear()

    def ended(self, llm: Any) -> None:
        """A text has ended: what is new of it is written when nobody has the turn."""
        known = min(self._known, int(llm.n_tokens))
        saving = self._store.saving(0, self._tokens[:known], dict(self._states), self._adapters)
        if saving is None or self._ended:
            return
        self._next = saving
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="llama-flash-prompts", daemon=True)
            self._thread.start()
        self._wake.set()

    # the thread that writes

    def _work(self) -> None:
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            more: bool | None = True
            while more is not False and not self._ended and (llm := self._llm()) is not None:
                more = self._step(llm) if llm._turn.is_free else None
                del llm  # or it would live as long as this waits
                if more is None:
                    time.sleep(_LOOK)
            if self._llm() is None:
                return

    def _step(self, llm: Any, only_idle: bool = True) -> bool | None:
        """Writes a piece. False: there is nothing to write; None: somebody has the turn, or writes."""
        with llm._turn.beside() as idle:
            if (only_idle and not idle) or not self._lock.acquire(blocking=False):
                return None
            try:
                saving = self._take(llm)
            except BaseException:
                self._lock.release()
                raise
        try:
            if saving is not None and not self._store.write(saving):
                self._replace(None)
                return False
            return saving is not None
        finally:
            self._lock.release()

    def _take(self, llm: Any) -> Saving | None:
        """What a piece was taken of; None: there is nothing to be kept, or it is not there any more."""
        if self._next is not None:
            latest, self._next = self._next, None
            self._replace(latest)
        saving = self._saving
        if saving is None:
            return None
        n = len(saving.tokens)
        same = self._known >= n and np.array_equal(self._tokens[:n], saving.tokens)
        if same and saving.take(llm._ctx.ctx):
            return saving
        self._replace(None)
        return None

    def _replace(self, saving: Saving | None) -> None:
        if self._saving is not None:
            self._saving.close()
        self._saving = saving

    def flush(self) -> None:
        """Writes what is left, now. For the end of the Llama."""
        llm = self._llm()
        if llm is None or self._ended or llm._turn.forked:
            return
        while (more := self._step(llm, only_idle=False)) is not False:
            if more is None:
                time.sleep(_LOOK)

    def stop(self) -> None:
        """Nothing is written any more. May be called twice."""
        self._ended = True
        self._wake.set()
        with self._lock:
            self._replace(None)

    def _drop_states(self, n_tokens: int) -> None:
        for n in [n for n in self._states if n > n_tokens]:
            del self._states[n]
