"""`make ui`: build/ui/dist, the page for chats of `llama-flash serve`, from its sources in the engine's sdist.

Needs npm, which takes the packages that the engine's lock file pins. `make build` and `make wheel` put into the wheel
what lies there.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import shutil
import tarfile
from pathlib import Path

import sdist
from build import BUILD, alone
from report import BuildError, run_logged, run_main, say
from tree import content, members

UI = BUILD / "ui"
DIST = UI / "dist"
STAMP = UI / "made"  # after which the wheel is made anew
MOST = 5 << 20  # bytes, packed: more is not worth its place in the wheel
_SOURCES = "vendor/llama.cpp/tools/ui/"


def lay_out(folder: Path) -> str:
    """The page's sources, anew but for packages that are there; a hash of them."""
    digest = hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.name != "node_modules":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    with tarfile.open(sdist.fetch()) as archive:
        for path, member in members(archive):
            if path.startswith(_SOURCES):
                data = content(archive, member)
                digest.update(f"{path}\0{len(data)}\0".encode() + data)
                target = folder / path[len(_SOURCES) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
    if not (folder / "package.json").is_file():
        raise BuildError(f"the pinned engine has no sources of its page ({_SOURCES})")
    return digest.hexdigest()


def explain(lines: list[str]) -> str:
    """The line of npm's output that says what went wrong."""
    for line in lines:
        if match := re.search(r"(?:npm error|Error:)\s+(?!code\b)(.+)", line):
            return match[1]
    return "npm failed"


def npm(title: str, log: str, *arguments: str, folder: Path, **environment: str) -> None:
    run_logged(
        title,
        ["npm", *arguments],
        BUILD / "logs" / log,
        explain=explain,
        env={"CI": "1", **environment},
        cwd=folder,
    )


def packed(folder: Path) -> int:
    """Bytes of all files, each packed by itself, as they are in the library."""
    return sum(len(gzip.compress(file.read_bytes())) for file in folder.rglob("*") if file.is_file())


def make() -> None:
    sources = UI / "sources"
    key = lay_out(sources)
    if STAMP.is_file() and STAMP.read_text() == key and (DIST / "index.html").is_file():
        say("ui: up to date")
        return
    if shutil.which("npm") is None:
        raise BuildError("npm is not there: install it, with Node.js 20 or newer, or do without the page")
    npm("taking the page's packages through npm", "ui-packages.log", "ci", folder=sources)
    fresh = UI / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    npm(
        "making the page",
        "ui.log",
        *("run", "build"),
        folder=sources,
        LLAMA_UI_OUT_DIR=str(fresh),
        LLAMA_BUILD_NUMBER="0",
    )
    if not (fresh / "index.html").is_file():
        raise BuildError(f"npm made no page: see {BUILD / 'logs/ui.log'}")
    if (size := packed(fresh)) > MOST:
        raise BuildError(f"the page has {size >> 20} MiB, more than the {MOST >> 20} MiB that a wheel should carry")
    STAMP.unlink(missing_ok=True)
    shutil.rmtree(DIST, ignore_errors=True)
    fresh.rename(DIST)
    STAMP.write_text(key)
    say(f"ui: {DIST}, {size / (1 << 20):.1f} MiB packed")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with alone():
        make()


if __name__ == "__main__":
    run_main(main)
