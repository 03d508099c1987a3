"""budget/controller.py under the name that users import."""

from .budget.controller import Callback, Controller, EventKind, FlashEvent

__all__ = ["Callback", "Controller", "EventKind", "FlashEvent"]
