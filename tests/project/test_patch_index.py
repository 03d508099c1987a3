"""patches/README.md: an index of all patches, each once, with what a reader must know of it."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

PATCHES = ROOT / "patches"
NAMES = sorted(patch.name for patch in PATCHES.glob("*.patch"))
ROW = re.compile(r"^\| \[(\d{4})\]\(([^)]+)\) \| (.+) \|$", re.MULTILINE)


def rows() -> dict[str, list[str]]:
    """Cells behind the first, by file name."""
    found = ROW.findall((PATCHES / "README.md").read_text(encoding="utf-8"))
    assert len({name for _, name, _ in found}) == len(found), "a patch that is listed twice"
    assert all(name.startswith(number) for number, name, _ in found)
    return {name: [cell.strip() for cell in cells.split(" | ")] for _, name, cells in found}


def test_the_index_lists_every_patch_and_no_other() -> None:
    assert sorted(rows()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_row_says_what_for_whether_upstream_could_take_it_until_when_and_how_long(name: str) -> None:
    purpose, upstream, until, lines = rows()[name]
    assert len(purpose.split()) >= 3 and until
    assert re.match(r"(yes|no|with a use)\b", upstream)
    diff = (PATCHES / name).read_text(encoding="utf-8").partition("\n---\n")[2]
    changed = re.findall(r"^([+-])(?!\+\+ |-- )", diff, re.MULTILINE)
    assert lines == f"+{changed.count('+')} -{changed.count('-')}"
