"""Messages of the engine's RPC protocol, as a client sends them, and damaged ones."""

from __future__ import annotations

import random
import socket
import struct
from dataclasses import dataclass, replace

__all__ = ["HELLO", "Tensor", "command", "graph", "random_message"]

# enum rpc_cmd
ALLOC, ALIGNMENT, MAX_SIZE, BASE, FREE, CLEAR, SET, BIND, GET, COPY, GRAPH, MEMORY, INIT, ALLOC_SIZE = range(14)
HELLO, DEVICES, AGAIN, MEMSET = 14, 15, 16, 17
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
        what = rng.randrange(9)
        sound = (
            replace(sound, type=_number(rng)),
            replace(sound, buffer=rng.choice((0, 1, rng.getrandbits(64), buffer))),
            replace(sound, ne=tuple(_number(rng) for _ in range(4))),  # type: ignore[arg-type]
            replace(sound, nb=tuple(_number(rng) for _ in range(4))),  # type: ignore[arg-type]
            replace(sound, op=_number(rng)),
            replace(sound, data=rng.choice((0, rng.getrandbits(64), base + size - 1, base - 1))),
            replace(sound, view_offs=rng.getrandbits(64)),
            replace(sound, params=tuple(rng.getrandbits(31) for _ in range(16))),
            replace(sound, name=rng.randbytes(64)),
        )[what]
    return sound


def random_message(rng: random.Random, buffer: int, base: int, size: int) -> bytes:
    """One, for a client that has a buffer."""

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
