"""A process whose kernel refuses io_uring, as one without it does and as containers' filters do."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

_IO_URING_SETUP = 425  # on every architecture


def refuse_io_uring(errno: int) -> Callable[[], None]:
    """What makes io_uring_setup fail with `errno` in the process that calls it, and in those that it starts."""

    def refuse() -> None:
        load, equal, back = 0x20, 0x15, 0x06  # BPF_LD+W+ABS, BPF_JMP+JEQ+K, BPF_RET+K
        allow, error = 0x7FFF0000, 0x00050000 | errno
        steps = [(load, 0, 0, 0), (equal, 0, 1, _IO_URING_SETUP), (back, 0, 0, error), (back, 0, 0, allow)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
        assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

    return refuse
