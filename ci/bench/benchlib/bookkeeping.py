"""Instructions that decoding spends on which record is in which slot, counted by callgrind: the same on every machine.

A regression shows here where times are too noisy for it; so does a cost that grows faster than the model.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".cpp")
_PLUGIN = Path(__file__).resolve().parents[3] / "plugin" / "src"
_TOKENS = 200


@dataclass(frozen=True)
class Shape:
    layers: int
    records: int  # of a layer's tensor: experts, or neurons
    used: int  # of these, by a token
    tensors: int  # of a layer
    share: int = 50  # of all that slots hold, in percent


BASE = Shape(12, 128, 8, 3)
SHAPES = {
    "12 layers of 128 experts": BASE,
    "layers x2": Shape(24, 128, 8, 3),
    "layers x4": Shape(48, 128, 8, 3),
    "experts x2": Shape(12, 256, 8, 3),
    "experts x4": Shape(12, 512, 8, 3),
    "a quarter in slots": Shape(12, 128, 8, 3, 25),
    "8 layers of 16384 neurons": Shape(8, 16384, 1000, 1, 10),
}


@dataclass(frozen=True)
class Count:
    shape: Shape
    per_token: float  # instructions
    misses: float  # per token

    @property
    def per_use(self) -> float:
        """Instructions for each record that a token uses."""
        return self.per_token / (self.shape.layers * self.shape.used * self.shape.tensors)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "per_use": self.per_use}


def count_all() -> dict[str, Count] | str:
    """Counts for all shapes; why not, where valgrind or a compiler is missing."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler or not shutil.which("valgrind"):
        return "valgrind is not installed" if compiler else "there is no C++ compiler"
    with tempfile.TemporaryDirectory(prefix="llama-flash-callgrind-") as folder:
        program = Path(folder) / "bookkeeping"
        sources = [str(_SOURCE), str(_PLUGIN / "memory/cache.cpp")]
        subprocess.run([compiler, "-O2", "-g", "-std=c++17", f"-I{_PLUGIN}", *sources, "-o", str(program)], check=True)
        return {name: _count(program, shape) for name, shape in SHAPES.items()}


def _count(program: Path, shape: Shape) -> Count:
    out = program.with_suffix(".out")
    numbers = (shape.layers, shape.records, shape.used, shape.tensors, shape.share, _TOKENS)
    callgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=decode_token"]
    command = [*callgrind, f"--callgrind-out-file={out}", str(program), *map(str, numbers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    total = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    if total is None:
        raise RuntimeError(f"callgrind counted nothing: {done.stderr.strip()}")
    return Count(shape, int(total[1]) / _TOKENS, int(done.stdout) / _TOKENS)
