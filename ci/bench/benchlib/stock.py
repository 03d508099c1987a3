"""The same model over the engine's own RPC servers, below the same memory caps: whether they live.

`python stock.py serve PORT` is such a server, as the engine's program rpc-server starts it; `python stock.py ask MODEL
ENDPOINT...` a client without flash, which divides the layers evenly and asks for a few tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "free_port", "listens", "register", "run_stock", "server_command"]

_STARTING, _PATIENCE = 60.0, 280.0  # seconds
_N_CTX, _N_TOKENS = 256, 8


@dataclass
class Outcome:
    """Of one client with its workers."""

    client: str  # how it ended
    workers: list[str] = field(default_factory=list)  # what the cap of each says: the peak, and who was killed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_stock(model: Path, cap: int, folder: str, n_workers: int = 2) -> Outcome:
    """Loads the model over so many stock workers, each below a cap of `cap` bytes. The client has none."""
    logs = [Path(folder) / f"stock-{i}.log" for i in range(n_workers)]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(contextlib.closing(_Server(cap, log))) for log in logs]
        endpoints = [server.endpoint for server in servers]
        client = [sys.executable, __file__, "ask", str(model), *endpoints]
        try:
            done = subprocess.run(client, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            return Outcome(f"no answer in {_PATIENCE:g} s", [server.close() for server in servers])
        said = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"code {done.returncode}"
        return Outcome(said, [server.close() for server in servers])


class _Server:
    """One below its cap."""

    def __init__(self, cap: int, log: Path) -> None:
        port = free_port()
        self.endpoint, self._log = f"127.0.0.1:{port}", log
        command = [sys.executable, "-m", "llama_flash", "cap", str(cap), "--"]
        with log.open("w") as to:
            self._process = subprocess.Popen([*command, *server_command(port)], stdout=to, stderr=to)
        end = time.monotonic() + _STARTING
        while not listens(port) and self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)

    def close(self) -> str:
        """What the cap says."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        return self._log.read_text().strip().rpartition("\n")[2]


def free_port() -> int:
    """Of the loopback; somebody else may take it before it is used."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def server_command(port: int) -> list[str]:
    """A server at the loopback, with no client yet."""
    return [sys.executable, __file__, "serve", str(port)]


def listens(port: int) -> bool:
    """Asked of the kernel: it serves one client after the other."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def _library(name: str) -> ctypes.CDLL:
    """One of the engine's."""
    import llama_cpp

    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / name))


def register(endpoint: str) -> None:
    """From now on, models of this process see it as they would see a GPU."""
    rpc = _library("libggml-rpc.so")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    found = rpc.ggml_backend_rpc_add_server(endpoint.encode())
    assert found, endpoint
    _library("libggml.so").ggml_backend_register(ctypes.c_void_p(found))


def _serve(port: str) -> None:
    engine, rpc = _library("libggml.so"), _library("libggml-rpc.so")
    engine.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(engine.ggml_backend_dev_by_type(0))  # of type CPU
    n_threads, n_devices = ctypes.c_size_t(2), ctypes.c_size_t(1)
    rpc.ggml_backend_rpc_start_server(f"127.0.0.1:{port}".encode(), None, n_threads, n_devices, devices)


def _ask(model: str, *endpoints: str) -> None:
    import llama_cpp

    for endpoint in endpoints:
        register(endpoint)
    shares = [1.0] * len(endpoints)
    llm = llama_cpp.Llama(model, n_gpu_layers=-1, tensor_split=shares, n_ctx=_N_CTX, n_threads=2, verbose=False)
    llm.eval([10, 11, 12])
    for token in range(_N_TOKENS):
        llm.eval([token])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        _ask(*sys.argv[2:])
