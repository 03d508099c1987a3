"""planning/cost.py under the name that users import."""

from .planning.cost import Cost, Traffic

__all__ = ["Cost", "Traffic"]
