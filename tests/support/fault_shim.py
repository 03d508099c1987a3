"""faults.c, compiled: a library that makes reads of a process fail."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from repository import SUPPORT

__all__ = ["compiled"]


def compiled(folder: Path) -> Path:
    """The library, in this folder."""
    library = folder / "faults.so"
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, SUPPORT / "faults.c", "-ldl"]
    subprocess.run(command, check=True)
    return library
