"""Applies the numbered patches to texts in memory.

Strict on purpose: the base is pinned, so every line of context must be where the patch says. Needs neither git nor
patch; `make patch-apply` and `make patch-export` (worktree.py) are where patches are made.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from unidiff.constants import LINE_TYPE_NO_NEWLINE
from unidiff.errors import UnidiffParseError
from unidiff.patch import Hunk, PatchedFile, PatchSet

from report import BuildError

Tree = dict[str, bytes | None]  # path -> content, None: the file does not exist


def find(folder: Path) -> list[Path]:
    """The patches in the order in which they apply."""
    return sorted(folder.glob("*.patch"))


def apply_all(patches: list[Path], read: Callable[[str], bytes | None]) -> Tree:
    """The files that the patches touch, after all of them. `read` gives a file of the pristine tree."""
    tree: Tree = {}
    for patch in patches:
        try:
            files = PatchSet(io.StringIO(patch.read_bytes().decode("utf-8")))
        except UnidiffParseError as e:
            raise BuildError(f"patches/{patch.name} is not a unified diff: {e}") from e
        if not files:
            raise BuildError(f"patches/{patch.name} changes nothing")
        for file in files:
            _apply_file(patch.name, file, tree, read)
    return tree


def _sides(hunk: Hunk) -> tuple[list[str], list[str]]:
    """The lines that the hunk expects and those it leaves."""
    source: list[str] = []
    target: list[str] = []
    last: list[list[str]] = []  # where the last line went
    for line in hunk:
        if line.line_type == LINE_TYPE_NO_NEWLINE:
            for side in last:
                side[-1] = side[-1].removesuffix("\n")
            continue
        last = ([source] if not line.is_added else []) + ([target] if not line.is_removed else [])
        for side in last:
            side.append(line.value)
    return source, target


def _apply_file(patch: str, file: PatchedFile, tree: Tree, read: Callable[[str], bytes | None]) -> None:
    path: str = file.path

    def current() -> bytes | None:
        return tree[path] if path in tree else read(path)

    def fail(why: str) -> BuildError:
        return BuildError(f"patches/{patch} does not apply: {path}{why}")

    if file.is_binary_file or file.is_rename:
        raise fail(": binary changes and renames are not supported")
    old = current()
    if file.is_added_file:
        if old is not None:
            raise fail(" exists already")
        old = b""
    elif old is None:
        raise fail(" is not in the engine")

    # not splitlines(), which also splits at form feeds and the like
    lines = list(io.StringIO(old.decode("utf-8")))
    result: list[str] = []
    position = 0  # lines of `lines` consumed
    for hunk in file:
        # a hunk without old lines names the line after which it inserts
        start = hunk.source_start - (1 if hunk.source_length else 0)
        source, target = _sides(hunk)
        if start < position or lines[start : start + len(source)] != source:
            raise fail(f", line {hunk.source_start}: the text there is not what the patch expects")
        result += lines[position:start] + target
        position = start + len(source)
    result += lines[position:]
    tree[path] = None if file.is_removed_file else "".join(result).encode("utf-8")
