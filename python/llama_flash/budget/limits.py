"""The process' own limits (ulimit): said by name where they are why something cannot be done."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import FlashError
from ..sizes import format_size

__all__ = ["addresses_hint", "check_addresses", "check_threads", "explain_files", "threads_hint"]

_HEAP = 32 << 20  # bytes that a load takes beside what is planned, about


def _limit(which: int) -> int | None:
    value, _ = resource.getrlimit(which)
    return None if value == resource.RLIM_INFINITY else value


def threads_hint() -> str:
    """Why a thread may not have been started, and what to do."""
    users, addresses = _limit(resource.RLIMIT_NPROC), _limit(resource.RLIMIT_AS)
    found = [] if users is None else [f"{users} processes and threads of this user, `ulimit -u`"]
    found += [] if addresses is None else [f"{format_size(addresses)} of addresses, `ulimit -v`"]
    found += ["pids.max of its cgroup"]
    return f"limits: {', '.join(found)}: raise what is too low"


def addresses_hint() -> str:
    """What may be why memory was refused: a text to follow the error's own, "" if no limit is set."""
    limit = _limit(resource.RLIMIT_AS)
    return "" if limit is None else f" (limit: {format_size(limit)} of addresses, `ulimit -v`: raise it)"


def check_threads(n_threads: int) -> None:
    """That as many threads can be started as a decode needs: the engine would go on with fewer.

    Raises:
        FlashError: they cannot.
    """
    if n_threads < 2:
        return
    running, done, threads = _n_running(), threading.Event(), []
    try:
        for _ in range(n_threads):  # one more than the engine starts: others may come, too
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as error:
        raise FlashError(
            f"{n_threads} threads to compute with (n_threads) cannot be started beside the {running} that run "
            f"({threads_hint()}), or ask for fewer"
        ) from error
    finally:
        done.set()
        for thread in threads:
            thread.join()
        end = time.monotonic() + 1.0
        while _n_running() > running and time.monotonic() < end:  # those that have ended count until the kernel is done
            time.sleep(0.001)


def _n_running() -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task"))
    return threading.active_count()


def check_addresses(needed: int) -> None:
    """That the process may have `needed` bytes of addresses more: the engine does not expect to be refused memory.

    Raises:
        FlashError: it may not.
    """
    limit = _limit(resource.RLIMIT_AS)
    if limit is None:
        return
    needed += _HEAP
    with contextlib.suppress(OSError, ValueError):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if held + needed > limit:
            raise FlashError(
                f"the process may have {format_size(limit)} of addresses (`ulimit -v`), has {format_size(held)} "
                f"and needs about {format_size(needed)} more, those of weights that stay in the file included: raise it"
            )


def explain_files(failure: BaseException, files: Sequence[str | os.PathLike[str]]) -> None:
    """Raises FlashError from `failure`, the load of a model of these files, if they cannot be open at once."""
    opened: list[int] = []
    try:
        for _ in range(2 * len(files) + 1):  # the loader's and the plugin's, and a look into /proc
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise FlashError(
                f"{files[0]} cannot be loaded: {os.strerror(error.errno)} (limit: {_limit(resource.RLIMIT_NOFILE)} "
                "open files, `ulimit -n`: raise it)"
            ) from failure
    finally:
        for number in opened:
            os.close(number)
