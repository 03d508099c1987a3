"""What a GGUF file holds, without its tensor data: key-values and where each tensor lies.

Reads the head of the file only, and not through a mapping: the page cache counts against a memory cap. Long arrays (the
vocabulary) are skipped, so that a file with 150 000 tokens takes a fraction of a second.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .errors import FlashFormatError

__all__ = [
    "GgufMeta",
    "SkippedArray",
    "TensorInfo",
    "check_vocabulary",
    "kind_of_file",
    "read_gguf",
    "shard_paths",
]

_STRING, _ARRAY = 8, 9
_SCALARS = {  # GGUF value type -> struct format
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TYPE_NAMES = (  # by GGUF value type
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array"),
    *("uint64", "int64", "float64"),
)
_LONGEST_ARRAY = 4096  # longer ones are skipped: per-layer numbers are wanted, vocabularies are not
_LONGEST_STRING = 1 << 30
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class SkippedArray:
    """An array that was not read."""

    length: int


Scalar = int | float | bool | str
Value = Scalar | list[Scalar] | SkippedArray


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # as ggml's ne: the row length first
    type: int  # enum ggml_type
    file: Path
    offset: int  # bytes from the start of the file
    size: int  # bytes up to the next tensor or the end of the file: alignment padding included

    @property
    def layer(self) -> int | None:
        """N of "blk.N.", None for other tensors."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class GgufMeta:
    """A model: one GGUF file, or all of its shards."""

    files: tuple[Path, ...]
    values: dict[str, Value]  # of the first file
    tensors: dict[str, TensorInfo]
    file_bytes: int  # all shards
    types: dict[str, str] = field(default_factory=dict)  # of the values: "uint32", "string[]"

    @property
    def architecture(self) -> str:
        value = self.values.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: int = 0) -> int:
        """Whole number of "{architecture}.{key}"; the largest one where it is given per layer."""
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            return max((int(v) for v in value if isinstance(v, (int, float))), default=default)
        return int(value) if isinstance(value, (int, float)) else default

    def per_layer(self, key: str, n_layer: int, default: int = 0) -> list[int]:
        """Whole numbers of "{architecture}.{key}" for each layer, whether it is given once or per layer."""
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and len(value) >= n_layer:
            return [int(v) if isinstance(v, (int, float)) else default for v in value[:n_layer]]
        return [self.number(key, default)] * n_layer

    @property
    def n_vocab(self) -> int:
        tokens = self.values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, SkippedArray):
            return tokens.length
        return len(tokens) if isinstance(tokens, list) else self.number("vocab_size")


def shard_paths(path: str | os.PathLike[str]) -> list[Path]:
    """All shards of the model whose first (or only) file is `path`.

    Raises:
        FlashFormatError: if a shard is missing.
    """
    first = Path(path)
    match = _SHARD.fullmatch(first.name)
    if match is None:
        return [first]
    count = int(match[3])
    shards = [first.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise FlashFormatError(f"{first}: {len(missing)} of {count} shards are missing, the first is {missing[0]}")
    return shards


def kind_of_file(path: str | os.PathLike[str]) -> str:
    """What is at `path` where that is no ordinary file: "a folder", "a pipe (FIFO)", ...; else "".

    Opening a pipe would wait for somebody to write to it. Raises OSError: there is nothing, or it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe (FIFO)"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "")


def check_vocabulary(meta: GgufMeta, *, text: bool = True) -> None:
    """Refuses a model without a vocabulary, which the engine ends the process for.

    text: it is to take or give text; else only what the engine cannot even load is refused.

    Raises FlashFormatError.
    """
    file, kind = meta.files[0], meta.values.get("tokenizer.ggml.model")
    if kind is None:
        raise FlashFormatError(
            f"{file}: has no vocabulary (the key tokenizer.ggml.model is missing): the engine cannot load it; convert "
            "the model again, with its tokenizer"
        )
    if kind == "none" and text:
        raise FlashFormatError(
            f"{file}: has no vocabulary (tokenizer.ggml.model is none), so it takes tokens and no text; in Python "
            "Llama.eval and Llama.generate do that"
        )


def read_gguf(path: str | os.PathLike[str]) -> GgufMeta:
    """Reads key-values and tensor infos of the model that begins with file `path`.

    Raises:
        FlashFormatError: not GGUF, no ordinary file, or cut off within its head, or shards missing.
        OSError: if a file cannot be read.
    """
    files = shard_paths(path)
    values: dict[str, Value] = {}
    types: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    file_bytes = 0
    for index, file in enumerate(files):
        if kind := kind_of_file(file):
            raise FlashFormatError(f"{file}: {kind}, not a GGUF file")
        with file.open("rb", buffering=1 << 18) as stream:
            size = os.fstat(stream.fileno()).st_size
            try:
                shard_values, shard_types, infos = _read_file(stream, file, size)
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
                raise FlashFormatError(f"{file}: damaged or cut off within its head ({error})") from None
            finally:
                # the head has been parsed: what the kernel read ahead only takes memory
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file_bytes += size
        if index == 0:
            values, types = shard_values, shard_types
        for info in infos:
            tensors[info.name] = info
    return GgufMeta(tuple(files), values, tensors, file_bytes, types)


def _read_file(stream: BinaryIO, file: Path, size: int) -> tuple[dict[str, Value], dict[str, str], list[TensorInfo]]:
    if stream.read(4) != b"GGUF":
        raise FlashFormatError(f"{file}: not a GGUF file")
    version = _unpack(stream, "<I")
    if version not in (2, 3):
        raise FlashFormatError(f"{file}: GGUF version {version} (big-endian or older than 2) cannot be read")
    n_tensors, n_values = _unpack(stream, "<Q"), _unpack(stream, "<Q")
    if n_tensors > 1 << 24 or n_values > 1 << 24:
        raise FlashFormatError(f"{file}: claims {n_tensors} tensors and {n_values} values: damaged")
    values: dict[str, Value] = {}
    types: dict[str, str] = {}
    for _ in range(n_values):
        key = _string(stream)
        values[key], types[key] = _value(stream, int(_unpack(stream, "<I")), file)
    heads = []
    for _ in range(n_tensors):
        name = _string(stream)
        n_dims = int(_unpack(stream, "<I"))
        if n_dims > 8:
            raise FlashFormatError(f"{file}: tensor {name} has {n_dims} dimensions: damaged")
        shape = tuple(int(_unpack(stream, "<Q")) for _ in range(n_dims))
        heads.append((name, shape, int(_unpack(stream, "<I")), int(_unpack(stream, "<Q"))))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise FlashFormatError(f"{file}: general.alignment is {alignment!r}")
    start = -(-stream.tell() // alignment) * alignment
    ends = _next_offsets((offset for *_, offset in heads), max(0, size - start))
    infos = [
        TensorInfo(name, shape, kind, file, start + offset, ends[offset] - offset)
        for name, shape, kind, offset in heads
    ]
    return values, types, infos


def _next_offsets(offsets: Iterable[int], end: int) -> dict[int, int]:
    ordered = sorted(set(offsets))
    return dict(zip(ordered, [*ordered[1:], max(end, ordered[-1])], strict=True)) if ordered else {}


def _value(stream: BinaryIO, kind: int, file: Path) -> tuple[Value, str]:
    """A value and the name of its type."""
    if kind != _ARRAY:
        return _string(stream) if kind == _STRING else _scalar(stream, kind, file), _TYPE_NAMES[kind]
    item, length = int(_unpack(stream, "<I")), int(_unpack(stream, "<Q"))
    if item != _STRING and item not in _SCALARS:
        raise FlashFormatError(f"{file}: array of unknown type {item}")
    return _array(stream, item, length, file), f"{_TYPE_NAMES[item]}[]"


def _array(stream: BinaryIO, item: int, length: int, file: Path) -> Value:
    if length > _LONGEST_ARRAY:
        if item == _STRING:
            _skip_strings(stream, length)
        else:
            size = length * struct.calcsize(_SCALARS[item])
            if size > os.fstat(stream.fileno()).st_size - stream.tell():
                raise struct.error("an array ends behind the end of the file")
            stream.seek(size, os.SEEK_CUR)
        return SkippedArray(length)
    return [_string(stream) if item == _STRING else _scalar(stream, item, file) for _ in range(length)]


def _skip_strings(stream: BinaryIO, count: int) -> None:
    read, unpack = stream.read, struct.Struct("<Q").unpack
    for _ in range(count):
        length = unpack(read(8))[0]
        if len(read(length) if length <= 4096 else _long(stream, length)) != length:
            raise struct.error("a string ends behind the end of the file")


def _long(stream: BinaryIO, length: int) -> bytes:
    if length > _LONGEST_STRING:
        raise struct.error(f"a string of {length} bytes")
    return stream.read(length)


def _string(stream: BinaryIO) -> str:
    length = int(_unpack(stream, "<Q"))
    data = _long(stream, length)
    if len(data) != length:
        raise struct.error("a string ends behind the end of the file")
    return data.decode("utf-8", errors="replace")


def _scalar(stream: BinaryIO, kind: int, file: Path) -> Scalar:
    if kind not in _SCALARS:
        raise FlashFormatError(f"{file}: value of unknown type {kind}")
    value: Scalar = struct.unpack(_SCALARS[kind], stream.read(struct.calcsize(_SCALARS[kind])))[0]
    return value


def _unpack(stream: BinaryIO, layout: str) -> int:
    value: int = struct.unpack(layout, stream.read(struct.calcsize(layout)))[0]
    return value
