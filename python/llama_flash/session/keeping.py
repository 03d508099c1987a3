"""Methods of `llama_cpp.Llama` that find prompts in the store, and tell it what they compute."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any

__all__ = ["keep_prompts"]


def keep_prompts(cls: type) -> None:
    """Has `generate`, `eval`, `load_state` and `close` use the store, where there is one."""
    for name, wrap in {"generate": _recalled, "eval": _noted, "load_state": _forgotten, "close": _flushed}.items():
        setattr(cls, name, wrap(getattr(cls, name)))


def _keeper(llm: Any) -> Any:
    flash = getattr(llm, "_flash", None)
    return None if flash is None else flash.keeper_of(llm)


def _recalled(method: Callable[..., Generator[Any, Any, None]]) -> Callable[..., Generator[Any, Any, None]]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def generate(self: Any, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[Any, Any, None]:
        keeper = _keeper(self)
        if keeper is None:
            yield from method(self, tokens, *args, **kwargs)
            return
        tokens = list(tokens)
        asked = signature.bind(self, tokens, *args, **kwargs)
        if asked.arguments.get("reset", True) and (n := keeper.recall(self, tokens)):
            asked.arguments |= {"tokens": tokens[n:], "reset": False}
        try:
            yield from method(*asked.args, **asked.kwargs)
        finally:
            keeper.ended(self)

    return generate


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def evaluate(self: Any, tokens: Sequence[int]) -> Any:
        keeper = _keeper(self)
        if keeper is None:
            return method(self, tokens)
        for piece in keeper.pieces(self, list(tokens)):
            n_past = self.n_tokens
            method(self, piece)
            keeper.computed(self, n_past, piece)
        return None

    return evaluate


def _forgotten(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def load_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (keeper := _keeper(self)) is not None:
            keeper.forget()  # somebody else's state: what it was computed with is not known
        return method(self, *args, **kwargs)

    return load_state


def _flushed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def close(self: Any) -> Any:
        flash = getattr(self, "_flash", None)
        if flash is not None and flash.keeper is not None:
            flash.keeper.flush()
        return method(self)

    return close
