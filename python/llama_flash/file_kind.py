"""What lies at a path, before it is opened."""

from __future__ import annotations

import os
import stat

__all__ = ["kind_of_file"]


def kind_of_file(path: str | os.PathLike[str]) -> str:
    """What is at `path` where that is no ordinary file: "a folder", "a pipe (FIFO)", ...; else "".

    Opening a pipe would wait for somebody to write to it. Raises OSError: there is nothing, or it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe (FIFO)"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "")
