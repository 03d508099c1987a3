"""planning/planner.py under the name that users import."""

from .planning.planner import LoadPlan, Option, plan

__all__ = ["LoadPlan", "Option", "plan"]
