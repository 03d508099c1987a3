"""observe/simulate.py under the name that users import."""

from .observe.simulate import POLICIES, Result, accesses, as_counted, optimum, simulate, slots_for

__all__ = ["POLICIES", "Result", "accesses", "as_counted", "optimum", "simulate", "slots_for"]
