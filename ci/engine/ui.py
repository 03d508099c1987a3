"""`make ui`: build/ui/dist, the page for chats of `llama-flash serve`, from its sources in the engine's sdist.

Needs npm, which takes the packages that the engine's lock file pins, and those of ui_tools, which find out what the
page is made of. `make build` and `make wheel` put into the wheel what lies there, and build/ui/LICENSES.txt.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import shutil
import tarfile
from pathlib import Path

import licenses
import sdist
from build import BUILD, ENGINE, alone
from report import BuildError, run_logged, run_main, say
from tree import content, members

UI = BUILD / "ui"
DIST = UI / "dist"
LICENSES = UI / "LICENSES.txt"
STAMP = UI / "made"  # after which the wheel is made anew
TOOLS = ENGINE / "ui_tools"
MOST = 5 << 20  # bytes, packed: more is not worth its place in the wheel
CONFIG = "vite.licenses.config.ts"
_SOURCES = "vendor/llama.cpp/tools/ui/"


def lay_out(folder: Path) -> str:
    """The page's sources, anew but for packages that are there; a hash of them, and of what makes the page."""
    digest = hashlib.sha256()
    for tool in (*sorted(TOOLS.iterdir()), ENGINE / "licenses.py"):
        digest.update(tool.read_bytes())
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
    if STAMP.is_file() and STAMP.read_text() == key and (DIST / "index.html").is_file() and LICENSES.is_file():
        say("ui: up to date")
        return
    if shutil.which("npm") is None:
        raise BuildError("npm is not there: install it, with Node.js 20 or newer, or do without the page")
    npm("taking the page's packages through npm", "ui-packages.log", "ci", folder=sources)
    tools = UI / "tools"
    shutil.copytree(TOOLS, tools, dirs_exist_ok=True)
    npm("taking the tool that lists them", "ui-tools.log", "ci", "--omit=peer", folder=tools)
    config = shutil.copy(TOOLS / CONFIG, sources)
    fresh, bundled = UI / "fresh", UI / "bundled.jsonl"
    shutil.rmtree(fresh, ignore_errors=True)
    bundled.unlink(missing_ok=True)
    npm(
        "making the page",
        "ui.log",
        *("run", "build", "--", "--config", str(config)),
        folder=sources,
        LLAMA_UI_OUT_DIR=str(fresh),
        LLAMA_BUILD_NUMBER="0",
        LLAMA_FLASH_UI_TOOLS=str(tools),
        LLAMA_FLASH_UI_BUNDLED=str(bundled),
    )
    if not (fresh / "index.html").is_file():
        raise BuildError(f"npm made no page: see {BUILD / 'logs/ui.log'}")
    if (size := packed(fresh)) > MOST:
        raise BuildError(f"the page has {size >> 20} MiB, more than the {MOST >> 20} MiB that a wheel should carry")
    STAMP.unlink(missing_ok=True)
    LICENSES.write_text(licenses.joined(licenses.of_page(bundled, sources)), encoding="utf-8")
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
