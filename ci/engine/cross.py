"""What a build for another architecture needs: Debian's cross compiler, and packages that are unpacked, not installed.

    python ci/engine/cross.py FOLDER PACKAGE...

unpacks Debian's packages for aarch64, with all that they depend on, into FOLDER: an aarch64 Python, to be run by
qemu-user. Taken by apt-get with state of its own: nothing of this machine's changes, and nobody needs to be root.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from report import BuildError, run_logged, run_main, say

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
ARCHITECTURES = {"aarch64": "arm64"}  # that can be built for on others: as the compiler and as Debian call them
PACKAGES = BUILD / "debian-aarch64"  # as in aarch64.cmake


def toolchain(arch: str) -> Path:
    """The file for CMake. BuildError: nothing here compiles for `arch`."""
    if arch not in ARCHITECTURES:
        raise BuildError(f"no cross-build for {arch}: run `make wheel` on such a machine (here: aarch64)")
    compiler = f"{arch}-linux-gnu-g++"
    if not shutil.which(compiler):
        raise BuildError(f"{compiler} is not there (Debian: apt install g++-{arch}-linux-gnu)")
    return ROOT / f"ci/engine/{arch}.cmake"


def emulator(arch: str) -> str:
    """The program that runs programs of `arch`. BuildError: there is none."""
    found = shutil.which(f"qemu-{arch}") or shutil.which(f"qemu-{arch}-static")
    if not found:
        raise BuildError(f"qemu-{arch} is not there (Debian: apt install qemu-user)")
    return found


def unpack(folder: Path, names: list[str], arch: str, *, alone: bool = False) -> None:
    """Debian's packages for `arch` in `folder`, `alone` or with what they depend on. Does nothing if they are there."""
    stamp = folder / ".packages"
    wanted = repr((sorted(names), alone))
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if not shutil.which("apt-get"):
        raise BuildError(f"{', '.join(names)} for {arch} cannot be taken: there is no apt-get")
    with tempfile.TemporaryDirectory(prefix="llama-flash-apt") as tmp:
        _download(Path(tmp), names, ARCHITECTURES[arch], alone)
        folder.mkdir(parents=True)
        for package in sorted(Path(tmp, "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    # absolute links are for a root that this folder is not
    for link in folder.rglob("*"):
        if link.is_symlink() and link.readlink().is_absolute():
            target = folder / link.readlink().relative_to("/")
            link.unlink()
            with contextlib.suppress(OSError):
                link.symlink_to(target)
    stamp.write_text(wanted)


def _download(tmp: Path, names: list[str], arch: str, alone: bool) -> None:
    for each in ("state/lists/partial", "archives/partial"):
        (tmp / each).mkdir(parents=True)
    (tmp / "status").touch()  # nothing is installed
    settings = {
        "Dir::State": tmp / "state",
        "Dir::State::status": tmp / "status",
        "Dir::Cache": tmp,
        "APT::Architecture": arch,
        "APT::Architectures": arch,
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    log = BUILD / "logs/packages.log"

    def explain(lines: list[str]) -> str:
        return next((line for line in lines if line.startswith("E: ")), "apt-get failed")

    run_logged(f"looking for packages for {arch}", [*apt, "update"], log, explain=explain)
    take = ["download"] if alone else ["install", "--yes", "--no-install-recommends", "--download-only"]
    run_logged("taking them", [*apt, *take, *names], log, explain=explain, cwd=tmp / "archives")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("package", nargs="+")
    args = parser.parse_args()
    unpack(args.folder.resolve(), args.package, "aarch64")
    say(f"packages: {args.folder}")


if __name__ == "__main__":
    run_main(main)
