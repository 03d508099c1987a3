"""`make sanitize`: engine and plugin built for ASan (with UBSan in the plugin) and for TSan, and the tests under them.

What runs: plugin/tests through ctest, then `pytest -m sanitize` with the sanitized libraries in place of .venv's. With
`--kind server` alone: llama-server is instrumented, too, and is sent hostile requests. With `--kind worker` alone: a
worker with the libraries of the address build is sent hostile messages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from build import BUILD, ENGINE, VENV, explain
from report import BuildError, run_logged, run_main, say


@dataclass(frozen=True)
class Kind:
    name: str
    sanitizer: str  # LLAMA_FLASH_SANITIZE
    runtimes: tuple[str, ...]  # loaded before Python, which is not instrumented; gcc's names
    options: dict[str, str]
    python_options: dict[str, str]  # in place of `options` where Python runs
    pytest: tuple[str, ...] = ("-m", "sanitize and not weighs")  # what is run, and how it is chosen
    target: str = "plugin_tests"  # that is built beside the plugin
    folder: str = ""  # of another kind, whose build is used

    @property
    def alone(self) -> bool:
        """Whether only one test of it runs, and only where --kind names it."""
        return self.target != "plugin_tests" or self.folder != ""


_ADDRESS = Kind(
    "address",
    "address",
    ("libasan.so", "libubsan.so"),
    {
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    },
    # CPython and its extensions keep memory until the process ends
    {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1"},
)
_HOSTILE = ("tests/workers/test_rpc_hostile.py", "tests/workers/test_rpc_fuzz.py")
KINDS = (
    _ADDRESS,
    replace(
        _ADDRESS,
        name="server",
        pytest=("-m", "", "tests/server/test_hostile_requests.py"),
        target="llama-server-impl",
    ),
    replace(
        _ADDRESS,
        name="worker",
        # the rest needs a worker's budget, which a sanitizer's memory does not keep to
        pytest=("-m", "", "-k", "not thousands and not says_few", *_HOSTILE),
        folder="address",
    ),
    Kind(
        "thread",
        "thread",
        ("libtsan.so",),
        # Python and numpy are not instrumented: what they synchronise among themselves is not seen
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66"},
        {},
    ),
)


def runtime_path(name: str) -> str:
    compiler = os.environ.get("CXX", "c++").split()
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        raise BuildError(f"{compiler[0]} has no {name}: install gcc's sanitizer runtimes or set CXX=g++")
    return path


def without_aslr() -> list[str]:
    """TSan's shadow memory does not fit every random layout; without randomisation it always does."""
    setarch = shutil.which("setarch")
    if not setarch:
        return []
    command = [setarch, "-R"]
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


def build(kind: Kind, folder: Path) -> None:
    path = {"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    run_logged(
        f"configuring the {kind.name} build",
        [
            *("cmake", "-S", ENGINE, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"),
            *(f"-DPython_EXECUTABLE={VENV / 'bin/python'}", f"-DLLAMA_FLASH_SANITIZE={kind.sanitizer}"),
            f"-DLLAMA_FLASH_SANITIZE_SERVER={'ON' if kind.name == 'server' else 'OFF'}",
            # line numbers are enough, and -O1 compiles in half the time
            *("-DCMAKE_C_FLAGS_RELWITHDEBINFO=-O1 -g1", "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1"),
            "-DLLAMA_FLASH_TESTS=ON",
        ],
        BUILD / f"logs/sanitize-{kind.name}-configure.log",
        explain=explain,
        env=path,
    )
    run_logged(
        f"compiling the {kind.name} build",
        ["cmake", "--build", folder, "--target", "llama_flash", kind.target],
        BUILD / f"logs/sanitize-{kind.name}.log",
        explain=explain,
        progress_pattern=r"\[\d+/\d+\]",
        env=path,
    )


def run(kind: Kind, folder: Path, pytest_arguments: list[str]) -> bool:
    options = {**os.environ, **kind.options}
    prefix = without_aslr() if kind.sanitizer == "thread" else []
    ok = True
    if not kind.alone:
        say(f"plugin/tests under the {kind.name} sanitizer")
        ctest = [str(VENV / "bin/ctest"), "--test-dir", str(folder / "plugin"), "--output-on-failure"]
        ok = subprocess.run([*prefix, *ctest], env=options).returncode == 0
    say(f"pytest {' '.join(kind.pytest)} under the {kind.sanitizer} sanitizer")
    python = {
        **options,
        **kind.python_options,
        "LD_PRELOAD": " ".join(runtime_path(name) for name in kind.runtimes),
        "LLAMA_CPP_LIB_PATH": str(folder / "bin"),
        "LLAMA_FLASH_SANITIZE": kind.sanitizer,
        # so that ASan sees every allocation
        "PYTHONMALLOC": "malloc",
    }
    # capture=sys: pytest's default would keep a sanitizer's report to itself when the report ends the process
    pytest = [
        str(VENV / "bin/python"),
        "-m",
        "pytest",
        *kind.pytest,
        "--capture=sys",
        *pytest_arguments,
    ]
    code = subprocess.run([*prefix, *pytest], env=python)
    no_tests = 5
    if code.returncode == no_tests:
        say("no test is marked sanitize yet")
    return ok and code.returncode in (0, no_tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="only this one")
    args, pytest_arguments = parser.parse_known_args()
    failed = []
    for kind in KINDS:
        if args.kind == kind.name or (args.kind is None and not kind.alone):
            folder = BUILD / f"sanitize-{kind.folder or kind.name}"
            build(kind, folder)
            if not run(kind, folder, pytest_arguments):
                failed.append(kind.name)
    if failed:
        raise BuildError(f"failed under the sanitizers: {', '.join(failed)}")
    say("sanitize: clean")


if __name__ == "__main__":
    run_main(main)
