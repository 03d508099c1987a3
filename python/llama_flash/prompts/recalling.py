"""The longest beginning of a prompt that the folder holds, read into a sequence."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import FlashError
from ..native import prompts as native
from ..native.prompts import HEAD_BYTES, PromptKind, Tokens
from .folder import Folder
from .heads import BLOCK, SHORTEST, Head, parse_head, seal

__all__ = ["Recalling"]

_AT_ONCE = 256  # blocks whose files are open at the same time, twice each


class Recalling:
    """Of one prompt, into one sequence of a context.

    Args:
        heads: of its blocks that may be read.
        rests: of what may be there behind so many blocks, the longest first.
        say: is told, in a line, which file was no good.
    """

    def __init__(
        self,
        folder: Folder,
        kind: PromptKind,
        heads: Sequence[Head],
        rests: Callable[[int], Iterator[Head]],
        tokens: Tokens,
        io_engine: str,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._kind, self._io_engine, self._say = folder, kind, io_engine, say
        self._tokens, self._heads, self._rests = tokens, heads, rests

    def find(self, n_past: int) -> int:
        """Tokens that the folder seems to hold, more than the first n_past that are in memory; else 0."""
        end, rest = self._there(n_past)
        return rest.first + len(rest.tokens) if rest else end

    def run(self, context: Any, seq: int, n_past: int) -> int:
        """Reads what is there. Returns how many tokens the sequence has then; the rest of it is empty.

        n_past: tokens of the prompt that it has already. Where it has them no more, 0 is returned and it has none.
        """
        first = n_past // BLOCK
        end, rest = self._there(n_past)
        if end <= n_past and rest is None:
            return n_past
        if rest is not None:
            end = rest.first
        if self._kind.has_state or end == 0:  # it has no beginning that could stay
            native.clear(context, seq)
            first = 0
        try:
            while self._kind.has_cells and first * BLOCK < end:
                last = min(end // BLOCK, first + _AT_ONCE)
                good = self._read(context, seq, "cells", first, last)
                first += good
                if first < last:
                    end = self._end(first, 0)
            end = self._finish(context, seq, end)
            if rest is not None and end == rest.first:
                end += self._read_rest(context, seq, rest)
        except FlashError as error:
            self._say(f"prompt not restored: {error}")
            end = 0
        if end == 0:
            native.clear(context, seq)
        self._note_use(end)
        return end

    def _finish(self, context: Any, seq: int, end: int) -> int:
        """What is needed beside the cells of all positions, at a place where it is there; 0: nowhere."""
        while end > 0:
            if self._kind.has_cells:
                _cut(context, seq, end)
            if self._read_window(context, seq, end) and self._read_state(context, seq, end):
                return end
            end = self._end(end // BLOCK - 1, 0)
        return 0

    def _read_window(self, context: Any, seq: int, end: int) -> bool:
        if not self._kind.window:
            return True
        first, last = self._window_of(end), end // BLOCK
        return self._read(context, seq, "window", first, last) == last - first

    def _read_state(self, context: Any, seq: int, end: int) -> bool:
        if not self._kind.has_state:
            return True
        name = self._name(end // BLOCK - 1, "state")
        state = _read_whole(self._folder, name, self._heads[end // BLOCK - 1])
        if state is not None and native.set_state(context, seq, state):
            return True
        self._damaged(name)
        return False

    def _read(self, context: Any, seq: int, part: str, first: int, last: int) -> int:
        """Reads parts of blocks first to before last; how many of the first ones were right."""
        with self._opened(part, range(first, last)) as files:
            if not files:
                return 0
            tokens = self._tokens[first * BLOCK : (first + len(files)) * BLOCK]
            good = native.restore(context, seq, part == "window", first * BLOCK, tokens, BLOCK, files, self._io_engine)
        if good < last - first:
            self._damaged(self._name(first + good, part))
        return good

    def _there(self, n_past: int) -> tuple[int, Head | None]:
        """Tokens of whole blocks, as _end says, and what is to be read behind all blocks that are there."""
        reach = self._reach(n_past // BLOCK)
        end = self._end(reach, n_past)
        return end, self._rest_behind(reach, max(end, n_past))

    def _rest_behind(self, n: int, most: int) -> Head | None:
        """The longest rest that is there behind `n` blocks, if it goes beyond `most` tokens by enough to be read."""
        for rest in self._rests(n):
            if rest.first + len(rest.tokens) < most + SHORTEST:
                return None
            if self._folder.holds(rest.name):
                return rest
        return None

    def _read_rest(self, context: Any, seq: int, rest: Head) -> int:
        """How many tokens that were; 0: it was no good."""
        n = len(rest.tokens)
        fd = self._folder.open(rest.name)
        if fd is None:
            return 0
        try:
            files = [(fd, rest.packed())]
            good = native.restore(context, seq, False, rest.first, rest.tokens, n, files, self._io_engine)
        finally:
            os.close(fd)
        if not good:
            _cut(context, seq, rest.first)
            self._damaged(rest.name)
            return 0
        self._folder.touch(rest.name, time.time())
        return n

    @contextlib.contextmanager
    def _opened(self, part: str, blocks: range) -> Iterator[Sequence[tuple[int, bytes]]]:
        """Files of the first of these blocks that can be opened."""
        files: list[tuple[int, bytes]] = []
        try:
            for i in blocks:
                fd = self._folder.open(self._name(i, part))
                if fd is None:
                    break
                files.append((fd, replace(self._heads[i], part=part).packed()))
            yield files
        finally:
            for fd, _ in files:
                os.close(fd)

    def _reach(self, first: int) -> int:
        """Blocks from the first one on whose cells follow one another."""
        if not self._kind.has_cells:
            return len(self._heads)
        while first < len(self._heads) and self._folder.holds(self._name(first, "cells")):
            first += 1
        return first

    def _end(self, reach: int, n_past: int) -> int:
        """Tokens up to the last of `reach` blocks behind which one can go on."""
        for n in range(reach, n_past // BLOCK, -1):
            needed = [self._name(n - 1, "state")] if self._kind.has_state else []
            if self._kind.window:
                needed += [self._name(i, "window") for i in range(self._window_of(n * BLOCK), n)]
            if all(map(self._folder.holds, needed)):
                return n * BLOCK
        return 0

    def _window_of(self, end: int) -> int:
        """Block in which the window before a position begins."""
        return max(0, end - self._kind.window) // BLOCK

    def _name(self, block: int, part: str) -> str:
        return replace(self._heads[block], part=part).name

    def _damaged(self, name: str) -> None:
        """It would be in the way of a right one."""
        if self._folder.holds(name):
            self._folder.remove(name)
            self._say(f"{self._folder.path / name}: damaged, or of something else: removed")

    def _note_use(self, end: int) -> None:
        now, kind = time.time(), self._kind
        parts = {"cells": kind.has_cells, "window": kind.window > 0, "state": kind.has_state}
        for i in range(end // BLOCK):
            for part, is_there in parts.items():
                if is_there:
                    self._folder.touch(self._name(i, part), now - 1e-3 * i)


def _cut(context: Any, seq: int, end: int) -> None:
    """Cells behind `end` go; a recurrent state, which is about to be replaced, is not asked."""
    import llama_cpp

    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), seq, end, -1)


def _read_whole(folder: Folder, name: str, head: Head) -> memoryview | None:
    """The body of a part that has no cells; None: it is not there, or not what it should be."""
    fd = folder.open(name)
    if fd is None:
        return None
    try:
        size = os.fstat(fd).st_size
        if size <= HEAD_BYTES:
            return None
        data = memoryview(mmap.mmap(-1, size))
        if os.preadv(fd, [data], 0) != size:
            return None
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return None
    finally:
        os.close(fd)
    said = parse_head(bytes(data[:HEAD_BYTES]))
    wanted = replace(head, part="state").packed()
    if said is None or size != HEAD_BYTES + -(-said.n_bytes // HEAD_BYTES) * HEAD_BYTES:
        return None
    body = data[HEAD_BYTES : HEAD_BYTES + said.n_bytes]
    if bytes(data[:HEAD_BYTES]) != seal(wanted, said.n_bytes, said.body_sum) or native.checksum(body) != said.body_sum:
        return None
    return body
