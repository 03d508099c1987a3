"""budget/cores.py under the name by which llama_cpp imports it."""

from .budget.cores import default_threads

__all__ = ["default_threads"]
