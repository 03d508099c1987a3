"""Drafts by a smaller model or a model's head, and from the text itself where that goes as it went before for long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..native.prompts import Tokens
from .model import ModelText
from .ngram import TextDraft

__all__ = ["MixedText"]

_LONG = 5  # kind of a match from which on the text is more often right than a small model


class MixedText:
    """Of one text: a drafter.Source. Kinds are those of the text, then those of the model."""

    assumed: Sequence[float] = (*TextDraft.assumed, *ModelText.assumed)

    def __init__(self, model: ModelText) -> None:
        self._text, self._model = TextDraft(), model
        self.name = model.name

    def follow(self, text: Tokens) -> int:
        self._text.follow(text)
        return self._model.follow(text)

    def guesses(self) -> Iterator[tuple[int, int]]:
        from_text = self._text.guesses()
        first = next(from_text, None)
        if first is not None and self._text.is_match(first[1]) and first[1] >= _LONG:
            yield first
            yield from from_text
        for token, kind in self._model.guesses():
            yield token, len(TextDraft.assumed) + kind

    def close(self) -> None:
        self._model.close()
