"""Drafts by a smaller model of the same vocabulary: its most likely tokens, one after the other.

It is in memory with all its weights: of each byte that it would leave on flash a read is saved for every drafted token,
of a byte of the large model for every pass only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import FlashError
from ..model.gguf import read_gguf
from ..model.load import load_model, new_context
from ..native.calls import context_memory
from ..native.prompts import Tokens
from ..planning.drafted import draft_batch

__all__ = ["ModelDraft", "ModelText", "check_vocabularies", "guessed", "in_common"]

_KINDS = 10  # by how likely the token is to the draft model
_ASSUMED = tuple((i + 0.5) / _KINDS for i in range(_KINDS))
_MORE = 128  # tokens by which two vocabularies may differ in length, as llama.cpp allows


class ModelDraft:
    """A draft model, for the texts of one large model.

    Args:
        path: GGUF file.
        n_ctx: tokens of the large model's context, of all texts together.
        n_threads: that compute.
        n_texts: that are drafted for at the same time.

    Raises:
        FlashFormatError, FlashError: see load_model, new_context.
    """

    def __init__(self, path: str | os.PathLike[str], n_ctx: int, n_threads: int, n_texts: int = 1) -> None:
        import llama_cpp

        self.path = os.fspath(path)
        self._model = self._context = 0
        self._engine: Any = llama_cpp
        params = llama_cpp.llama_model_default_params()
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
        self._model = load_model(self.path, params)
        try:
            self._make_context(n_ctx, n_threads, n_texts)
        except BaseException:
            self.close()
            raise
        self._held: dict[int, list[int]] = {}  # tokens in its KV cache, by text

    def _make_context(self, n_ctx: int, n_threads: int, n_texts: int) -> None:
        engine = self._engine
        context = engine.llama_context_default_params()
        n_batch = draft_batch(read_gguf(self.path), n_ctx)
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx, n_batch, n_batch
        context.n_threads = context.n_threads_batch = n_threads
        context.n_outputs_max = context.n_seq_max = n_texts
        context.flash_attn_type = engine.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = new_context(self.path, self._model, context)
        self._n_batch = int(context.n_batch)
        self._vocab = engine.llama_model_get_vocab(self._model)
        self._n_vocab = int(engine.llama_vocab_n_tokens(self._vocab))
        self._batch = engine.llama_batch_init(self._n_batch, 0, 1)
        self._memory = engine.llama_get_memory(self._context)
        sizes = context_memory(self._context)
        self.weights = int(sizes.model)  # bytes
        self.beside = (
            int(sizes.context + sizes.compute) + 4 * self._n_vocab * n_texts
        )  # bytes, touched when they are used

    @property
    def bytes(self) -> int:
        """That it takes, in all."""
        return self.weights + self.beside

    @property
    def vocab(self) -> Any:
        """llama_vocab pointer."""
        return self._vocab

    def source(self, text: int) -> ModelText:
        """Of the text with this number."""
        return ModelText("model", self, text)

    def follow(self, text: int, now: Tokens) -> int:
        """Computes what is new, so that the last token's logits are there. Returns how many tokens that were."""
        if not self._context:
            return 0
        tokens = now.tolist()
        held = self._held.setdefault(text, [])
        common = min(in_common(held, tokens), len(tokens) - 1)  # whose logits are wanted
        if common < len(held):
            self._engine.llama_memory_seq_rm(self._memory, text, common, -1)
            del held[common:]
        for begin in range(common, len(tokens), self._n_batch):
            self._decode(text, tokens[begin : begin + self._n_batch])
        return len(tokens) - common

    def guesses(self, text: int) -> Iterator[tuple[int, int]]:
        """The most likely token, then the one behind it, ... Its kind says how likely it was."""
        while self._context:
            token, kind = guessed(self._context, self._n_vocab)
            yield token, kind
            if self._context:
                self._decode(text, [token])

    def _decode(self, text: int, tokens: list[int]) -> None:
        batch, held = self._batch, self._held[text]
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = len(held) + i
            batch.seq_id[i][0] = text
            batch.n_seq_id[i] = 1
            batch.logits[i] = i == len(tokens) - 1
        code = self._engine.llama_decode(self._context, batch)
        if code != 0:
            self._engine.llama_memory_clear(self._memory, True)
            self._held.clear()  # of all texts
            raise FlashError(
                f"{self.path}: the draft model could not compute {len(tokens)} tokens (llama_decode: {code})"
            )
        held += tokens

    def close(self) -> None:
        """Frees the model, which then has no guesses. May be called twice."""
        model, self._model = self._model, 0
        context, self._context = self._context, 0
        if context:
            self._engine.llama_batch_free(self._batch)
            self._engine.llama_free(context)
        if model:
            self._engine.llama_model_free(model)


class Guesser(Protocol):
    """What guesses at several texts: a draft model, or a head."""

    def follow(self, text: int, now: Tokens) -> int: ...

    def guesses(self, text: int) -> Iterator[tuple[int, int]]: ...

    def close(self) -> None: ...


class ModelText:
    """One text of a guesser's: a drafter.Source."""

    assumed: Sequence[float] = _ASSUMED

    def __init__(self, name: str, guesser: Guesser, text: int) -> None:
        self.name = name
        self._guesser, self._text = guesser, text

    def follow(self, text: Tokens) -> int:
        return self._guesser.follow(self._text, text)

    def guesses(self) -> Iterator[tuple[int, int]]:
        return self._guesser.guesses(self._text)

    def close(self) -> None:
        self._guesser.close()


def in_common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def guessed(context: Any, n_vocab: int) -> tuple[int, int]:
    """The most likely token of a context's last logits, and its kind: how likely it is. context: llama_context."""
    import llama_cpp as engine

    logits = np.ctypeslib.as_array(engine.llama_get_logits_ith(context, -1), shape=(n_vocab,))
    token = int(logits.argmax())
    likely = 1.0 / float(np.exp(logits - logits[token]).sum())
    return token, min(_KINDS - 1, int(likely * _KINDS))


def check_vocabularies(draft: ModelDraft, vocab: Any, name: str) -> None:
    """Raises FlashError where the draft model's tokens are not those of the model `name`; vocab: llama_vocab of it."""
    import llama_cpp as engine

    said = f"{draft.path} cannot draft for {name}: "
    own, other = (int(engine.llama_vocab_n_tokens(which)) for which in (draft.vocab, vocab))
    if abs(own - other) > _MORE or engine.llama_vocab_type(draft.vocab) != engine.llama_vocab_type(vocab):
        raise FlashError(
            f"{said}its vocabulary has {own} tokens, the model's {other}. A draft model of the same family is needed"
        )
    text = engine.llama_vocab_get_text
    for token in range(min(own, other)):
        if text(draft.vocab, token) != text(vocab, token):
            raise FlashError(
                f"{said}token {token} is {_shown(text(draft.vocab, token))} in one and {_shown(text(vocab, token))} in "
                "the other. A draft model of the same family is needed"
            )


def _shown(text: Any) -> str:
    return repr(bytes(text).decode(errors="replace"))
