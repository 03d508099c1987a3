"""Reads models: key-values, and the rows of tensors, without holding more than the caller asks for.

What lives here: what a model is to the tools (`Source`), and GGUF files as one. Not here: how a file's head is read
(llama_flash), and what flash files mean (format.py). Nothing is mapped into memory: a tensor is read when its rows are
asked for.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools import ggml
from gguf_tools.errors import GgufToolsError, errors_of_tools
from gguf_tools.types import row_bytes
from llama_flash.model.gguf import shard_paths
from llama_flash.model.head import Head, read_head

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_DEFAULT_ALIGNMENT = 32
_BLOCK = 8 << 20  # bytes read at a time where a whole tensor is gone through

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
    with errors_of_tools():
        files = shard_paths(path)
    values: dict[str, KeyValue] = {}
    tensors: dict[str, SourceTensor] = {}
    alignment = _DEFAULT_ALIGNMENT
    for index, file in enumerate(files):
        with errors_of_tools():
            head = read_head(file, whole=True)
        if index == 0:
            found = {key: _key_value(value, head.types[key]) for key, value in head.values.items()}
            values = {key: value for key, value in found.items() if not key.startswith("split.")}
            alignment = head.alignment
        _check_alignment(head, file)
        for tensor in _tensors(head, file):
            if tensor.name in tensors:
                raise GgufToolsError("is there twice", file=file, tensor=tensor.name)
            tensors[tensor.name] = tensor
    return GgufSource(tuple(files), values, tensors, alignment)


def _key_value(value: Any, kind: str) -> KeyValue:
    """kind: "uint32", "string[]"."""
    if kind.endswith("[]"):
        return KeyValue(value, GGUFValueType.ARRAY, GGUFValueType[kind.removesuffix("[]").upper()])
    return KeyValue(value, GGUFValueType[kind.upper()])


def _check_alignment(head: Head, file: Path) -> None:
    kind = head.types.get("general.alignment", "uint32")
    if kind != "uint32":
        raise GgufToolsError(f"is of type {kind}, not uint32", file=file, key="general.alignment")


def _tensors(head: Head, file: Path) -> list[FileTensor]:
    """The file's tensors, in its order, whose data lie one behind the other."""
    opened = OpenFile(file)
    tensors = []
    for info in head.tensors:
        if 0 in info.shape:
            raise GgufToolsError(f"has the empty shape {list(info.shape)}", file=file, tensor=info.name)
        try:
            kind = GGMLQuantizationType(info.type)
        except ValueError:
            raise GgufToolsError(f"is of the unknown type {info.type}", file=file, tensor=info.name) from None
        tensors.append(FileTensor(info.name, info.shape, kind, info.offset, opened))
    end, before = head.start, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset % head.alignment:
            raise GgufToolsError(f"begins at {tensor.offset}, which is not aligned", file=file, tensor=tensor.name)
        if tensor.offset < end:
            raise GgufToolsError(f"overlaps {before}", file=file, tensor=tensor.name)
        end, before = tensor.offset + data_bytes(tensor), tensor.name
    return tensors
