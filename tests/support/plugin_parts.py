"""Compiles tests of the plugin's parts: of those that need no engine (slots, ring, reader), or of all with it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

from repository import ROOT

PLUGIN = ROOT / "plugin"
COMPILER = os.environ.get("CXX", "c++").split()
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-D_GNU_SOURCE", "-D_GLIBCXX_ASSERTIONS"]
INCLUDES = [f"-I{PLUGIN / 'include'}", f"-I{PLUGIN / 'src'}"]


def compile_cpp(output: Path, *arguments: str | Path) -> Path:
    command = [*COMPILER, *FLAGS, *INCLUDES, *arguments, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return output


def sources(*names: str) -> list[Path]:
    """Of plugin/src, by their paths there without the ending."""
    return [PLUGIN / "src" / f"{name}.cpp" for name in names]


def uring_flags(folder: Path) -> list[str]:
    """What compiles and links io_uring in; nothing where liburing is missing, as in the plugin's own build."""
    probe = folder / "probe.cpp"
    probe.write_text("#include <liburing.h>\nint main() { io_uring r; return io_uring_queue_init(1, &r, 0) == 1; }\n")
    command = [*COMPILER, str(probe), "-o", str(folder / "probe"), "-luring"]
    found = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ["-DLLAMA_FLASH_HAVE_URING", "-luring"] if found else []


def built_plugin() -> list[str]:
    """Arguments that compile and link against what `make build` has left; none if nothing was built here."""
    build = PLUGIN.parent / "build/cmake"
    commands = build / "compile_commands.json"
    if not commands.exists():
        return []
    ours = [c for c in json.loads(commands.read_text()) if PLUGIN / "src" in Path(c["file"]).parents]
    objects = [str(Path(c["directory"], c["output"])) for c in ours]
    if not objects or not all(Path(o).exists() for o in objects):
        return []
    words = shlex.split(ours[0]["command"])
    pairs = [(a, b) for a, b in pairwise(words) if a == "-isystem"]
    flags = [word for pair in pairs for word in pair]
    flags += [word for word in words if word.startswith(("-D", "-I", "-m"))]
    libraries = ["-lllama", "-lggml", "-lggml-cpu", "-lggml-rpc", "-lggml-base"]
    return [*flags, *objects, f"-L{build / 'bin'}", *libraries, f"-Wl,-rpath,{build / 'bin'}"]
