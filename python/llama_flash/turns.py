"""session/turns.py under the name by which llama_cpp imports it."""

from .session.turns import Turn, take_turns

__all__ = ["Turn", "take_turns"]
