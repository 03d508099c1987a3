"""The walks through the code (docs/how-to/add-*.md): the files and names of their tables exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from repository import ROOT

WALKS = sorted(ROOT.glob("docs/how-to/add-*.md"))
SOURCES = [
    file
    for folder in ("plugin", "python", "gguf_tools")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".h", ".cpp", ".py")
]
STEP = re.compile(r"^\| \d+ \| `([^`]+)` \| (.+) \|$", re.MULTILINE)


def has(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def elsewhere(name: str) -> str:
    """For who has moved something: where it is now."""
    found = [str(f.relative_to(ROOT)) for f in SOURCES if f.name == name or has(f.read_text(encoding="utf-8"), name)]
    return f"it is in {', '.join(found)}" if found else "it is nowhere"


def test_there_are_walks() -> None:
    assert {page.stem for page in WALKS} == {"add-an-eviction-policy", "add-a-record-kind", "add-a-statistic"}


@pytest.mark.parametrize("page", WALKS, ids=lambda page: page.stem)
def test_a_walk_leads_through_at_most_three_files_and_what_it_names_is_in_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    steps = STEP.findall(text)
    assert 1 <= len(steps) <= 3
    wrong = []
    for file, names in steps:
        if not (ROOT / file).is_file():
            wrong.append(f"{page.name}: no file {file}: {elsewhere(Path(file).name)}")
            continue
        code = (ROOT / file).read_text(encoding="utf-8")
        wrong += [
            f"{page.name}: {name} is not in {file}: {elsewhere(name)}"
            for name in re.findall(r"`([^`]+)`", names)
            if not has(code, name)
        ]
    wrong += [
        f"{page.name}: no test {test}" for test in re.findall(r"tests/[\w/]+\.py", text) if not (ROOT / test).is_file()
    ]
    assert not wrong, "\n".join(wrong)
