"""What one sequence holds, written to the folder block by block, a piece at a time.

`take` copies a piece out of the engine's memory and is called by whoever may look at it; `write` writes the piece and
may be called by another thread. A file gets its name when all of it is on the disk.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..native import prompts as native
from ..native.prompts import HEAD_BYTES, NotThere, PromptKind, Tokens
from .folder import Folder
from .heads import BLOCK, Head, beginnings_of, seal

__all__ = ["PIECE", "Saving"]

PIECE = 4 << 20  # bytes that are copied and written at once


class Saving:
    """Of one sequence. Files that are there are not written again.

    Args:
        heads: of the blocks of these tokens, and of the rest behind them.
        tokens: that the sequence holds.
        states: what it had beside cells behind so many tokens.
    """

    def __init__(
        self,
        folder: Folder,
        kind: PromptKind,
        heads: Iterable[Head],
        seq: int,
        tokens: Tokens,
        states: Mapping[int, bytes],
    ) -> None:
        self.seq, self.tokens = seq, tokens
        self.written = 0  # bytes of files that are there now
        self._folder, self._kind, self._heads, self._states = folder, kind, heads, states
        self._buffer: mmap.mmap | None = None
        self._parts = self._missing()
        self._head: Head | None = None  # of what is being written
        self._partial, self._fd = "", -1
        self._offset = self._total = self._sum = self._n = 0

    def take(self, context: Any) -> bool:
        """Copies the next piece. False: nothing is left to be written, or what was left is not in memory any more."""
        if self._buffer is None:
            self._buffer = mmap.mmap(-1, PIECE)
        while True:
            if self._head is None:
                self._head = next(self._parts, None)
                if self._head is None:
                    return False
            try:
                self._take_piece(context, self._head)
                return True
            except NotThere:
                lost, self._head = self._head, None
                self._abandon()
                if lost.part == "cells":  # what follows could not be reached
                    self._parts = iter(())

    def _take_piece(self, context: Any, head: Head) -> None:
        assert self._buffer is not None
        with memoryview(self._buffer) as buffer:
            if head.part == "state":
                state = self._states[head.first + BLOCK]
                self._total, self._n = len(state), min(PIECE, len(state) - self._offset)
                buffer[: self._n] = state[self._offset : self._offset + self._n]
                checked = native.checksum(bytearray(state)) if self._offset == 0 else 0
            else:
                positions = (head.first, head.first + len(head.tokens))
                window = head.part == "window"
                self._n, self._total, checked = native.take(context, self.seq, window, positions, self._offset, buffer)
            self._sum = (self._sum + checked) & 0xFFFFFFFF

    def write(self) -> None:
        """Writes the piece that was taken. Raises OSError; then nothing of the block is left."""
        assert self._head is not None and self._buffer is not None
        try:
            if self._fd < 0:
                self._partial, self._fd = self._folder.begin()
            padded = -(-self._n // HEAD_BYTES) * HEAD_BYTES
            self._buffer[self._n : padded] = bytes(padded - self._n)
            with memoryview(self._buffer) as buffer:
                _write(self._fd, buffer[:padded], HEAD_BYTES + self._offset)
            self._offset += self._n
            if self._offset >= self._total:
                self._finish(self._head)
        except BaseException:
            self._head = None
            self._abandon()
            raise

    def _finish(self, head: Head) -> None:
        assert self._buffer is not None
        self._buffer[:HEAD_BYTES] = seal(head.packed(), self._total, self._sum)
        with memoryview(self._buffer) as buffer:
            _write(self._fd, buffer[:HEAD_BYTES], 0)
        os.fdatasync(self._fd)
        self._folder.finish(self._partial, head.name)
        if self._kind.has_rests:  # of this text when it was shorter
            for shorter in beginnings_of(head):
                if self._folder.holds(shorter.name):
                    self._folder.remove(shorter.name)
        self.written += HEAD_BYTES + self._offset
        os.close(self._fd)
        self._head, self._fd, self._partial = None, -1, ""
        self._offset = self._sum = 0

    def close(self) -> None:
        """Leaves what is not written yet."""
        self._head, self._parts = None, iter(())
        self._abandon()
        self._buffer = None

    def _abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._folder.remove(self._partial)
        self._fd, self._partial, self._offset, self._sum = -1, "", 0, 0

    def _missing(self) -> Iterator[Head]:
        now, kind = time.time(), self._kind
        for i, head in enumerate(self._heads):
            wanted = {"cells": kind.has_cells, "window": kind.window > 0, "state": head.first + BLOCK in self._states}
            for part, is_wanted in wanted.items():
                if not is_wanted:
                    continue
                file = replace(head, part=part)
                if self._folder.holds(file.name):
                    self._folder.touch(file.name, now - 1e-3 * i)  # what others need goes last
                else:
                    yield file


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
