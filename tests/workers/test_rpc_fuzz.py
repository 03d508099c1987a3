"""What a client may send on its connection for data: nothing of it ends the worker."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rpc_fuzz as rpc
from workers import MOE, WorkerProcess, logits_of, open_model, workers_of

from llama_flash import FlashError
from llama_flash.model.gguf import read_gguf
from llama_flash.workers.wire import Wire

BUFFER = 1 << 20  # bytes


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    with workers_of(MOE, tmp_path, 1) as (one,):
        yield one


class Client:
    """Knows the token, and speaks the protocol as it likes."""

    def __init__(self, worker: WorkerProcess, homes: dict[str, int] | None = None) -> None:
        self._to = ("127.0.0.1", worker.port)
        self.control = Wire(socket.create_connection(self._to, 60))
        hello = self.control.ask({"op": "open", "token": ""})
        while "error" in hello and "busy" in hello["error"]["message"]:  # the one before is about to end
            self.control = Wire(socket.create_connection(self._to, 60))
            hello = self.control.ask({"op": "open", "token": ""})
        assert "error" not in hello, hello
        assert self.control.ask({"op": "plan", "homes": homes or {}}) == {"ok": True}
        self.data = socket.create_connection(self._to, 60)
        wire = Wire(self.data)
        wire.send({"op": "data", "token": "", "key": hello["key"]})
        assert wire.receive(exactly=True) == {"ok": True}
        self.ask(rpc.HELLO, bytes(24), 28)
        self.buffer = self.allocate(BUFFER)
        (self.base,) = struct.unpack("<Q", self.ask(rpc.BASE, struct.pack("<Q", self.buffer), 8))

    def ask(self, number: int, body: bytes, size: int) -> bytes:
        """The answer, which has that size."""
        return rpc.ask(self.data, number, body, size)

    def allocate(self, size: int) -> int:
        """A buffer."""
        buffer, _ = struct.unpack("<QQ", self.ask(rpc.ALLOC, struct.pack("<IQ", 0, size), 16))
        assert buffer, self.complaint()
        return int(buffer)

    def complaint(self) -> str:
        """Why the connection was ended."""
        with contextlib.suppress(OSError, FlashError):
            answer = self.control.ask({"op": "check"})
            return str(answer.get("error", {}).get("message", ""))
        return "lost"

    def is_served(self) -> bool:
        """Whether the connection for data is still answered."""
        with contextlib.suppress(OSError):
            self.ask(rpc.DEVICES, b"", 4)
            return True
        return False

    def close(self) -> None:
        self.data.close()
        self.control.close()

    def tensor(self, **about: Any) -> rpc.Tensor:
        return rpc.Tensor(**{"buffer": self.buffer, "data": self.base, **about})


FUNCTIONS = ["MAP_CUSTOM1", "MAP_CUSTOM2", "MAP_CUSTOM3", "CUSTOM", "OPT_STEP_ADAMW", "SOFT_MAX_BACK"]


@pytest.mark.parametrize("op", FUNCTIONS)
def test_ops_that_are_functions_by_address_are_refused(worker: WorkerProcess, op: str) -> None:
    client = Client(worker)
    node = client.tensor(op=rpc.op_number(op), src=(2, *[0] * 9), params=(0x41414141,) * 16)
    client.data.sendall(rpc.graph([1], [node, client.tensor(id=2)]))
    assert not client.is_served()
    assert "is not computed for others" in client.complaint()
    client.close()
    assert worker.process.poll() is None


def test_tensors_outside_of_their_buffers_are_refused(worker: WorkerProcess) -> None:
    for wrong in (
        {"data": 4096},
        {"data": (1 << 64) - 16},
        {"ne": (BUFFER, 1, 1, 1)},
        {"nb": (4, 1 << 31, 32, 32), "ne": (8, 8, 1, 1)},
        {"ne": ((1 << 32) - 1,) * 4, "nb": ((1 << 32) - 1,) * 4},
        {"buffer": 0xDEAD},
        {"type": 999},
        {"type": 4},  # a type that was given up: blocks of no elements
    ):
        client = Client(worker)
        bad = client.tensor(**wrong)
        client.data.sendall(rpc.command(rpc.GET, bad.pack() + struct.pack("<QQ", 0, 32)))
        assert not client.is_served(), wrong
        client.close()
    assert worker.process.poll() is None


def test_a_graph_is_refused_if_its_shapes_do_not_fit(worker: WorkerProcess) -> None:
    for op in map(rpc.op_number, ("ADD", "MUL_MAT", "GET_ROWS")):
        client = Client(worker)
        one, other = client.tensor(id=2, ne=(8, 4, 1, 1), nb=(4, 32, 128, 128)), client.tensor(id=3, ne=(7, 1, 1, 1))
        client.data.sendall(rpc.graph([1], [client.tensor(op=op, src=(2, 3, *[0] * 8)), one, other]))
        assert not client.is_served() and "its sources do not fit" in client.complaint()
        client.close()


def test_experts_lie_where_their_weight_does(worker: WorkerProcess) -> None:
    """Within the engine a fourth source says where else: addresses."""
    for n_sources in (3, 4):
        client = Client(worker)
        experts = client.tensor(id=2, ne=(8, 4, 2, 1), nb=(4, 32, 128, 256))
        ids = client.tensor(id=4, type=rpc.I32, ne=(1, 1, 1, 1), nb=(4, 4, 4, 4))
        src = (2, 3, 4, 5 if n_sources == 4 else 0, *[0] * 6)
        op, out = rpc.op_number("MUL_MAT_ID"), client.base + 4096
        product = client.tensor(op=op, ne=(4, 1, 1, 1), nb=(4, 16, 16, 16), src=src, data=out)
        client.data.sendall(rpc.graph([1], [product, experts, client.tensor(id=3), ids, client.tensor(id=5)]))
        assert client.is_served() == (n_sources == 3)
        assert ("its sources do not fit" in client.complaint()) == (n_sources == 4)
        client.close()


def test_a_graph_whose_tensors_take_less_than_it_needs_to_be_computed_is_refused(worker: WorkerProcess) -> None:
    """A stride of zero: a row is as many as it likes, and each is converted."""
    client, n = Client(worker), 1 << 17
    weight = client.tensor(id=2, type=8, ne=(4096, 1, 1, 1), nb=(34, 4352, 4352, 4352))
    rows = client.tensor(id=3, ne=(4096, n, 1, 1), nb=(4, 0, 0, 0))
    product = client.tensor(op=rpc.op_number("MUL_MAT"), ne=(1, n, 1, 1), nb=(4, 4, 4 * n, 4 * n), src=(2, 3, *[0] * 8))
    client.data.sendall(rpc.graph([1], [product, weight, rows]))
    assert not client.is_served() and "more than its tensors take" in client.complaint()
    client.close()


def test_numbers_lie_where_a_number_may_lie(worker: WorkerProcess) -> None:
    for wrong in ({"data": 2}, {"nb": (4, 30, 120, 120), "ne": (4, 4, 1, 1)}):
        client = Client(worker)
        bad = client.tensor(**{**wrong, "data": client.base + int(wrong.get("data", 0))})  # type: ignore[call-overload]
        client.data.sendall(rpc.command(rpc.GET, bad.pack() + struct.pack("<QQ", 0, 8)))
        assert not client.is_served() and "where a number may lie" in client.complaint()
        client.close()


def test_buffers_are_addresses_until_they_are_written_to(worker: WorkerProcess) -> None:
    client = Client(worker)
    large, other = (client.allocate(size << 20) for size in (90, 40))  # the budget has less for both
    for buffer, value, said in (
        (large, 1, ""),
        (other, 0, ""),
        (other, 1, "more than this worker's budget has for them"),
    ):
        client.data.sendall(rpc.command(rpc.CLEAR, struct.pack("<QB", buffer, value)))
        complaint = client.complaint() if client.is_served() else "ended"
        assert said in complaint if said else not complaint  # zeros take no memory
    client.close()


def test_weights_and_what_is_written_fit_into_the_budget_together(worker: WorkerProcess) -> None:
    tensor = read_gguf(MOE).tensors["blk.0.ffn_gate_exps.weight"]
    client = Client(worker, {tensor.name: 0})
    size, written = 64 << 20, list[int]()
    while size > tensor.size // 2:  # until nearly nothing is left
        buffer, _ = struct.unpack("<QQ", client.ask(rpc.ALLOC, struct.pack("<IQ", 0, size), 16))
        if buffer:
            client.data.sendall(rpc.command(rpc.CLEAR, struct.pack("<QB", buffer, 1)))
            assert client.is_served()
        if not client.complaint():
            written.append(buffer)
            continue
        size //= 2
        if buffer:
            client.data.sendall(rpc.command(rpc.FREE, struct.pack("<Q", buffer)))
    assert written
    weights = client.allocate(tensor.size)
    (at,) = struct.unpack("<Q", client.ask(rpc.BASE, struct.pack("<Q", weights), 8))
    row = tensor.size // (tensor.shape[1] * tensor.shape[2])
    nb = (34, row, row * tensor.shape[1], tensor.size)
    experts = client.tensor(type=tensor.type, ne=(*tensor.shape, 1), nb=nb, name=tensor.name.encode())
    bind = replace(experts, buffer=weights, data=at).pack() + struct.pack("<QQ", tensor.offset, 0)
    assert client.ask(rpc.BIND, bind, 1) == b"\0"
    assert "than this worker's budget has memory for" in client.complaint()
    client.data.sendall(rpc.command(rpc.FREE, struct.pack("<Q", written[0])))
    assert client.ask(rpc.BIND, bind, 1) == b"\1", client.complaint()
    client.close()


def test_a_client_that_says_few_and_writes_many_is_noticed_before_it_is_written(worker: WorkerProcess) -> None:
    tensor = read_gguf(MOE).tensors["blk.0.ffn_gate_exps.weight"]
    client = Client(worker, {tensor.name: 2})
    row = tensor.size // (tensor.shape[1] * tensor.shape[2])
    nb = (34, row, row * tensor.shape[1], tensor.size)
    experts = client.tensor(type=tensor.type, ne=(*tensor.shape, 1), nb=nb, name=tensor.name.encode())
    weights = client.allocate(tensor.size)
    (at,) = struct.unpack("<Q", client.ask(rpc.BASE, struct.pack("<Q", weights), 8))
    bind = replace(experts, buffer=weights, data=at).pack() + struct.pack("<QQ", tensor.offset, 0)
    assert client.ask(rpc.BIND, bind, 1) == b"\1", client.complaint()
    assert "error" not in client.control.ask({"op": "bound"})
    buffer = client.allocate(32 << 20)
    context = {"n_ctx": 512, "n_ubatch": 512, "n_sequences": 1, "flash_attn": True, "kv": 1 << 20}
    assert "error" not in client.control.ask({"op": "attach", "context": context})
    assert client.control.ask({"op": "few", "few": True}) == {"ok": True}
    client.data.sendall(rpc.command(rpc.SET, client.tensor().pack() + b"\0" + struct.pack("<Q", 0) + bytes(8)))
    assert client.is_served() and "sends more" not in worker.said()
    client.data.sendall(rpc.command(rpc.CLEAR, struct.pack("<QB", buffer, 1)))
    assert client.is_served() and "sends more" in worker.said()
    assert not client.complaint()
    client.close()


def test_a_message_that_is_larger_than_all_that_there_is(worker: WorkerProcess) -> None:
    client = Client(worker)
    client.data.sendall(bytes([rpc.SET]) + (1 << 40).to_bytes(8, "little"))
    assert not client.is_served()
    client.close()
    client = Client(worker)
    assert client.ask(rpc.ALLOC, struct.pack("<IQ", 0, 1 << 50), 16) == bytes(16)
    assert "more than this worker's budget" in client.complaint()
    client.close()


def test_weights_are_only_bound_where_the_file_has_them(worker: WorkerProcess) -> None:
    tensor = read_gguf(MOE).tensors["blk.0.attn_norm.weight"]
    client = Client(worker, {tensor.name: 0})
    name = tensor.name.encode()
    good = client.tensor(ne=(*tensor.shape, 1, 1, 1), nb=(4, *[4 * tensor.shape[0]] * 3), name=name)
    for bad, file, offset, said in (
        (client.tensor(name=b"nothing"), 0, tensor.offset, "has no such tensor"),
        (client.tensor(name=name), 0, tensor.offset, "with the shape"),
        (good, 0, tensor.offset + 32, "has it at byte"),
        (good, 1, tensor.offset, "has it at byte"),
    ):
        assert client.ask(rpc.BIND, bad.pack() + struct.pack("<QQ", offset, file), 1) == b"\0"
        assert said in client.complaint()
    assert client.ask(rpc.BIND, good.pack() + struct.pack("<QQ", tensor.offset, 0), 1) == b"\1"
    again = replace(good, data=client.base + 4096)
    assert client.ask(rpc.BIND, again.pack() + struct.pack("<QQ", tensor.offset, 0), 1) == b"\0"
    assert "has bound it, or all weights, before" in client.complaint()
    client.data.sendall(rpc.command(rpc.SET, good.pack() + b"\0" + struct.pack("<Q", 0) + bytes(8)))
    assert client.is_served() and "writes to memory of weights" in client.complaint()
    added = client.tensor(id=3, op=rpc.op_number("SQR"), src=(2, *[0] * 9))
    client.data.sendall(rpc.graph([3], [added, client.tensor(id=2)]))
    assert not client.is_served() and "writes to memory of weights" in client.complaint()
    client.close()
    client = Client(worker, {tensor.name: 0})
    good = replace(good, buffer=client.buffer, data=client.base)
    assert client.ask(rpc.BIND, good.pack() + struct.pack("<QQ", tensor.offset, 0), 1) == b"\1"
    client.data.sendall(rpc.command(rpc.CLEAR, struct.pack("<QB", client.buffer, 0)))
    assert client.is_served() and "writes to memory of weights" in client.complaint()
    with MOE.open("rb") as file:
        file.seek(tensor.offset)
        whole = good.pack() + struct.pack("<QQ", 0, tensor.size)
        assert client.ask(rpc.GET, whole, tensor.size) == file.read(tensor.size)
    client.close()


@pytest.mark.parametrize(("seed", "n"), [(1, 500), pytest.param(2, 10_000, marks=pytest.mark.full)])
def test_thousands_of_messages_and_then_a_model(worker: WorkerProcess, seed: int, n: int) -> None:
    """Seeded. A client's process may end (its own fault); the worker does not, and serves the next one."""
    rng = random.Random(seed)
    client: Client | None = None
    n_clients = n_sent = 0
    while n_sent < n or n_clients <= n // 100:  # a worker that is slow notices late what was wrong
        assert n_sent < 100 * n, "no message is wrong"
        n_sent += 1
        if client is not None and n_sent % 100 == 0:  # half a message takes in those that follow
            client.close()
            client = None
        if client is None:
            client = Client(worker)
            n_clients += 1
        message = rpc.random_message(rng, client.buffer, client.base, BUFFER)
        try:
            client.data.sendall(message)
            client.data.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while piece := client.data.recv(1 << 16):
                    pass
                if not piece:
                    raise ConnectionError
            client.data.setblocking(True)
        except OSError:
            client.close()
            client = None
    if client is not None:
        client.close()
    assert worker.process.poll() is None
    assert "Traceback" not in worker.said()
    with contextlib.closing(open_model(MOE, flash=False)) as llm:
        alone = logits_of(llm)
    with contextlib.closing(open_model(MOE, [worker], what="all")) as llm:
        assert np.array_equal(logits_of(llm), alone)
