"""Where things are, whatever folder a test lies in, and what a program needs that imports what tests import."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"


def with_support() -> dict[str, str]:
    """An environment in which Python finds conftest and the modules of tests/support."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(SUPPORT), *filter(None, before)])}
