"""Tools for GGUF files: write, bundle, inspect, verify and measure models."""

from gguf_tools.errors import GgufToolsError
from gguf_tools.types import FLASH  # importing it makes the type known to the gguf package

__all__ = ["FLASH", "GgufToolsError"]
