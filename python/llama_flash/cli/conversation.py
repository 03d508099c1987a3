"""What was said, and how the model is asked for the next answer."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

__all__ = ["Conversation"]

_PLAIN_TOKENS = 128  # of an answer of a model without a chat template, which need not come to an end


class Conversation:
    """Questions and answers, in the chat template of the model.

    A model without one is not asked but continued: all that was said is one text.
    """

    def __init__(self, llm: Any, *, system: str | None, n_tokens: int, temperature: float, seed: int) -> None:
        """llm: a `llama_cpp.Llama`. n_tokens: of an answer, most; 0: until the model ends it."""
        self.llm = llm
        self.system = system
        self.templated = "tokenizer.chat_template" in llm.metadata
        self.exchanges: list[tuple[str, str]] = []
        self.forgotten = 0  # exchanges that the context had no room for
        self._n_tokens = n_tokens
        self._sampling = {"temperature": temperature, "seed": seed}

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. It belongs to the conversation as far as it was taken.

        Raises:
            ValueError: the question alone is longer than the context.
            FlashReadError: a read failed; the question is not part of the conversation.
        """
        pieces: list[str] = []
        try:
            while True:
                try:
                    for piece in self._pieces(question):
                        pieces.append(piece)
                        yield piece
                    break
                except ValueError as error:  # of Llama.create_completion, before anything is computed
                    if "exceed context window" not in str(error):
                        raise
                    if not self.exchanges:
                        raise ValueError(
                            f"this is longer than the context of {self.llm.n_ctx()} tokens; --n-ctx makes it larger"
                        ) from None
                    del self.exchanges[0]
                    self.forgotten += 1
        except (GeneratorExit, KeyboardInterrupt):
            self.exchanges.append((question, "".join(pieces)))
            raise
        self.exchanges.append((question, "".join(pieces)))

    def clear(self) -> None:
        """Forgets what was said, not the system text."""
        self.exchanges.clear()

    def _pieces(self, question: str) -> Iterator[str]:
        if self.templated:
            limit = self._n_tokens or None
            for chunk in self.llm.create_chat_completion(
                self._messages(question), max_tokens=limit, stream=True, **self._sampling
            ):
                if piece := chunk["choices"][0]["delta"].get("content"):
                    yield piece
        else:
            limit = self._n_tokens or _PLAIN_TOKENS
            for chunk in self.llm.create_completion(
                self._text(question), max_tokens=limit, stream=True, **self._sampling
            ):
                if piece := chunk["choices"][0]["text"]:
                    yield piece

    def _messages(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [
            {"role": role, "content": text}
            for exchange in self.exchanges
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        return [*system, *said, {"role": "user", "content": question}]

    def _text(self, question: str) -> str:
        said = [question + answer for question, answer in self.exchanges]
        return "\n".join([*([self.system] if self.system else []), *said, question])
