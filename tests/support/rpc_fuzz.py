"""Messages of the engine's RPC protocol, as a client sends them, and damaged ones."""

from __future__ import annotations

import random
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from repository import ROOT

__all__ = ["HELLO", "Tensor", "command", "graph", "op_number", "random_message"]

# enum rpc_cmd
ALLOC, ALIGNMENT, MAX_SIZE, BASE, FREE, CLEAR, SET, BIND, GET, COPY, GRAPH, MEMORY, INIT, ALLOC_SIZE = range(14)
HELLO, DEVICES, AGAIN, MEMSET = 14, 15, 16, 17
F32, I32 = 0, 26  # enum ggml_type
_TENSOR = struct.Struct("<QIQ4I4II16ii10QQQQ64si")


@dataclass(frozen=True)
class Tensor:
    """struct rpc_tensor"""

    id: int = 1
    type: int = 0
    buffer: int = 0
    ne: tuple[int, int, int, int] = (8, 1, 1, 1)
    nb: tuple[int, int, int, int] = (4, 32, 32, 32)
    op: int = 0
    params: tuple[int, ...] = (0,) * 16
    flags: int = 0
    src: tuple[int, ...] = (0,) * 10
    view_src: int = 0
    view_offs: int = 0
    data: int = 0
    name: bytes = b"t"

    def pack(self) -> bytes:
        return _TENSOR.pack(
            *(self.id, self.type, self.buffer, *self.ne, *self.nb, self.op, *self.params, self.flags, *self.src),
            *(self.view_src, self.view_offs, self.data, self.name, 0),
        )


@cache
def _ops() -> list[str]:
    header = ROOT / "build/engine/vendor/llama.cpp/ggml/include/ggml.h"
    ops = header.read_text().partition("enum ggml_op {")[2].partition("}")[0]
    return re.findall(r"^\s*GGML_OP_(\w+)\b", ops, re.M)


def op_number(name: str) -> int:
    """enum ggml_op"""
    return _ops().index(name)


def command(number: int, body: bytes = b"") -> bytes:
    return bytes([number]) + len(body).to_bytes(8, "little") + body


def ask(connection: socket.socket, number: int, body: bytes, size: int) -> bytes:
    """The answer, which has that size. Raises ConnectionError: there is none, for the connection was ended."""
    connection.sendall(command(number, body))
    answer = b""
    while len(answer) < 8 + size:
        piece = connection.recv(8 + size - len(answer))
        if not piece:
            raise ConnectionError
        answer += piece
    assert int.from_bytes(answer[:8], "little") == size
    return answer[8:]


def graph(nodes: list[int], tensors: list[Tensor], device: int = 0) -> bytes:
    body = struct.pack("<II", device, len(nodes)) + struct.pack(f"<{len(nodes)}Q", *nodes)
    return command(GRAPH, body + struct.pack("<I", len(tensors)) + b"".join(t.pack() for t in tensors))


def _number(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, 3, 7, 8, 31, 32, 64, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1))


def _tensor(rng: random.Random, buffer: int, base: int, size: int, number: int) -> Tensor:
    """Sound in most ways; in some none."""
    ne = tuple(rng.choice((1, 1, 2, 4, 8, 32, 256)) for _ in range(4))
    kind = rng.choice((0, 0, 0, 1, 2, 8, 12, 26, 30))
    row = 4 * ne[0]
    nb = (4, row, row * ne[1], row * ne[1] * ne[2])
    at = base + rng.randrange(0, max(1, size), 32)
    sound = Tensor(number, kind, buffer, ne, nb, rng.randrange(101), data=at)  # type: ignore[arg-type]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        sound = _damaged(rng, sound, buffer, base, size)
    return sound


def _damaged(rng: random.Random, sound: Tensor, buffer: int, base: int, size: int) -> Tensor:
    """In one way."""
    changes = (
        lambda: replace(sound, type=_number(rng)),
        lambda: replace(sound, buffer=rng.choice((0, 1, rng.getrandbits(64), buffer))),
        lambda: replace(sound, ne=tuple(_number(rng) for _ in range(4))),  # type: ignore[arg-type]
        lambda: replace(sound, nb=tuple(_number(rng) for _ in range(4))),  # type: ignore[arg-type]
        lambda: replace(sound, op=_number(rng)),
        lambda: replace(sound, data=rng.choice((0, rng.getrandbits(64), base + size - 1, base - 1))),
        lambda: replace(sound, view_offs=rng.getrandbits(64)),
        lambda: replace(sound, params=tuple(rng.getrandbits(31) for _ in range(16))),
        lambda: replace(sound, name=rng.randbytes(64)),
        lambda: replace(sound, data=(sound.data + rng.choice((1, 2, 4, 32, 4096, -1, -4, -32))) % (1 << 64)),
        lambda: replace(sound, ne=_one_changed(rng, sound.ne)),
        lambda: replace(sound, nb=_one_changed(rng, sound.nb)),
        lambda: replace(sound, src=tuple(rng.sample(sound.src, len(sound.src)))),
    )
    return rng.choice(changes)()


def _one_changed(rng: random.Random, numbers: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    changed, at = list(numbers), rng.randrange(4)
    changed[at] = rng.choice((changed[at] - 1, changed[at] + 1, changed[at] * 2, changed[at] // 2, 0, 4)) % (1 << 32)
    return tuple(changed)  # type: ignore[return-value]


class _Products:
    """Weights times tokens, one after the other, as a model's graph has them."""

    def __init__(self, rng: random.Random, buffer: int, base: int) -> None:
        self._rng, self._buffer, self._next = rng, buffer, base
        self.tensors: list[Tensor] = []
        self.nodes: list[int] = []
        self._n_tokens = rng.choice((1, 1, 2, 3, 15, 16, 17, 40, 64, 65))
        self._n_used = rng.choice((1, 2, 2, 3))
        self._ids = self._add(I32, (self._n_used, self._n_tokens))  # where a client's numbers of experts lie
        self._results: list[Tensor] = []

    def _add(self, kind: int, ne: tuple[int, ...], op: str = "NONE", src: tuple[int, ...] = ()) -> Tensor:
        shape = (*ne, 1, 1, 1)[:4]
        nb = (4, 4 * shape[0], 4 * shape[0] * shape[1], 4 * shape[0] * shape[1] * shape[2])
        sources = (*src, *[0] * 10)[:10]
        made = Tensor(
            *(len(self.tensors) + 1, kind, self._buffer, shape, nb, op_number(op)),
            src=sources,
            data=self._next,
        )
        self._next += -(-nb[3] * shape[3] // 64) * 64
        self.tensors.append(made)
        if op != "NONE":
            self.nodes.append(made.id)
        return made

    def _input(self, ne: tuple[int, ...]) -> Tensor:
        """What was computed before, if it fits, or else numbers of the client's."""
        shape = (*ne, 1, 1, 1)[:4]
        fitting = [result for result in self._results if result.ne == shape]
        return fitting[-1] if fitting and self._rng.randrange(4) else self._add(F32, ne)

    def multiply(self, weight: Tensor) -> None:
        own = replace(weight, id=len(self.tensors) + 1)
        self.tensors.append(own)
        if own.ne[2] > 1:
            x = self._input((own.ne[0], self._rng.choice((1, self._n_used)), self._n_tokens))
            out = (own.ne[1], self._n_used, self._n_tokens)
            self._results.append(self._add(F32, out, "MUL_MAT_ID", (own.id, x.id, self._ids.id)))
        elif own.ne[1] > 1:
            x = self._input((own.ne[0], self._n_tokens))
            self._results.append(self._add(F32, (own.ne[1], self._n_tokens), "MUL_MAT", (own.id, x.id)))
        else:
            x = self._input((own.ne[0], self._n_tokens))
            self._results.append(self._add(F32, (own.ne[0], self._n_tokens), "MUL", (x.id, own.id)))

    def join(self) -> None:
        """Gate and up become what down takes."""
        if len(self._results) > 1 and self._results[-1].ne == self._results[-2].ne:
            one, other = self._results[-2:]
            self._results.append(self._add(F32, one.ne, "GLU", (one.id, other.id)))


def _products(rng: random.Random, weights: Sequence[Tensor], buffer: int, base: int, size: int) -> bytes:
    """A graph of products, damaged in some way or not at all."""
    made = _Products(rng, buffer, base)
    order = list(weights)
    if rng.randrange(3) == 0:
        rng.shuffle(order)
    for weight in order[rng.randrange(len(order)) :]:
        made.multiply(weight)
        if rng.randrange(2):
            made.join()
    tensors, nodes = made.tensors, made.nodes
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
        at = rng.randrange(len(tensors))
        tensors[at] = _damaged(rng, tensors[at], rng.choice((buffer, weights[0].buffer)), base, size)
    if rng.randrange(8) == 0:
        rng.shuffle(nodes)
    return graph(nodes, tensors)


def _experts(rng: random.Random, buffer: int, base: int) -> bytes:
    """Numbers of experts, where graphs of products look for them: some of them are none."""
    most = rng.choice((2, 4, 4, 8, 8, 1 << 31))
    numbers = [rng.randrange(most) if rng.randrange(50) else rng.getrandbits(31) for _ in range(256)]
    if rng.randrange(2):  # those of a token differ
        numbers = [i % 2 for i in range(256)]
    body = struct.pack(f"<Q{len(numbers)}I", 0, *numbers)
    return command(SET, Tensor(1, I32, buffer, (256, 1, 1, 1), (4, 1024, 1024, 1024), data=base).pack() + b"\0" + body)


def random_message(rng: random.Random, buffer: int, base: int, size: int, weights: Sequence[Tensor] = ()) -> bytes:
    """One, for a client that has a buffer, and weights bound in another one."""

    def tensor(number: int = 1) -> Tensor:
        return _tensor(rng, buffer, base, size, number)

    def u64() -> int:
        return rng.choice((0, 1, 31, 4096, size, 1 << 31, 1 << 40, (1 << 64) - 1, rng.getrandbits(64)))

    def nodes() -> bytes:
        n = rng.randrange(1, 5)
        tensors = [
            replace(tensor(i), src=_sources(rng, n), view_src=rng.choice((0, 0, 0, rng.randrange(n))))
            for i in range(1, n + 1)
        ]
        return graph([rng.randrange(0, n + 2) for _ in range(rng.randrange(1, 4))], tensors, rng.choice((0, 0, 0, 1)))

    messages = (
        lambda: command(ALLOC, struct.pack("<IQ", rng.choice((0, 0, 9)), u64())),
        lambda: command(ALIGNMENT, struct.pack("<I", rng.choice((0, 5)))),
        lambda: command(BASE, struct.pack("<Q", rng.choice((buffer, u64())))),
        lambda: command(FREE, struct.pack("<Q", u64())),
        lambda: command(CLEAR, struct.pack("<QB", rng.choice((buffer, u64())), rng.randrange(256))),
        lambda: command(
            SET,
            tensor().pack() + b"\0" + struct.pack("<Q", rng.choice((0, 0, u64()))) + rng.randbytes(rng.randrange(99)),
        ),
        lambda: command(BIND, tensor().pack() + struct.pack("<QQ", u64(), u64())),
        lambda: command(GET, tensor().pack() + struct.pack("<QQ", rng.choice((0, 0, u64())), rng.choice((8, u64())))),
        lambda: command(COPY, tensor().pack() + tensor(2).pack()),
        nodes,
        nodes,
        nodes,
        *((lambda: _products(rng, weights, buffer, base, size),) * 12 if weights else ()),
        *((lambda: _experts(rng, buffer, base),) * 2 if weights else ()),
        lambda: command(MEMORY, struct.pack("<I", rng.choice((0, 7)))),
        lambda: command(INIT, tensor().pack()),
        lambda: command(
            ALLOC_SIZE, struct.pack("<I", 0) + tensor().pack() + b"".join(tensor(i).pack() for i in range(10))
        ),
        lambda: command(AGAIN, struct.pack("<I", rng.choice((0, 3)))),
        lambda: command(MEMSET, tensor().pack() + struct.pack("<QQB", u64(), u64(), 1)),
        lambda: bytes([rng.randrange(256)]) + u64().to_bytes(8, "little") + rng.randbytes(rng.randrange(64)),
    )
    message = rng.choice(messages)()
    damage = rng.randrange(8)
    if damage == 0:  # half of it
        return message[: rng.randrange(len(message))]
    if damage == 1:  # one byte
        at = rng.randrange(len(message))
        return message[:at] + bytes([rng.randrange(256)]) + message[at + 1 :]
    return message


def _sources(rng: random.Random, n: int) -> tuple[int, ...]:
    return tuple(rng.choice((0, 0, rng.randrange(1, n + 2))) if i < 4 else 0 for i in range(10))
