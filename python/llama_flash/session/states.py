"""Methods of `llama_cpp.Llama` that cannot do without its workers: a load that fails, and copies of its state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["check_workers"]


def check_workers(cls: type) -> None:
    """Has a load that fails leave its workers, whoever keeps the error.

    Has `save_state` and `load_state` raise where a worker is lost: its part of the state would be zeros.
    """
    cls.__init__ = _left(cls.__init__)  # type: ignore[misc]
    for name in ("save_state", "load_state"):
        setattr(cls, name, _checked(getattr(cls, name)))


def _left(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as failure:
            if (flash := getattr(self, "_flash", None)) is not None:
                flash.leave_workers(failure)
            raise

    return init


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        flash = getattr(self, "_flash", None)
        if flash is None:
            return method(self, *args, **kwargs)
        flash.check_workers()
        result = method(self, *args, **kwargs)
        flash.check_workers()
        return result

    return checked
