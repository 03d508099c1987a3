"""Reads models: key-values, and the rows of tensors, without holding more than the caller asks for.

What lives here: what a model is to the tools (`Source`), and GGUF files as one. Not here: what flash files mean
(format.py). Nothing is mapped into memory: a tensor is read when its rows are asked for.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools import ggml
from gguf_tools.errors import GgufToolsError
from gguf_tools.types import row_bytes
from llama_flash.file_kind import kind_of_file

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32
_BLOCK = 8 << 20  # bytes read at a time where a whole tensor is gone through
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

SCALARS: dict[GGUFValueType, str] = {  # -> struct format
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class KeyValue:
    """A GGUF value: an int, float, bool or str, or (type ARRAY) a list of them of type `sub_type`.

    Bytes of strings that are not UTF-8 are kept as lone surrogates ("surrogateescape").
    """

    value: Any
    type: GGUFValueType
    sub_type: GGUFValueType | None = None


class TensorInfo(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """In ggml's order: the row length first."""
        ...

    @property
    def kind(self) -> GGMLQuantizationType: ...


class SourceTensor(TensorInfo, Protocol):
    """A tensor of a model, read in rows. Rows are counted over all outer dimensions."""

    def raw(self, start: int, stop: int) -> Bytes:
        """Rows start to stop as stored: [rows, bytes per row]. Raises GgufToolsError if the file is cut off."""
        ...

    def floats(self, start: int, stop: int) -> Floats:
        """Rows start to stop, dequantised: [rows, row length]. Raises GgufToolsError as `raw` does."""
        ...


@runtime_checkable
class ColumnReader(Protocol):
    """What a SourceTensor may offer besides: a run of columns without reading the rest of each row."""

    def raw_columns(self, start: int, stop: int) -> Bytes:
        """Elements start to stop, both multiples of the type's block, of all rows: [rows, bytes]."""
        ...


class Source(Protocol):
    """A model."""

    @property
    def values(self) -> dict[str, KeyValue]: ...
    @property
    def tensors(self) -> dict[str, SourceTensor]:
        """In file order."""
        ...


def row_count(tensor: TensorInfo) -> int:
    """Rows over all outer dimensions."""
    return math.prod(tensor.shape[1:])


def row_length(tensor: TensorInfo) -> int:
    """Elements of a row."""
    return tensor.shape[0] if tensor.shape else 1


def raw_row_bytes(tensor: TensorInfo) -> int:
    """Bytes of a row as stored."""
    return row_bytes(tensor.kind, row_length(tensor))


def data_bytes(tensor: TensorInfo) -> int:
    """Bytes of all rows as stored."""
    return row_count(tensor) * raw_row_bytes(tensor)


def row_blocks(n_rows: int, bytes_per_row: int, limit: int = _BLOCK) -> Sequence[slice]:
    """Cuts the rows into runs of about `limit` bytes."""
    step = max(1, limit // max(1, bytes_per_row))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def raw_columns(tensor: SourceTensor, start: int, stop: int) -> Bytes:
    """Elements start to stop, both multiples of the type's block, of all rows: [rows, bytes]."""
    if isinstance(tensor, ColumnReader):
        return tensor.raw_columns(start, stop)
    begin, end = row_bytes(tensor.kind, start), row_bytes(tensor.kind, stop)
    out = np.empty((row_count(tensor), end - begin), np.uint8)
    for rows in row_blocks(len(out), raw_row_bytes(tensor)):
        out[rows] = tensor.raw(rows.start, rows.stop)[:, begin:end]
    return out


class OpenFile:
    """An open file, closed with the last tensor that refers to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    def read_into(self, out: Bytes, offset: int, tensor: str) -> None:
        """Fills `out`, contiguous, with the bytes at `offset`."""
        view, done = out.reshape(-1).data, 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise GgufToolsError(f"cannot be read: {error.strerror}", file=self.path, tensor=tensor) from None
            if count == 0:
                raise GgufToolsError(
                    f"cut off: {len(view)} bytes at {offset} are not all there", file=self.path, tensor=tensor
                )
            done += count


@dataclass(frozen=True)
class FileTensor:
    """A SourceTensor whose rows lie in a file one after the other."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    file: OpenFile

    def raw(self, start: int, stop: int) -> Bytes:
        size = raw_row_bytes(self)
        _check_range(self.name, start, stop, row_count(self))
        out = np.empty((stop - start, size), np.uint8)
        self.file.read_into(out, self.offset + start * size, self.name)
        return out

    def floats(self, start: int, stop: int) -> Floats:
        return ggml.dequantize(self.raw(start, stop), self.kind)

    def raw_columns(self, start: int, stop: int) -> Bytes:
        size, n_rows = raw_row_bytes(self), row_count(self)
        begin, end = row_bytes(self.kind, start), row_bytes(self.kind, stop)
        _check_range(self.name, begin, end, size)
        out = np.empty((n_rows, end - begin), np.uint8)
        if 2 * (end - begin) >= size:  # most of each row: one long read costs less than many short ones
            for rows in row_blocks(n_rows, size):
                out[rows] = self.raw(rows.start, rows.stop)[:, begin:end]
        else:
            for row in range(n_rows):
                self.file.read_into(out[row], self.offset + row * size + begin, self.name)
        return out


def _check_range(name: str, start: int, stop: int, end: int) -> None:
    if not 0 <= start <= stop <= end:
        raise IndexError(f"{name}: {start} to {stop} of {end}")


@dataclass(frozen=True)
class GgufSource:
    """A Source: one GGUF file, or all shards of a model."""

    files: tuple[Path, ...]
    values: dict[str, KeyValue]  # of the first file, without those that describe the split
    tensors: dict[str, SourceTensor]
    alignment: int  # of the first file


def open_gguf(path: str | os.PathLike[str]) -> GgufSource:
    """Reads the heads of a GGUF file, or of all shards of the model whose first shard it is.

    Raises:
        GgufToolsError: not GGUF, damaged or cut off, a tensor of unknown type or not within its file, shards missing.
        OSError: if a file cannot be opened.
    """
    files = shard_paths(Path(path))
    values: dict[str, KeyValue] = {}
    tensors: dict[str, SourceTensor] = {}
    alignment = _DEFAULT_ALIGNMENT
    for index, file in enumerate(files):
        if kind := kind_of_file(file):
            raise GgufToolsError(f"{kind}, not a GGUF file", file=file)
        head = _Head(file)
        if index == 0:
            values = {key: value for key, value in head.values.items() if not key.startswith("split.")}
            alignment = head.alignment
        for tensor in head.tensors:
            if tensor.name in tensors:
                raise GgufToolsError("is there twice", file=file, tensor=tensor.name)
            tensors[tensor.name] = tensor
    return GgufSource(tuple(files), values, tensors, alignment)


def shard_paths(path: Path) -> list[Path]:
    """All shards of the model whose first (or only) file is `path`. Raises GgufToolsError if one is missing."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if int(match[2]) != 1 or count < 1:
        raise GgufToolsError(f"is not the first of its {count} shards", file=path)
    shards = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise GgufToolsError(f"{len(missing)} of {count} shards are missing, the first is {missing[0]}", file=path)
    return shards


class _Head:
    """Key-values and tensors of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb", buffering=1 << 18) as stream:
            self._stream: BinaryIO = stream
            self._size = os.fstat(stream.fileno()).st_size
            if self._take(4) != b"GGUF":
                raise self._error("not a GGUF file")
            version = self._number("<I")
            if version not in (2, 3):
                raise self._error(f"GGUF version {version} (big-endian, or older than 2) cannot be read")
            n_tensors, n_values = self._number("<Q"), self._number("<Q")
            self.values = self._read_values(n_values)
            self.alignment = self._read_alignment()
            self.tensors = self._read_tensors(n_tensors)

    def _error(self, message: str, *, tensor: str = "", key: str = "") -> GgufToolsError:
        return GgufToolsError(message, file=self.path, tensor=tensor, key=key)

    def _take(self, count: int) -> bytes:
        if count > self._size - self._stream.tell():
            raise self._error("damaged, or cut off within its head")
        return self._stream.read(count)

    def _number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", errors="surrogateescape")

    def _read_values(self, count: int) -> dict[str, KeyValue]:
        values: dict[str, KeyValue] = {}
        for _ in range(count):
            key = self._string()
            if key in values:
                raise self._error("is there twice", key=key)
            values[key] = self._value(key)
        return values

    def _value(self, key: str) -> KeyValue:
        kind = self._value_type(key)
        if kind != GGUFValueType.ARRAY:
            return KeyValue(self._scalars(kind, 1, key)[0], kind)
        item, count = self._value_type(key), self._number("<Q")
        return KeyValue(self._scalars(item, count, key), kind, item)

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"is of the unknown type {number}", key=key) from None

    def _scalars(self, kind: GGUFValueType, count: int, key: str) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise self._error("is an array of arrays", key=key)
        layout = SCALARS[kind]
        if kind == GGUFValueType.BOOL:
            return [byte != 0 for byte in self._take(count)]
        values: list[Any] = np.frombuffer(self._take(count * struct.calcsize(layout)), layout).tolist()
        return values

    def _read_alignment(self) -> int:
        value = self.values.get("general.alignment")
        if value is None:
            return _DEFAULT_ALIGNMENT
        if value.type != GGUFValueType.UINT32 or value.value <= 0 or value.value & (value.value - 1):
            raise self._error(f"is {value.value!r}, not a power of two", key="general.alignment")
        return int(value.value)

    def _read_tensors(self, count: int) -> list[FileTensor]:
        infos = [self._tensor_info() for _ in range(count)]
        start = -(-self._stream.tell() // self.alignment) * self.alignment
        file = OpenFile(self.path)
        tensors = [FileTensor(name, shape, kind, start + offset, file) for name, shape, kind, offset in infos]
        end, before = start, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset % self.alignment:
                raise self._error(f"begins at {tensor.offset}, which is not aligned", tensor=tensor.name)
            if tensor.offset < end:
                raise self._error(f"overlaps {before}", tensor=tensor.name)
            end, before = tensor.offset + data_bytes(tensor), tensor.name
            if end > self._size:
                raise self._error(f"ends at byte {end} of a file of {self._size}: cut off", tensor=tensor.name)
        return tensors

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        n_dims = self._number("<I")
        if n_dims > _MAX_DIMENSIONS:
            raise self._error(f"has {n_dims} dimensions", tensor=name)
        shape = tuple(self._number("<Q") for _ in range(n_dims))
        number, offset = self._number("<I"), self._number("<Q")
        if 0 in shape:
            raise self._error(f"has the empty shape {list(shape)}", tensor=name)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._error(f"is of the unknown type {number}", tensor=name) from None
        try:
            row_bytes(kind, shape[0] if shape else 1)
        except ValueError as error:
            raise self._error(str(error), tensor=name) from None
        return name, shape, kind, offset
