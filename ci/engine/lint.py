"""clang-format and clang-tidy on the plugin, as .clang-format and .clang-tidy say: the C++ part of `make lint`.

clang-tidy sees each source as the build compiles it (build/cmake/compile_commands.json). A source that was clean with
the same headers, settings and command is not looked at again: build/tidy holds a stamp for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build import BUILD, ROOT, VENV
from report import BuildError, run_main, say, step

PLUGIN = ROOT / "plugin"
COMMANDS = BUILD / "cmake/compile_commands.json"
STAMPS = BUILD / "tidy"


@dataclass(frozen=True)
class Source:
    path: Path
    key: str  # of all that decides what clang-tidy says

    @property
    def stamp(self) -> Path:
        return STAMPS / "-".join(self.path.relative_to(PLUGIN).parts)


def files() -> list[Path]:
    return sorted(path for path in PLUGIN.rglob("*") if path.suffix in (".h", ".cpp"))


def format_check() -> None:
    result = subprocess.run(
        [VENV / "bin/clang-format", "--dry-run", "-Werror", "--style=file", *files()], capture_output=True, text=True
    )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if ": error: " in line]
        places = sorted({line.split(":")[0] for line in lines})
        for line in lines[:20]:
            say(line)
        raise BuildError(f"clang-format: {len(lines)} places in {len(places)} files: run `make format`")


def sources() -> list[Source]:
    """Those that the build compiles; plugin/tests are not among them."""
    if not COMMANDS.is_file():
        raise BuildError(f"{COMMANDS.relative_to(ROOT)} is missing: run `make build`")
    common = hashlib.sha256((ROOT / ".clang-tidy").read_bytes())
    for header in files():
        if header.suffix == ".h":
            common.update(header.read_bytes())
    found = []
    for entry in json.loads(COMMANDS.read_text(encoding="utf-8")):
        path = Path(entry["directory"], entry["file"])
        if path.is_relative_to(PLUGIN):
            mine = common.copy()
            mine.update(path.read_bytes() + entry["command"].encode())
            found.append(Source(path, mine.hexdigest()))
    return found


def tidy(source: Source) -> str:
    """What it has to say; empty if nothing."""
    command: list[str | Path] = [VENV / "bin/clang-tidy", "--quiet", "-p", COMMANDS.parent]
    command += ["--warnings-as-errors=*", source.path]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return result.stdout + (result.stderr if not result.stdout.strip() else "")
    source.stamp.write_text(source.key)
    return ""


def tidy_check() -> None:
    STAMPS.mkdir(parents=True, exist_ok=True)
    todo = [s for s in sources() if not s.stamp.is_file() or s.stamp.read_text() != s.key]
    if not todo:
        return
    with step(f"clang-tidy on {len(todo)} files") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        said = []
        for done, (source, text) in enumerate(zip(todo, pool.map(tidy, todo), strict=True), 1):
            progress.detail = f"{done}/{len(todo)}"
            if text:
                said.append((source, text))
    for _, text in said:
        say(text.strip())
    if said:
        raise BuildError(f"clang-tidy: {', '.join(str(s.path.relative_to(ROOT)) for s, _ in said)}")


def write_format() -> None:
    subprocess.run([VENV / "bin/clang-format", "-i", "--style=file", *files()], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="format the files in place, and check nothing")
    options = parser.parse_args()
    if options.write:
        write_format()
        return
    format_check()
    tidy_check()
    say(f"C++: {len(files())} files, clean")


if __name__ == "__main__":
    run_main(main)
