"""What two hosts must have in common: the model's files, the engine's build; for the same bits, the CPU's features."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from ..errors import FlashWorkerError
from ..model.gguf import GgufMeta
from ..native.build import build_mark
from ..version import version

__all__ = ["compare", "identity_of", "other_cpu"]

_FLAGS = ("avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")

_SAID = {  # what is compared, in this order, and what it means if it differs
    "version": ("llama-flash {theirs}, this one {ours}", "install the same version on both"),
    "bytes": ("a model of {theirs} bytes, this one {ours}", "copy the client's file to the worker"),
    "head": ("a model with another head or other tensors", "copy the client's file to the worker"),
    "build": ("an engine from another build", "install the same wheel on both"),
}


def identity_of(meta: GgufMeta) -> dict[str, str]:
    """By what name, which text. The weights themselves are not looked at: that takes as long as reading them."""
    return {
        "version": version(),
        "bytes": str(sum(path.stat().st_size for path in meta.files)),
        "head": _head_mark(meta),
        "build": build_mark(),
        "cpu": _cpu_mark(),
    }


def compare(ours: dict[str, str], theirs: object, endpoint: str) -> None:
    """Raises FlashWorkerError where a worker has something else."""
    for name, (said, mend) in _SAID.items():
        other = theirs.get(name) if isinstance(theirs, dict) else None
        if other != ours[name]:
            what = said.format(theirs=other, ours=ours[name])
            raise FlashWorkerError(f"worker {endpoint} has {what}; {mend}", host=endpoint)


def other_cpu(ours: dict[str, str], theirs: object) -> str:
    """Which features a worker's CPU has, and which this one's; "": the same."""
    other = str(theirs.get("cpu")) if isinstance(theirs, dict) else ""
    return "" if other == ours["cpu"] else f"a CPU with {other or 'none of them'}, this one {ours['cpu'] or 'none'}"


def _head_mark(meta: GgufMeta) -> str:
    """Of the key-values and of the tensors' names, types, shapes and places."""
    mark = hashlib.sha256()
    for path in meta.files:
        first = min((t.offset for t in meta.tensors.values() if t.file == path), default=path.stat().st_size)
        with path.open("rb") as file:
            left = first
            while left > 0 and (piece := file.read(min(left, 1 << 20))):
                mark.update(piece)
                left -= len(piece)
    numbers = {path: i for i, path in enumerate(meta.files)}
    for tensor in meta.tensors.values():
        place = [tensor.name, tensor.shape, tensor.type, numbers[tensor.file], tensor.offset, tensor.size]
        mark.update(json.dumps(place).encode())
    return mark.hexdigest()


@cache
def _cpu_mark() -> str:
    """The features that decide which kernels run."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            flags = line.partition(":")[2].split()
            return " ".join(name for name in _FLAGS if name in flags)
    return ""
