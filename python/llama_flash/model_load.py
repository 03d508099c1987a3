"""model/load.py under the name by which llama_cpp imports it."""

from .model.load import load_model, new_context

__all__ = ["load_model", "new_context"]
