"""What memory we may take, and who gets how much of it. Users import what rooms.py has from here."""

from __future__ import annotations

from .rooms import (
    Breakdown,
    Budget,
    default_reserve,
    held_by_process,
    reserve_of,
    resolve_budget,
    smallest_budget,
)

__all__ = [
    "Breakdown",
    "Budget",
    "default_reserve",
    "held_by_process",
    "reserve_of",
    "resolve_budget",
    "smallest_budget",
]
