"""Touches fresh anonymous memory as the plugin does, in huge pages where the kernel gives them and with all threads.

    python ci/bench/benchlib/first_touch.py BYTES

Prints the seconds. Run by machine.first_touch() under a memory cap: a page is charged to a group when it is touched,
and a virtual machine may have to ask its host for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_PAGE = 4096


def main(argv: list[str]) -> int:
    memory = mmap.mmap(-1, int(argv[0]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = np.frombuffer(memory, np.uint8)[::_PAGE]
    cpus = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cpus) as threads:
        started = time.perf_counter()
        list(threads.map(lambda part: part.fill(1), np.array_split(pages, cpus)))
        print(time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
