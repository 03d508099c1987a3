"""native/library.py under the name by which llama_cpp imports it."""

from .native.library import library, register

__all__ = ["library", "register"]
