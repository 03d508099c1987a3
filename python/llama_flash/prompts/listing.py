"""What a folder holds, for people: prompts as the ends of chains of blocks, and whether files are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from ..native import prompts as native
from ..native.prompts import HEAD_BYTES
from .folder import Entry, Folder
from .heads import SUFFIXES, Head, parse_head

__all__ = ["Prompt", "drop", "prompts_of", "tokens_of", "verify"]


@dataclass(frozen=True)
class Prompt:
    """A text whose state is there: its last block, and those before it."""

    key: str
    label: str  # the model
    identity: str
    tokens: int
    size: int  # bytes on the disk, shared blocks included
    shared: int  # of these, bytes that other prompts begin with, too
    used: float  # seconds since the epoch


class _Blocks:
    """All blocks of a folder. What is damaged is passed over."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.heads: dict[str, Head] = {}
        self.files: dict[str, list[Entry]] = {}  # by key
        for entry in folder.entries():
            key = entry.name.partition(".")[0]
            head = read_head(folder, entry.name)
            if head is not None and head.key.hex() == key:
                self.heads[key] = head
                self.files.setdefault(key, []).append(entry)
        self.children: dict[str, int] = {}
        for head in self.heads.values():
            parent = head.parent.hex()
            self.children[parent] = self.children.get(parent, 0) + 1

    def up(self, key: str) -> Iterator[str]:
        """From a block to the first one, as far as they are there."""
        while key in self.heads:
            yield key
            key = self.heads[key].parent.hex()

    def bytes_of(self, key: str) -> int:
        return sum(entry.size for entry in self.files[key])


def read_head(folder: Folder, name: str) -> Head | None:
    """Of a file; None: it cannot be read, or is no block."""
    fd = folder.open(name)
    if fd is None:
        return None
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return parse_head(os.pread(fd, HEAD_BYTES, 0))
    except OSError:
        return None
    finally:
        os.close(fd)


def prompts_of(folder: Folder) -> list[Prompt]:
    """The prompts that are there, those used last first. Raises OSError."""
    blocks = _Blocks(folder)
    uses: dict[str, int] = {}  # prompts by block
    ends = [key for key in blocks.heads if not blocks.children.get(key)]
    for end in ends:
        for key in blocks.up(end):
            uses[key] = uses.get(key, 0) + 1
    found = []
    for end in ends:
        head, keys = blocks.heads[end], list(blocks.up(end))
        found.append(
            Prompt(
                key=end,
                label=head.label,
                identity=head.identity.hex(),
                tokens=head.first + len(head.tokens),
                size=sum(map(blocks.bytes_of, keys)),
                shared=sum(blocks.bytes_of(key) for key in keys if uses[key] > 1),
                used=max(entry.used for entry in blocks.files[end]),
            )
        )
    return sorted(found, key=lambda prompt: prompt.used, reverse=True)


def tokens_of(folder: Folder, key: str) -> list[int]:
    """The tokens of a prompt, as far back as its blocks are there."""
    blocks = _Blocks(folder)
    return [int(token) for each in reversed(list(blocks.up(key))) for token in blocks.heads[each].tokens]


def drop(folder: Folder, key: str) -> int:
    """Removes a prompt: its blocks, but for those that others need. Returns the bytes that are free again."""
    blocks, freed = _Blocks(folder), 0
    for number, each in enumerate(blocks.up(key)):
        if blocks.children.get(each, 0) > (1 if number else 0):
            break
        for entry in blocks.files[each]:
            folder.remove(entry.name)
            freed += entry.size
    return freed


def verify(folder: Folder) -> Iterator[tuple[str, str]]:
    """Reads all files; those that are no good, with the reason. Raises OSError."""
    for entry in list(folder.entries()):
        if why := _what_is_wrong(folder, entry):
            yield entry.name, why


def _what_is_wrong(folder: Folder, entry: Entry) -> str:
    key, _, part = entry.name.partition(".")
    head = read_head(folder, entry.name)
    if head is None:
        return "its head is damaged"
    if head.key.hex() != key or SUFFIXES[head.part] != f".{part}":
        return "it is another block than its name says"
    if entry.length != HEAD_BYTES + -(-head.n_bytes // HEAD_BYTES) * HEAD_BYTES:
        return f"it has {entry.length} bytes in place of {HEAD_BYTES + head.n_bytes}"
    fd = folder.open(entry.name)
    if fd is None:
        return "it cannot be read"
    try:
        body = bytearray(head.n_bytes)
        if os.preadv(fd, [body], HEAD_BYTES) != head.n_bytes or native.checksum(body) != head.body_sum:
            return "its checksum is wrong"
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(fd)
    return ""
