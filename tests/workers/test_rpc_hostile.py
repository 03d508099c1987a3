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
from collections.abc import Callable
from pathlib import Path

import pytest
import rpc_fuzz as rpc
import rpc_host
from bundled_experts import TinyExperts
from gguf import GGMLQuantizationType as K
from neurons import bundled, some_active, with_predictors, write_model
from workers import MOE

from llama_flash.model.ggml_types import TYPE_SIZES
from llama_flash.model.gguf import GgufMeta, read_gguf

N = 10_000
BUFFER = 4 << 20  # bytes
SANITIZED = "LLAMA_FLASH_SANITIZE" in os.environ
PEAK = (2 << 30) if SANITIZED else (512 << 20)  # bytes of the process: a sanitizer keeps what was freed for a while
_ROW = 1 << 12  # bytes between two weights
_PART = 0.02  # seconds after which a message is taken for a part of one


class Host:
    """A process that serves connections; started again when a kernel's assert has ended it."""

    def __init__(self, log: Path, model: Path, predictor: str) -> None:
        self._log, self.n_asserts, self.peak = log, 0, 0
        self._arguments = [str(model), predictor]
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, str(Path(rpc_host.__file__)), *self._arguments]
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
    """Has a buffer, and weights bound in another one."""

    def __init__(self, host: Host, meta: GgufMeta) -> None:
        self.data, self._says = host.connect(), host.connect()
        rpc.ask(self.data, rpc.HELLO, bytes(24), 28)
        weights = rpc_host.weights_of(meta)
        buffer, at = self._allocate(sum(-(-weight.size // _ROW) * _ROW for weight in weights))
        self.weights: list[rpc.Tensor] = []
        for weight in weights:
            tensor = _tensor(weight, buffer, at)
            bind = tensor.pack() + struct.pack("<QQ", weight.offset, 0)
            assert rpc.ask(self.data, rpc.BIND, bind, 1) == b"\1", weight.name
            self.weights.append(tensor)
            at += -(-weight.size // _ROW) * _ROW
        self.buffer, self.base = self._allocate(BUFFER)
        self._say()

    def _allocate(self, size: int) -> tuple[int, int]:
        buffer, _ = struct.unpack("<QQ", rpc.ask(self.data, rpc.ALLOC, struct.pack("<IQ", 0, size), 16))
        (base,) = struct.unpack("<Q", rpc.ask(self.data, rpc.BASE, struct.pack("<Q", buffer), 8))
        return buffer, base

    def _say(self) -> None:
        """The weights are bound, or what has failed since is to be forgotten."""
        self._says.sendall(b"x")
        assert self._says.recv(1) == b"d"

    def send(self, message: bytes) -> bool:
        """Whether it goes on, once this has been dealt with (or waits for the rest of it)."""
        try:
            self.data.sendall(message + rpc.command(rpc.DEVICES))
            if not select.select([self.data], [], [], _PART)[0]:
                return True
            if not self.data.recv(1 << 20):
                return False
            self._say()
            return True
        except (OSError, AssertionError):
            return False

    def close(self) -> None:
        """Waits until the host has dealt with all of it."""
        with contextlib.suppress(OSError):
            self.data.shutdown(socket.SHUT_WR)
            while self.data.recv(1 << 16):
                pass
        self.data.close()
        self._says.close()


def _tensor(weight: rpc_host.Weight, buffer: int, at: int) -> rpc.Tensor:
    ne = (*weight.shape, 1, 1, 1)[:4]
    n_block, size = TYPE_SIZES[weight.type]
    row = size * ne[0] // n_block
    nb = (size, row, row * ne[1], row * ne[1] * ne[2])
    return rpc.Tensor(buffer=buffer, data=at, type=weight.type, ne=ne, nb=nb, name=weight.name.encode())


def _mixture(_: Path) -> Path:
    return MOE


def _neurons(folder: Path) -> Path:
    plain = bundled(write_model(folder, "llama", "Q4_0", "fatrelu"))
    return with_predictors(plain, plain.with_name(f"hostile-{plain.name}"), some_active)


def _experts_of_neurons(folder: Path) -> Path:
    return TinyExperts(K.Q8_0).write_bundled(folder / "hostile-experts.gguf")


CASES = [
    pytest.param(_mixture, "exact", N, id="mixture"),
    pytest.param(_neurons, "exact", N, id="neurons"),
    pytest.param(_neurons, "lowrank", N // 4, id="neurons-lowrank"),
    pytest.param(_neurons, "off", N // 4, id="neurons-off"),
    pytest.param(_experts_of_neurons, "exact", N, id="experts"),
    pytest.param(_experts_of_neurons, "off", N // 4, id="experts-off"),
]


@pytest.mark.parametrize(("model", "predictor", "n"), CASES)
@pytest.mark.full
def test_ten_thousand_hostile_messages(tmp_path: Path, model: Callable[[Path], Path], predictor: str, n: int) -> None:
    """Seeded. No crash but a kernel's assert, nothing for the sanitizer to report, memory bounded."""
    _send(tmp_path, model(tmp_path), predictor, n)


@pytest.mark.parametrize(("model", "predictor"), [case.values[:2] for case in CASES], ids=[case.id for case in CASES])
def test_hundreds_of_hostile_messages(tmp_path: Path, model: Callable[[Path], Path], predictor: str) -> None:
    _send(tmp_path, model(tmp_path), predictor, 400)


def _send(folder: Path, path: Path, predictor: str, n: int) -> None:
    rng, meta = random.Random(3), read_gguf(path)
    host = Host(folder / "host.log", path, predictor)
    client: Client | None = None
    n_clients = 0
    try:
        for _ in range(n):
            if client is None:
                client = Client(host, meta)
                n_clients += 1
            message = rpc.random_message(rng, client.buffer, client.base, BUFFER, client.weights)
            if not client.send(message):
                client.close()
                client = None
        if client is not None:
            client.close()
        host.look()
    finally:
        host.close()
    assert "Sanitizer" not in (folder / "host.log").read_text(errors="replace")
    assert n_clients > n // 100
    assert host.peak < PEAK
    print(f"{n_clients} connections, {host.n_asserts} asserts, {host.peak >> 20} MiB")
