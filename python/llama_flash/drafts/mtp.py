"""Drafts by a model's own head of multi-token prediction (MTP): a layer behind its last one, of the same file.

The head guesses at the token after the next one from the next token and the state that the model's last layer had at
the one before it. It has a KV cache of its own: of each token that the model computes, the head computes what it has of
it, too, at the latest when a draft is made. Behind its first guess it goes on with its own state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FlashError
from ..model.load import new_context
from ..native.calls import context_memory
from ..native.prompts import Tokens
from ..planning.drafted import beside_mtp, mtp_params
from .model import ModelText, guessed, in_common

__all__ = ["MtpDraft"]

_RECENT = 32  # states that are kept: a text goes on behind one of the last tokens that were computed

_States = npt.NDArray[np.float32]


@dataclass
class _Text:
    """What the head knows of a text. Its tokens have positions from `begin` on."""

    begin: int = 0
    held: list[int] = field(default_factory=list)  # tokens in its KV cache
    waiting: list[int] = field(default_factory=list)  # that will be there, with the states before them
    states: list[_States] = field(default_factory=list)
    guessed: int = 0  # cells behind them: of guesses
    recent: _States | None = None  # of the model at the last tokens that it computed
    end: int = 0  # the position behind these
    ready: bool = False  # the logits behind the text are there

    @property
    def tokens(self) -> list[int]:
        return self.held + self.waiting

    def state(self, position: int) -> _States | None:
        """Of the model at a token."""
        if self.recent is None or not self.end - len(self.recent) <= position < self.end:
            return None
        state: _States = self.recent[position - self.end]
        return state

    def note(self, position: int, states: _States) -> None:
        self.recent = states[-_RECENT:].copy()
        self.end = position + len(states)


class MtpDraft:
    """The head of a loaded model, for the texts that this computes.

    Args:
        name: of the model's file, for messages.
        context: llama_context pointer of the model, whose graphs tell their last states from now on.
        params: llama_context_params of it.
        weights: bytes of the head.
        on_failure: raises what it knows of a computation that failed.

    Raises:
        FlashFormatError, FlashError: see new_context.
    """

    def __init__(
        self, name: str, context: Any, params: Any, weights: int, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        import llama_cpp
        from llama_cpp import llama_cpp_ext

        self.name, self.weights = name, weights
        self._engine: Any = llama_cpp
        self._ext: Any = llama_cpp_ext
        self._trunk, self._on_failure = context, on_failure
        model = llama_cpp.llama_get_model(context)
        own = mtp_params(params)
        self._n_batch, n_texts = int(own.n_batch), int(own.n_outputs_max)
        self._context = new_context(name, model, own)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self._n_embd = int(llama_cpp.llama_model_n_embd_out(model))
        self._rows = np.zeros((self._n_batch, self._n_embd), np.float32)
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)
        self._batch.embd = self._rows.ctypes.data_as(type(self._batch.embd))
        llama_cpp_ext.llama_set_embeddings_nextn(self._context, True, True)
        llama_cpp_ext.llama_set_embeddings_nextn(context, True, False)
        self._texts: dict[int, _Text] = {}
        self._n_computed = 0  # tokens
        self._worth = True  # it may compute what has no room to wait
        sizes = context_memory(self._context)
        self.beside = int(sizes.context + sizes.compute) + beside_mtp(params, self._n_vocab, self._n_embd, n_texts)

    @property
    def bytes(self) -> int:
        """That it takes, in all."""
        return self.weights + self.beside

    def source(self, text: int) -> ModelText:
        """Of the text with this number, which is that of its sequence in the model's context."""
        return ModelText("mtp", self, text)

    def computed(self, tokens: Tokens, positions: Tokens, sequences: Tokens, *, worth: bool = True) -> int:
        """The model has computed these tokens; those of a sequence follow each other. Behind a vector in place of a
        token (-1) a text begins anew. Returns how many tokens the head has computed.

        worth: whether it may compute any: a text for which there is no room otherwise begins anew.

        Raises:
            FlashReadError, FlashError: the head could not compute what waits.
        """
        if not self._context:
            return 0
        address = self._ext.llama_get_embeddings_nextn(self._trunk)
        if not address:
            return 0
        before, self._worth = self._n_computed, worth
        states = np.ctypeslib.as_array(address, (len(tokens), self._n_embd))
        for sequence in np.unique(sequences).tolist():
            of = np.flatnonzero(sequences == sequence)
            text = self._texts.setdefault(sequence, _Text())
            vectors = np.flatnonzero(tokens[of] < 0)
            if vectors.size:
                self._cut(sequence, text, text.begin)
                text.recent, of = None, of[vectors[-1] + 1 :]
            if of.size:
                self._add(sequence, text, tokens[of].tolist(), int(positions[of[0]]), states[of])
        return self._n_computed - before

    def _add(self, number: int, text: _Text, tokens: list[int], position: int, states: _States) -> None:
        known = text.tokens
        if not text.begin <= position <= text.begin + len(known):  # what is between was computed elsewhere
            self._cut(number, text, text.begin)
            text.begin, known = position, []
        same = in_common(known[position - text.begin :], tokens)
        self._cut(number, text, position + same)
        before = text.state(position - 1)
        for i in range(same, len(tokens)):
            self._append(number, text, tokens[i], states[i - 1] if i else before)
        text.note(position, states)

    def _append(self, number: int, text: _Text, token: int, state: _States | None) -> None:
        """state: of the model at the token before this one; None: there is none."""
        if len(text.waiting) == self._n_batch and self._worth:
            self._compute(number, text)
        elif len(text.waiting) == self._n_batch:
            position = text.begin + len(text.tokens)
            self._cut(number, text, text.begin)
            text.begin = position
        text.waiting.append(token)
        text.states.append(np.zeros(self._n_embd, np.float32) if state is None else state.copy())

    def _cut(self, number: int, text: _Text, position: int) -> None:
        """Forgets the text from a position on, and all guesses."""
        keep = max(0, position - text.begin)
        if keep < len(text.held) or text.guessed:
            keep_cells = min(keep, len(text.held))
            self._engine.llama_memory_seq_rm(self._memory, number, text.begin + keep_cells, -1)
            text.guessed = 0
        del text.waiting[max(0, keep - len(text.held)) :], text.states[max(0, keep - len(text.held)) :]
        del text.held[keep:]
        text.ready = False

    def follow(self, number: int, now: Tokens) -> int:
        """Computes what waits, and the text's last token. Returns how many tokens that were.

        Raises:
            FlashReadError, FlashError: see computed.
        """
        text = self._texts.setdefault(number, _Text())
        if not self._context:
            text.ready = False
            return 0
        last = len(now) - 1
        rest = now[text.begin :].tolist() if text.begin <= last else []
        end = text.begin + in_common(text.tokens, rest)
        state = text.state(last - 1)
        self._cut(number, text, min(end, last))
        if end < last or state is None:
            return 0  # the model has computed it elsewhere, or not yet
        n_waiting = len(text.waiting)
        self._compute(number, text)
        # alone: of several tokens, some graphs tell the states of all, others those of the tokens with logits
        self._decode(number, last, [int(now[last])], [state], last=True)
        text.held.append(int(now[last]))
        text.ready = True
        return n_waiting + 1

    def guesses(self, number: int) -> Iterator[tuple[int, int]]:
        """The most likely token, then the one behind it, ... Its kind says how likely it was."""
        text = self._texts[number]
        if not text.ready:
            return
        text.ready = False
        while True:
            token, kind = guessed(self._context, self._n_vocab)
            yield token, kind
            if not self._context:
                return
            state = np.ctypeslib.as_array(
                self._ext.llama_get_embeddings_nextn_ith(self._context, -1), (self._n_embd,)
            ).copy()
            self._decode(number, text.begin + len(text.held) + text.guessed, [token], [state], last=True)
            text.guessed += 1

    def _compute(self, number: int, text: _Text) -> None:
        """Computes what waits."""
        if text.waiting:
            self._decode(number, text.begin + len(text.held), text.waiting, text.states, last=False)
        text.held += text.waiting
        text.waiting, text.states = [], []

    def _decode(self, number: int, position: int, tokens: list[int], states: Sequence[_States], *, last: bool) -> None:
        """last: with the logits of the last one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, state) in enumerate(zip(tokens, states, strict=True)):
            self._rows[i] = state
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.seq_id[i][0] = number
            batch.n_seq_id[i] = 1
            batch.logits[i] = last and i == len(tokens) - 1
        code = self._engine.llama_decode(self._context, batch)
        if code != 0:
            self._engine.llama_memory_clear(self._memory, True)
            self._texts.clear()
            self._on_failure()
            raise FlashError(
                f"{self.name}: its head could not compute {len(tokens)} tokens for a draft (llama_decode: {code})"
            )
        self._n_computed += len(tokens)

    def close(self) -> None:
        """Frees its context, before the model is freed; it has no guesses then. May be called twice."""
        context, self._context = self._context, 0
        if context:
            self._batch.embd = None  # numpy's
            self._engine.llama_batch_free(self._batch)
            self._engine.llama_free(context)
