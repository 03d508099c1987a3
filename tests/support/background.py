"""Work in another thread while a test does its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Repeats `work` in another thread, at least once, and raises here what it raises there."""
    stop, failures = threading.Event(), []

    def repeat() -> None:
        try:
            work()
            while not stop.wait(0.001):
                work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
