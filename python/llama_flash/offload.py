"""session/session.py under the name by which llama_cpp imports it."""

from .session.session import FlashSession, open_session

__all__ = ["FlashSession", "open_session"]
