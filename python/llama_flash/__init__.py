"""llama_flash: weights of a llama.cpp model that stay in the GGUF file.

Importing this package is cheap: the engine (llama_cpp) is only loaded when it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .budget.capped import CapResult, run_capped
from .budget.controller import Controller, FlashEvent
from .errors import (
    FlashBudgetError,
    FlashCapError,
    FlashCpuError,
    FlashError,
    FlashFormatError,
    FlashReadError,
    FlashWorkerError,
)
from .options import FlashOffload

if TYPE_CHECKING:
    from .batch.many import Completion, Completions, complete_many
    from .device.kept import profile
    from .device.profile import DeviceProfile
    from .planning.planner import LoadPlan, plan

    __version__: str

__all__ = [
    "CapResult",
    "Completion",
    "Completions",
    "Controller",
    "DeviceProfile",
    "FlashBudgetError",
    "FlashCapError",
    "FlashCpuError",
    "FlashError",
    "FlashEvent",
    "FlashFormatError",
    "FlashOffload",
    "FlashReadError",
    "FlashWorkerError",
    "LoadPlan",
    "__version__",
    "complete_many",
    "plan",
    "profile",
    "run_capped",
]

# these need numpy, and the engine as soon as they are called; the version, what was installed
_LATER = {
    "Completion": "batch.many",
    "Completions": "batch.many",
    "DeviceProfile": "device.profile",
    "LoadPlan": "planning.planner",
    "complete_many": "batch.many",
    "plan": "planning.planner",
    "profile": "device.kept",
}


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        from .version import version

        value = version()
    elif name in _LATER:
        import importlib

        value = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
