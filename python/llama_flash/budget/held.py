"""What this process holds, with the memory that was granted to models and is not in use yet."""

from __future__ import annotations

import weakref
from typing import Protocol

from ..native.library import trim_heap
from .controller import Controller
from .rooms import held_by_process

__all__ = ["Granted", "granted", "held_by_all", "promised_by_all"]


class Granted(Protocol):
    """A model to which memory was granted."""

    def promised(self) -> int: ...  # bytes of that which it has not touched yet


granted: weakref.WeakSet[Granted] = weakref.WeakSet()  # all models of this process


def held_by_all(asking: Granted | None = None) -> int:
    """Bytes that this process holds before a model is loaded, with those that were granted to other models."""
    trim_heap()
    held = held_by_process()
    return held + promised_by_all(asking, held)


def promised_by_all(asking: Granted | None, held: int) -> int:
    """Bytes that are planned for or granted to models and not in use, without those of the model that asks.

    held: by the process, without what the model that asks has taken.
    """
    controller = Controller.of_process()
    with controller.locked():
        return controller.idle(held) + sum(model.promised() for model in list(granted) if model is not asking)
