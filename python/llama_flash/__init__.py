"""llama_flash: weights of a llama.cpp model that stay in the GGUF file.

Importing this package is cheap: the engine (llama_cpp) is only loaded when it is needed.
"""

from __future__ import annotations

from .capped import CapResult, run_capped
from .controller import Controller, FlashEvent
from .errors import FlashBudgetError, FlashCapError, FlashError, FlashFormatError, FlashReadError
from .options import FlashOffload

__version__ = "0.1.0"

__all__ = [
    "CapResult",
    "Controller",
    "FlashBudgetError",
    "FlashCapError",
    "FlashError",
    "FlashEvent",
    "FlashFormatError",
    "FlashOffload",
    "FlashReadError",
    "__version__",
    "run_capped",
]
