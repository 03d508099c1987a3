"""A device in a GPU's place: the engine's own RPC server, in a process of its own, whose memory is not this one's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from repository import ROOT

sys.path.insert(0, str(ROOT / "ci/bench"))
from benchlib.stock import free_port, listens, register, server_command

__all__ = ["register", "rpc_device"]

_STARTING = 400.0  # seconds: a busy machine is not a failure


@contextmanager
def rpc_device() -> Iterator[str]:
    """The address of a server that has no client yet; ended at the end."""
    port = free_port()
    server = subprocess.Popen(server_command(port), stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _STARTING
        while not listens(port):
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
