"""A device in a GPU's place: the engine's own RPC server, in a process of its own, whose memory is not this one's.

`python -m rpc_device PORT` is the server.
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["register", "rpc_device"]

_STARTING = 60.0  # seconds


@contextmanager
def rpc_device() -> Iterator[str]:
    """The address of a server that has no client yet; ended at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, str(port)], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _STARTING
        while not _listens(port):  # asked of the kernel: it serves one client after the other
            assert server.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def register(endpoint: str) -> None:
    """From now on, models of this process see it as they would see a GPU."""
    rpc = _library("libggml-rpc.so")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    found = rpc.ggml_backend_rpc_add_server(endpoint.encode())
    assert found, endpoint
    _library("libggml.so").ggml_backend_register(ctypes.c_void_p(found))


def _listens(port: int) -> bool:
    wanted, listening = f":{port:04X}", "0A"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(wanted) and line.split()[3] == listening for line in lines)


def _library(name: str) -> ctypes.CDLL:
    import llama_cpp

    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / name))


def _serve(port: str) -> None:
    base, rpc = _library("libggml.so"), _library("libggml-rpc.so")
    base.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = (ctypes.c_void_p * 1)(base.ggml_backend_dev_by_type(0))  # of type CPU
    rpc.ggml_backend_rpc_start_server(
        f"127.0.0.1:{port}".encode(), None, ctypes.c_size_t(2), ctypes.c_size_t(1), device
    )


if __name__ == "__main__":
    _serve(sys.argv[1])
