"""Ten thousand damaged messages, sent to what serves a worker's connection for data.

`make sanitize ARGS="--kind worker"` has the address sanitizer look at what they do.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import rpc_fuzz as rpc
import rpc_host
from workers import MOE

from llama_flash.model.gguf import GgufMeta, TensorInfo, read_gguf

N = 10_000
BUFFER = 4 << 20  # bytes
SANITIZED = "LLAMA_FLASH_SANITIZE" in os.environ
PEAK = (2 << 30) if SANITIZED else (512 << 20)  # bytes of the process: a sanitizer keeps what was freed for a while
_ROW = 1 << 12  # bytes between two weights
_PART = 0.02  # seconds after which a message is taken for a part of one


class Host:
    """A process that serves connections; started again when a kernel's assert has ended it."""

    def __init__(self, log: Path) -> None:
        self._log, self.n_asserts, self.peak = log, 0, 0
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, str(Path(rpc_host.__file__)), str(MOE)]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    def connect(self) -> socket.socket:
        self.look()
        return socket.create_connection(("127.0.0.1", self._port), 120)

    def look(self) -> None:
        """Fails where it has ended in another way than by an assert."""
        code = self._process.poll()
        if code is None:
            found = Path(f"/proc/{self._process.pid}/status").read_text().partition("VmHWM:")[2].split()
            self.peak = max(self.peak, int(found[0]) << 10 if found else 0)  # nothing: it is about to end
            return
        said = self._log.read_text(errors="replace")
        assert code == -signal.SIGABRT and re.search("ASSERT|Assertion", said), (code, said[-4000:])
        assert "Sanitizer" not in said, said[-4000:]
        self.n_asserts += 1
        self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Client:
    """Has a buffer, and weights bound in it."""

    def __init__(self, host: Host, meta: GgufMeta) -> None:
        self.data = host.connect()
        rpc.ask(self.data, rpc.HELLO, bytes(24), 28)
        self.buffer, _ = struct.unpack("<QQ", rpc.ask(self.data, rpc.ALLOC, struct.pack("<IQ", 0, BUFFER), 16))
        (self.base,) = struct.unpack("<Q", rpc.ask(self.data, rpc.BASE, struct.pack("<Q", self.buffer), 8))
        at = self.base
        for name in rpc_host.HOMES:
            tensor = meta.tensors[name]
            bind = _tensor(tensor, self.buffer, at).pack() + struct.pack("<QQ", tensor.offset, 0)
            assert rpc.ask(self.data, rpc.BIND, bind, 1) == b"\1", name
            at += -(-tensor.size // _ROW) * _ROW

    def send(self, message: bytes) -> bool:
        """Whether it goes on, once this has been dealt with (or waits for the rest of it)."""
        try:
            self.data.sendall(message + rpc.command(rpc.DEVICES))
            if not select.select([self.data], [], [], _PART)[0]:
                return True
            return bool(self.data.recv(1 << 20))
        except OSError:
            return False

    def close(self) -> None:
        """Waits until the host has dealt with all of it."""
        with contextlib.suppress(OSError):
            self.data.shutdown(socket.SHUT_WR)
            while self.data.recv(1 << 16):
                pass
        self.data.close()


def _tensor(tensor: TensorInfo, buffer: int, at: int) -> rpc.Tensor:
    ne = (*tensor.shape, 1, 1, 1)[:4]
    row = tensor.size // (ne[1] * ne[2] * ne[3])
    size = row * 32 // ne[0] if tensor.type else 4  # bytes of a block of Q8_0, or of a float
    nb = (size, row, row * ne[1], row * ne[1] * ne[2])
    return rpc.Tensor(buffer=buffer, data=at, type=tensor.type, ne=ne, nb=nb, name=tensor.name.encode())


@pytest.mark.full
def test_ten_thousand_hostile_messages(tmp_path: Path) -> None:
    """Seeded. No crash but a kernel's assert, nothing for the sanitizer to report, memory bounded."""
    rng, meta = random.Random(3), read_gguf(MOE)
    host = Host(tmp_path / "host.log")
    client: Client | None = None
    n_clients = 0
    try:
        for _ in range(N):
            if client is None:
                client = Client(host, meta)
                n_clients += 1
            if not client.send(rpc.random_message(rng, client.buffer, client.base, BUFFER)):
                client.close()
                client = None
        if client is not None:
            client.close()
        host.look()
    finally:
        host.close()
    assert "Sanitizer" not in (tmp_path / "host.log").read_text(errors="replace")
    assert n_clients > N // 100
    assert host.peak < PEAK
    print(f"{n_clients} connections, {host.n_asserts} asserts, {host.peak >> 20} MiB")
