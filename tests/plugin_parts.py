"""Compiles the plugin's parts that need no engine (slots, ring, reader) for tests of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PLUGIN = Path(__file__).parents[1] / "plugin"
COMPILER = os.environ.get("CXX", "c++").split()
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-D_GNU_SOURCE", "-D_GLIBCXX_ASSERTIONS"]
INCLUDES = [f"-I{PLUGIN / 'include'}", f"-I{PLUGIN / 'src'}"]


def compile_cpp(output: Path, *arguments: str | Path) -> Path:
    command = [*COMPILER, *FLAGS, *INCLUDES, *arguments, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return output


def sources(*names: str) -> list[Path]:
    return [PLUGIN / "src" / f"{name}.cpp" for name in names]


def uring_flags(folder: Path) -> list[str]:
    """What compiles and links io_uring in; nothing where liburing is missing, as in the plugin's own build."""
    probe = folder / "probe.cpp"
    probe.write_text("#include <liburing.h>\nint main() { io_uring r; return io_uring_queue_init(1, &r, 0) == 1; }\n")
    command = [*COMPILER, str(probe), "-o", str(folder / "probe"), "-luring"]
    found = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ["-DLLAMA_FLASH_HAVE_URING", "-luring"] if found else []
