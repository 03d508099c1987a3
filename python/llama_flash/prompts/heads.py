"""The first 4096 bytes of a block's file: what the block is of, and two checksums.

Whoever looks for a block knows all of its head but the checksums, so a file is the block only if its head says the
same, byte for byte.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..native.prompts import HEAD_BYTES, Tokens, checksum

__all__ = [
    "BLOCK",
    "PARTS",
    "SHORTEST",
    "SUFFIXES",
    "Head",
    "beginnings_of",
    "heads_of",
    "parse_head",
    "rest_of",
    "seal",
]

BLOCK = 256  # tokens
SHORTEST = 16  # tokens of a text's rest behind its last whole block: fewer are computed again
PARTS = ("cells", "window", "state")  # what a file holds: cells of all positions, of a window, what has no cells
SUFFIXES = {part: f".{part}" for part in PARTS}

_MAGIC, _VERSION = b"LFPROMPT", 1
_FIXED = struct.Struct(
    "<8sIIII32s32s32s256s"
)  # magic, version, part, first position, tokens, key, parent, identity, label
_SUMS = struct.Struct("<QII")  # bytes of the body, its checksum, and that of the head before its own


@dataclass(frozen=True)
class Head:
    """What a file says that it is."""

    part: str
    first: int  # position
    tokens: Tokens
    key: bytes  # of all tokens up to the last of these
    parent: bytes  # key of the block before
    identity: bytes  # of model and context
    label: str  # the model, for people
    n_bytes: int = 0  # of the body
    body_sum: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return self.key.hex() + SUFFIXES[self.part]

    def packed(self) -> bytes:
        """As the file begins, with zeros where the size of the body and checksums are."""
        label = self.label.encode()[:255]
        fixed = _FIXED.pack(
            *(_MAGIC, _VERSION, PARTS.index(self.part), self.first, len(self.tokens)),
            *(self.key, self.parent, self.identity, label),
        )
        return (fixed + self.tokens.astype("<i4").tobytes()).ljust(HEAD_BYTES, b"\0")


def seal(head: bytes, n_bytes: int, body_sum: int) -> bytes:
    """The head with the size of the body and checksums. body_sum: that of the body, as the sum of its pieces."""
    sealed = bytearray(head)
    _SUMS.pack_into(sealed, HEAD_BYTES - _SUMS.size, n_bytes, body_sum or 1, 0)
    struct.pack_into("<I", sealed, HEAD_BYTES - 4, checksum(memoryview(sealed)[: HEAD_BYTES - 4]))
    return bytes(sealed)


def parse_head(data: bytes) -> Head | None:
    """What is said by the head of a file; None if it is none of this version, or damaged."""
    if len(data) != HEAD_BYTES:
        return None
    n_bytes, body_sum, head_sum = _SUMS.unpack_from(data, HEAD_BYTES - _SUMS.size)
    magic, version, part, first, n, key, parent, identity, label = _FIXED.unpack_from(data)
    room = (HEAD_BYTES - _SUMS.size - _FIXED.size) // 4
    if magic != _MAGIC or version != _VERSION or part >= len(PARTS) or n > room:
        return None
    if checksum(memoryview(bytearray(data))[: HEAD_BYTES - 4]) != head_sum:
        return None
    tokens = np.frombuffer(data, "<i4", n, _FIXED.size).astype(np.int32)
    text = label.rstrip(b"\0").decode(errors="replace")
    return Head(PARTS[part], first, tokens, key, parent, identity, text, n_bytes, body_sum)


def heads_of(identity: bytes, label: str, tokens: Tokens) -> Iterator[Head]:
    """Of the cells of each whole block: its key names all tokens up to the block's end, and their identity."""
    key = _root(identity)
    for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent, block = key, tokens[first : first + BLOCK]
        key = _key(parent, block)
        yield Head("cells", first, block, key, parent, identity, label)


def rest_of(identity: bytes, label: str, tokens: Tokens, before: Head | None) -> Head | None:
    """Of the cells behind the last whole block, `before`; None: there are too few."""
    first = before.first + BLOCK if before else 0
    rest, parent = tokens[first:], before.key if before else _root(identity)
    if not SHORTEST <= len(rest) < BLOCK:
        return None
    return Head("cells", first, rest, _key(parent, rest), parent, identity, label)


def beginnings_of(head: Head) -> Iterator[Head]:
    """What a shorter text that ends in this block has left as its rest; the longest first."""
    hashes, found = hashlib.sha256(head.parent), []
    data = head.tokens.astype("<i4").tobytes()
    for n in range(1, min(len(head.tokens), BLOCK)):
        hashes.update(data[4 * n - 4 : 4 * n])
        if n >= SHORTEST:
            found.append((n, hashes.copy().digest()))
    for n, key in reversed(found):
        yield replace(head, tokens=head.tokens[:n], key=key)


def _root(identity: bytes) -> bytes:
    return hashlib.sha256(b"llama-flash prompt 1" + identity).digest()


def _key(parent: bytes, tokens: Tokens) -> bytes:
    return hashlib.sha256(parent + tokens.astype("<i4").tobytes()).digest()
