"""What is asked of the kernel for which Python has no call."""

from __future__ import annotations

import ctypes
import os

__all__ = ["io_uring_refused"]

_IO_URING_SETUP = 425  # the same on every architecture


def io_uring_refused() -> int:
    """0 if the kernel sets up a ring for us, else its errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)  # struct io_uring_params
    ring = libc.syscall(ctypes.c_long(_IO_URING_SETUP), ctypes.c_uint(1), params)
    if ring < 0:
        return ctypes.get_errno()
    os.close(ring)
    return 0
