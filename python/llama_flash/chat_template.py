"""model/chat_template.py under the name by which llama_cpp imports it."""

from .model.chat_template import broken_template

__all__ = ["broken_template"]
