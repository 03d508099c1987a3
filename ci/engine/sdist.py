"""The pinned engine: taken once through pip, which checks its hash, and kept in build/sdist."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from report import BuildError, run_logged

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "ci/engine/requirements.txt"


@dataclass(frozen=True)
class Pin:
    """What requirements.txt pins."""

    name: str  # as PyPI spells it
    version: str
    sha256: str

    @property
    def stem(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}"


def read_pin(requirements: Path = REQUIREMENTS) -> Pin:
    match = re.search(
        r"^([\w-]+)==([\w.]+)\s*\\?\s*--hash=sha256:([0-9a-f]{64})\s*$", requirements.read_text(), re.MULTILINE
    )
    if not match:
        raise BuildError(f"{requirements}: expected one line NAME==VERSION --hash=sha256:HEX")
    return Pin(*match.groups())


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _explain(lines: list[str]) -> str:
    text = "\n".join(lines)
    if "DO NOT MATCH THE HASHES" in text:
        got = re.search(r"Got\s+([0-9a-f]{64})", text)
        want = re.search(r"Expected sha256 ([0-9a-f]{64})", text)
        return (
            "the engine's sdist has the wrong hash: "
            f"expected sha256 {want.group(1) if want else '?'}, got {got.group(1) if got else '?'}"
        )
    errors = [line for line in lines if line.startswith("ERROR:")]
    return f"pip could not take the engine's sdist: {errors[-1][7:] if errors else 'see the log'}"


def fetch(cache: Path = ROOT / "build/sdist") -> Path:
    """The path of the sdist; takes it through pip if it is not in `cache` yet. Its hash is checked either way."""
    pin = read_pin()
    path = cache / f"{pin.stem}.tar.gz"
    if path.exists():
        if (got := sha256_of(path)) == pin.sha256:
            return path
        raise BuildError(f"wrong hash: expected sha256 {pin.sha256}, got {got}; delete {path} and build again")
    cache.mkdir(parents=True, exist_ok=True)
    # pip prepares the sdist's metadata; its build backend is ours too, so no isolated environment is needed
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    command += ["--requirement", str(REQUIREMENTS), "--dest", str(cache)]
    run_logged(f"taking {pin.stem} through pip", command, cache.parent / "logs/sdist.log", explain=_explain)
    if not path.exists():
        raise BuildError(f"pip did not leave {path.name} in {cache}")
    return path
