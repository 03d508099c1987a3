"""native/cpu.py under the name by which llama_cpp imports it."""

from .native.cpu import check, needed

__all__ = ["check", "needed"]
