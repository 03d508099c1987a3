"""observe/stats.py under the name that users import."""

from .observe.stats import Counters, FlashStats

__all__ = ["Counters", "FlashStats"]
