"""Safetensors files: their headers, checked, and their tensors, read in rows without mapping or loading the file.

The format: a little-endian uint64, the size of the header; the header, a JSON object of tensors by name; the data, to
which data_offsets are relative, without gaps. https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from gguf_tools.errors import GgufToolsError
from gguf_tools.source import FileTensor, OpenFile, SourceTensor

_MAX_HEADER = 100_000_000  # bytes, the limit of the format's own library
_MAX_DIMENSIONS = 8
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
WEIGHT_TYPES = {name: GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}


@dataclass(frozen=True)
class SafetensorsWeight:
    """A `Weight` (checkpoint.py) in a safetensors file."""

    name: str
    shape: tuple[int, ...]  # the row length last
    dtype: str  # as the format names it: F16, BF16, I64, ...
    offset: int  # bytes from the start of the file
    file: OpenFile

    def tensor(self, name: str) -> SourceTensor:
        if self.dtype not in WEIGHT_TYPES:
            known = ", ".join(WEIGHT_TYPES)
            raise GgufToolsError(f"is of type {self.dtype}, not {known}", file=self.file.path, tensor=self.name)
        return FileTensor(name, self.shape[::-1], WEIGHT_TYPES[self.dtype], self.offset, self.file)


def read_safetensors(path: Path) -> dict[str, SafetensorsWeight]:
    """The tensors of a file, by name.

    Raises:
        GgufToolsError: the file is damaged or cut off; names the tensor where one is concerned.
        OSError: if the file cannot be opened.
    """
    header, begin, size = _read_header(path)
    file = OpenFile(path)
    weights = {
        name: _weight(file, name, entry, begin, size) for name, entry in header.items() if name != "__metadata__"
    }
    end = begin
    for weight in sorted(weights.values(), key=lambda weight: (weight.offset, _n_bytes(weight))):
        if weight.offset != end:
            what = "overlaps another one" if weight.offset < end else f"leaves {weight.offset - end} bytes unused"
            raise GgufToolsError(f"{what}: the header is damaged", file=path, tensor=weight.name)
        end += _n_bytes(weight)
    if end != begin + size:
        raise GgufToolsError(f"{begin + size - end} bytes at its end belong to no tensor", file=path)
    return weights


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the data's bytes."""
    with path.open("rb") as file:
        total = path.stat().st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > total - 8:
            raise GgufToolsError("is cut off, or not a safetensors file: its header is not all there", file=path)
        if length > _MAX_HEADER:
            raise GgufToolsError(f"is not a safetensors file: a header of {length} bytes", file=path)
        data = file.read(length)
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise GgufToolsError(f"is not a safetensors file: its header is not JSON ({error})", file=path) from None
    if not isinstance(header, dict):
        raise GgufToolsError("is not a safetensors file: its header is not a JSON object", file=path)
    return header, 8 + length, total - 8 - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _weight(file: OpenFile, name: str, entry: Any, begin: int, size: int) -> SafetensorsWeight:
    def error(message: str) -> GgufToolsError:
        return GgufToolsError(message, file=file.path, tensor=name)

    if not isinstance(entry, dict):
        raise error("its entry in the header is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise error(f"is of the unknown type {dtype!r:.40}")
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS:
        raise error(f"has the shape {shape!r:.60}, which is none")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"has the offsets {offsets!r:.60}, which are none")
    if offsets[1] > size:
        raise error(f"ends at byte {offsets[1]} of the data, of which {size} are there: the file is cut off")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise error(f"is {offsets[1] - offsets[0]} bytes, but {shape!r:.60} of {dtype} are {bits / 8:g}")
    return SafetensorsWeight(name, tuple(shape), dtype, begin + offsets[0], file)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _n_bytes(weight: SafetensorsWeight) -> int:
    return math.prod(weight.shape) * _BITS[weight.dtype] // 8
