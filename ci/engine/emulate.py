"""`make test-boards`: the wheel for aarch64, the plugin's tests and an aarch64 Python with the wheel, run by qemu-user.

The Python is Debian's, laid out in build/aarch64/root with the wheel and what it depends on in build/aarch64/site:

    qemu-aarch64 -L build/aarch64/root -E PYTHONPATH=build/aarch64/site build/aarch64/root/usr/bin/python3.* PROGRAM
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import cross
import wheel
from build import BUILD, ROOT, VENV, alone, explain, pip
from report import BuildError, run_logged, run_main, say

ARCH = "aarch64"
FOLDER = BUILD / ARCH
GLIBC = range(35, 16, -1)  # 2.x: the newest that a wheel may need, and older ones


def test_plugin() -> None:
    """Raises BuildError where a test fails."""
    folder = wheel.build_folder(ARCH)
    cmake, ctest = VENV / "bin/cmake", VENV / "bin/ctest"
    log = BUILD / "logs"
    configure: list[str | Path] = [cmake, "-S", ROOT / "ci/engine", "-B", folder, "-DLLAMA_FLASH_TESTS=ON"]
    run_logged("configuring the plugin's tests", configure, log / "boards-configure.log", explain=explain)
    build: list[str | Path] = [cmake, "--build", folder, "--target", "plugin_tests"]
    run_logged("compiling them", build, log / "boards-build.log", explain=explain, progress_pattern=r"\[\d+/\d+\]")
    run: list[str | Path] = [ctest, "--test-dir", folder / "plugin", "--output-on-failure", "--timeout", "900"]
    lines = run_logged("running them", run, log / "boards-tests.log", explain=_failed, progress_pattern=r"\d+/\d+ Test")
    passed = sum(" Passed " in line for line in lines)
    left_out = [match[1] for line in lines if (match := re.search(r"(test_\w+) \(Disabled\)", line))]
    say(f"plugin tests under qemu-{ARCH}: {passed} passed, not run: {', '.join(left_out) or 'none'}")


def _failed(lines: list[str]) -> str:
    failed = [match[1] for line in lines if (match := re.search(r"(test_\w+) .*\*\*\*", line))]
    return f"these fail under qemu-{ARCH}: {', '.join(failed)}" if failed else explain(lines)


def lay_out(made: Path) -> Path:
    """Debian's aarch64 Python with the wheel. Returns its interpreter."""
    cross.unpack(FOLDER / "root", ["python3", "libstdc++6"], ARCH)
    (python,) = (
        path for path in (FOLDER / "root/usr/bin").glob("python3.*") if re.fullmatch(r"python3\.\d+", path.name)
    )
    shutil.rmtree(FOLDER / "site", ignore_errors=True)
    pip(
        "installing the wheel beside it",
        "boards-site.log",
        *("install", "--target", FOLDER / "site", "--only-binary=:all:", "--implementation=cp"),
        f"--python-version={python.name.removeprefix('python')}",
        *(f"--platform=manylinux_2_{minor}_{ARCH}" for minor in GLIBC),
        f"--platform=manylinux2014_{ARCH}",
        made,
    )
    return python


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cross.toolchain(ARCH)
    cross.emulator(ARCH)
    with alone():
        made = wheel.make(ARCH)
        test_plugin()
        python = lay_out(made)
        if not (FOLDER / "site/llama_cpp").is_dir():
            raise BuildError(f"{FOLDER / 'site'} has no llama_cpp")
        say(f"python: {python.relative_to(ROOT)}, to be run by qemu-{ARCH}")


if __name__ == "__main__":
    run_main(main)
