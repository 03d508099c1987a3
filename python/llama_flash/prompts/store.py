"""The store of one context: finds prompts for its sequences, and keeps what they have computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..kept_files import cache_folder
from ..model.gguf import GgufMeta
from ..native import prompts as native
from ..native.prompts import PromptKind, Tokens
from ..observe.stats import PromptStats
from .folder import Folder
from .heads import BLOCK, SHORTEST, Head, beginnings_of, heads_of, rest_of
from .identity import identity_of, label_of
from .recalling import Recalling
from .saving import PIECE, Saving

__all__ = ["PromptStore", "default_folder", "open_store", "store_memory"]

logger = logging.getLogger("llama_flash")

_STATES = 8 * PIECE  # bytes of states without cells that wait to be written, of all sequences
_RECURRENT = (".ssm.", ".wkv.", ".shortconv.", ".kda.")  # keys of models with such states
_PAUSE = 60.0  # seconds after a write that failed
_LOOK_AFTER = 256 << 20  # bytes written until the folder is looked at again: others write to it, too


def default_folder() -> Path:
    """In the user's cache folder."""
    return cache_folder() / "prompts"


def store_memory(meta: GgufMeta) -> int:
    """Bytes that a store takes at most: pieces on their way in, the one on its way out, states that wait."""
    recurrent = any(key in name for name in meta.values for key in _RECURRENT)
    return (12 << 20) + 2 * PIECE + (_STATES if recurrent else 0)


def open_store(
    where: str | Path | bool, limit: int, meta: GgufMeta, context: Any, context_params: Any, predictor: str, io: str
) -> PromptStore | None:
    """The store in the folder `where` (True: the user's cache folder); None where it cannot be used, with a line.

    Args:
        limit: bytes that files may take.
        context: llama_context pointer; context_params: what it was made with.
        predictor: how active neurons are found.
        io: I/O engine.
    """
    try:
        kind = native.kind_of(context)
        if not kind.supported:
            logger.warning("prompt cache: off: the state of %s cannot be divided into blocks", meta.architecture)
            return None
        folder = Folder(default_folder() if where is True else Path(str(where)).expanduser())
        return PromptStore(folder, limit, kind, meta, context_params, predictor, io)
    except OSError as error:
        logger.warning("prompt cache: off: %s", error)
        return None


class PromptStore:
    """Not thread safe, but for Saving.write: calls belong to whoever may use the context."""

    def __init__(
        self,
        folder: Folder,
        limit: int,
        kind: PromptKind,
        meta: GgufMeta,
        context_params: Any,
        predictor: str,
        io_engine: str,
    ) -> None:
        self.folder, self.kind = folder, kind
        self._recalled = PromptStats(folder=str(folder.path))  # of those who use the context
        self._written, self._write_seconds = 0, 0.0  # of the thread that writes
        self._limit, self._meta, self._params = limit, meta, context_params
        self._predictor, self._io_engine, self._label = predictor, io_engine, label_of(meta)
        self._identities: dict[str, bytes] = {}  # by adapters
        self._most_states = _STATES // max(1, int(context_params.n_seq_max))  # of a sequence
        self._used: int | None = None  # bytes of all files; None: not looked at
        self._since_look = 0
        self._wait_until = 0.0
        self._said: set[str] = set()
        self._identity("")  # while the files are those that were loaded

    @property
    def stats(self) -> PromptStats:
        """Any thread may ask."""
        return replace(self._recalled, written=self._written, write_seconds=self._write_seconds)

    def find(self, tokens: Tokens, n_past: int, adapters: str = "") -> int:
        """Tokens of the prompt that the folder seems to hold, more than n_past; else 0."""
        self._recalled = replace(self._recalled, asked=self._recalled.asked + 1)
        return self._recalling(tokens, adapters).find(n_past) if self._most(tokens) > n_past else 0

    def recall(self, context: Any, seq: int, tokens: Tokens, n_past: int, adapters: str = "") -> int:
        """Reads the longest beginning of the prompt into the sequence, which has its first n_past tokens.

        Returns how many of them the sequence has then, n_past or more; fewer only where reads went wrong.
        """
        if self._most(tokens) <= n_past:
            return n_past
        began = time.monotonic()
        n = self._recalling(tokens, adapters).run(context, seq, n_past)
        now = self._recalled
        self._recalled = replace(
            now,
            found=now.found + (n > n_past),
            recalled=now.recalled + max(0, n - n_past),
            recall_seconds=now.recall_seconds + time.monotonic() - began,
        )
        return n

    def saving(self, seq: int, tokens: Tokens, states: Mapping[int, bytes], adapters: str = "") -> Saving | None:
        """What is to be done to keep the sequence's tokens; None: nothing, or it is not the time."""
        if len(tokens) < (SHORTEST if self.kind.has_rests else BLOCK) or time.monotonic() < self._wait_until:
            return None
        tokens = tokens.copy()
        return Saving(self.folder, self.kind, self._heads(tokens, self._identity(adapters)), seq, tokens, states)

    def write(self, saving: Saving) -> bool:
        """Writes the piece that `saving` has taken. False: it cannot be, and a line says why."""
        before, began = saving.written, time.monotonic()
        try:
            if self._used is None or self._since_look > _LOOK_AFTER or self._used > self._limit:
                self._used, self._since_look = self.folder.evict(self._limit, PIECE), 0
            saving.write()
        except OSError as error:
            self._wait_until = time.monotonic() + _PAUSE
            self._warn(f"{self.folder.path}: prompts are not kept: {error.strerror or error}")
            return False
        written = saving.written - before
        self._used += written
        self._since_look += written
        self._written += written
        self._write_seconds += time.monotonic() - began
        return True

    def snapshot(self, context: Any, seq: int, states: dict[int, bytes], n_tokens: int) -> None:
        """Keeps what the sequence has beside cells behind n_tokens tokens, until it is written."""
        if not self.kind.has_state or n_tokens % BLOCK or n_tokens in states:
            return
        if state := native.state_of(context, seq, n_tokens):
            states[n_tokens] = state
            while len(states) > 1 and sum(map(len, states.values())) > self._most_states:
                del states[sorted(states)[(len(states) - 1) // 2]]  # the ends are of more use than what is between

    def close(self) -> None:
        self.folder.close()

    def _heads(self, tokens: Tokens, identity: bytes) -> Iterator[Head]:
        """Of whole blocks, and of the rest behind them."""
        last = None
        for last in heads_of(identity, self._label, tokens):
            yield last
        if self.kind.has_rests and (rest := rest_of(identity, self._label, tokens, last)):
            yield rest

    def _recalling(self, tokens: Tokens, adapters: str) -> Recalling:
        tokens, identity = np.ascontiguousarray(tokens, np.int32), self._identity(adapters)
        heads = list(heads_of(identity, self._label, tokens[: len(tokens) - 1]))

        def rests(n: int) -> Iterator[Head]:
            upto = tokens[: min(len(tokens) - 1, (n + 1) * BLOCK - 1)]
            longest = rest_of(identity, self._label, upto, heads[n - 1] if n else None)
            if longest is not None and self.kind.has_rests:
                yield longest
                yield from beginnings_of(longest)

        return Recalling(self.folder, self.kind, heads, rests, tokens, self._io_engine, self._warn)

    def _most(self, tokens: Tokens) -> int:
        """Tokens of a prompt that can be read. The last one is computed, for its logits."""
        return len(tokens) - 1 if self.kind.has_rests else (len(tokens) - 1) // BLOCK * BLOCK

    def _identity(self, adapters: str) -> bytes:
        if adapters not in self._identities:
            self._identities[adapters] = identity_of(
                self._meta, self._params, self._predictor, adapters, self.kind, BLOCK
            )
        return self._identities[adapters]

    def _warn(self, line: str) -> None:
        """Each line once."""
        if line not in self._said:
            self._said.add(line)
            logger.warning("%s", line)
