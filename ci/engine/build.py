"""`make build`: .venv, the patched engine and the plugin, one wheel, installed.

Runs on the system's Python with the standard library alone; what it needs beyond that goes into .venv.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from report import ERROR_PREFIX, BuildError, run_logged, run_main, say

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "ci/engine"
BUILD = ROOT / "build"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
OLDEST_PYTHON = (3, 10)
EXTRAS = "server,test,dev,plot"

# what the wheel is made of: a build with the same contents is up to date
INPUTS = (
    *("pyproject.toml", "README.md", "LICENSE", "ci/engine", "patches", "plugin", "python", "gguf_tools"),
    "build/ui/made",  # by ui.py
)
# variables that change what is compiled
ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS")


def input_files() -> Iterator[Path]:
    for name in INPUTS:
        path = ROOT / name
        if path.is_file():
            yield path
        for file in sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                yield file


def fingerprint() -> str:
    digest = hashlib.sha256(repr([sys.version_info[:2], [os.environ.get(v) for v in ENVIRONMENT]]).encode())
    for file in input_files():
        data = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT)}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def check_compilers() -> None:
    """One clear line instead of CMake's many."""
    for language, variable, names, suffix, flags in (
        ("C++17", "CXX", ("c++", "g++", "clang++"), ".cpp", ["-std=c++17"]),
        ("C", "CC", ("cc", "gcc", "clang"), ".c", []),
    ):
        named = os.environ.get(variable)
        found = named.split() if named else [path for path in map(shutil.which, names) if path][:1]
        if not found:
            raise BuildError(f"no {language} compiler found: install one (Debian: apt install g++) or set {variable}")
        with tempfile.TemporaryDirectory() as tmp:
            source = Path(tmp, f"probe{suffix}")
            header = "#include <optional>\nstd::optional<int> x;\n" if suffix == ".cpp" else ""
            source.write_text(header + "int main(void) { return 0; }\n")
            try:
                probe = subprocess.run(
                    [*found, *flags, str(source), "-o", str(Path(tmp, "probe"))], capture_output=True, text=True
                )
            except OSError as e:
                raise BuildError(f"{variable}={named}: {e.strerror}") from e
        if probe.returncode != 0:
            first = next((line for line in probe.stderr.splitlines() if "error" in line), probe.stderr.strip())
            raise BuildError(f"{' '.join(found)} cannot compile a {language} program: {first}")


def explain(lines: list[str]) -> str:
    """The line of a build's output that says what went wrong."""
    for pattern in (
        rf"^\s*{ERROR_PREFIX}(?!subprocess)(.*)$",  # tree.py's own line
        r"^\s*(.*(?:undefined reference to|multiple definition of).*)$",  # the linker, before it says that it failed
        r"^\s*(.*\berror: .*)$",  # the compiler
        r"^\s*(CMake Error.*)$",
        r"^\s*ERROR: (.*)$",  # pip
    ):
        for line in lines:
            if (match := re.search(pattern, line)) and "exit code" not in line:
                return match.group(1).strip()
    return "the build failed"


def build_requirements() -> list[str]:
    # tomllib comes with Python 3.11; this one list is also valid Python
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r"^requires = (\[.*?^\])", text, re.DOTALL | re.MULTILINE)
    assert match, "pyproject.toml: [build-system] requires"
    requirements: list[str] = ast.literal_eval(match.group(1))
    return requirements


def stamp_matches(stamp: Path, key: str) -> bool:
    return stamp.is_file() and stamp.read_text() == key


def make_venv() -> None:
    works = PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0
    if works:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    run_logged(
        "making .venv",
        [sys.executable, "-m", "venv", VENV],
        BUILD / "logs/venv.log",
        explain=lambda _: "cannot make .venv: Python's venv module does not work (Debian: apt install python3-venv)",
    )


def pip(
    title: str, log: str, *args: str | Path, progress_pattern: str | None = None, env: Mapping[str, str] | None = None
) -> None:
    run_logged(
        title,
        [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *args],
        BUILD / "logs" / log,
        explain=explain,
        progress_pattern=progress_pattern,
        # cmake and ninja of .venv
        env={"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}", **(env or {})},
    )


def install_build_requirements() -> None:
    requirements = build_requirements()
    stamp = VENV / ".build-requirements"
    if stamp_matches(stamp, repr(requirements)):
        return
    pip("installing the build's requirements", "requirements.log", "install", "--upgrade", *requirements)
    stamp.write_text(repr(requirements))


def lay_out_engine() -> None:
    # CMake does it too; here its one-line errors reach the terminal as they are
    if subprocess.run([PYTHON, ENGINE / "tree.py"]).returncode != 0:
        sys.exit(1)


def build_wheel(dist: Path, build_folder: Path, *settings: str, env: Mapping[str, str] | None = None) -> Path:
    """The one wheel in `dist`, which is emptied before. `settings` are scikit-build-core's, as NAME=VALUE."""
    shutil.rmtree(dist, ignore_errors=True)
    pip(
        "compiling the engine and the plugin, packing the wheel",
        f"{build_folder.name}.log",
        *("wheel", "--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", dist),
        *(f"--config-settings={setting}" for setting in (f"build-dir={build_folder}", *settings)),
        ROOT,
        progress_pattern=r"\[\d+/\d+\]",
        env=env,
    )
    (wheel,) = dist.glob("*.whl")
    return wheel


def install(wheel: Path) -> None:
    # dependencies change with pyproject.toml only
    key = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = VENV / ".dependencies"
    if not stamp_matches(stamp, key):
        pip("installing the dependencies", "dependencies.log", "install", f"{wheel}[{EXTRAS}]")
    pip("installing the wheel", "install.log", "install", "--no-deps", "--force-reinstall", wheel)
    stamp.write_text(key)


def without_page() -> str:
    """What to say of a wheel without the server's page."""
    if all((BUILD / "ui" / name).is_file() for name in ("dist/index.html", "LICENSES.txt")):  # as CMakeLists.txt asks
        return ""
    how = "`make ui` makes it" if shutil.which("npm") else "install npm, then `make ui` makes it"
    return f"; the server has no page for chats: {how}"


@contextmanager
def alone() -> Iterator[None]:
    """One build at a time."""
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise BuildError(f"Python {oldest} or newer is needed, this is {sys.version.split()[0]}")
    BUILD.mkdir(exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare() -> None:
    """What every build needs: compilers, .venv, the patched engine."""
    check_compilers()
    make_venv()
    install_build_requirements()
    lay_out_engine()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with alone():
        key = fingerprint()
        stamp = VENV / ".built"
        if stamp_matches(stamp, key) and PYTHON.exists():
            say("build: up to date")
            return
        prepare()
        wheel = build_wheel(BUILD / "dist", BUILD / "cmake")
        install(wheel)
        stamp.write_text(key)
        say(f"build: {wheel.relative_to(ROOT)} is installed in .venv{without_page()}")


if __name__ == "__main__":
    run_main(main)
