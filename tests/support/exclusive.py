"""What only one test may do at a time, when several processes run tests on one machine."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(what: str) -> Iterator[None]:
    """Waits until no other test holds `what`. Not to be nested."""
    with Path(tempfile.gettempdir(), f"llama-flash-tests-{os.getuid()}-{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
