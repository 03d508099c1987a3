"""The head of a GGUF file: key-values, and where each tensor lies. Read here for llama_flash and for gguf_tools.

Reads the head only, and not through a mapping: the page cache counts against a memory cap. What the head says is
compared with the file's size before it is believed.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FlashFormatError
from ..file_kind import kind_of_file
from .ggml_types import tensor_bytes

__all__ = ["GET_ANEW", "Head", "Scalar", "SkippedArray", "TensorInfo", "Value", "as_stored", "read_head"]

_STRING, _ARRAY = 8, 9
_SCALARS = {  # GGUF value type -> struct format
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TYPE_NAMES = (  # by GGUF value type
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array"),
    *("uint64", "int64", "float64"),
)
_LONGEST_ARRAY = 4096  # longer ones are skipped: per-layer numbers are wanted, vocabularies are not
# of the engine: ggml/src/gguf.cpp, GGML_MAX_DIMS and GGML_MAX_NAME of ggml.h
_LONGEST_STRING = _MOST_ELEMENTS = 1 << 30
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 63  # bytes
_MOST = (1 << 63) - 1  # of the elements of a dimension, and of a tensor's bytes
_SMALLEST_INFO = 8 + 4 + 4 + 8  # bytes of a tensor in the head, without its name and shape
_SMALLEST_VALUE = 8 + 1 + 4 + 1
_DEFAULT_ALIGNMENT = 32

_REPLACED = "\ufffd"  # in place of what is not UTF-8
GET_ANEW = "get the file anew, and compare its size and checksum"


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
    size: int  # bytes of its elements, without the padding behind them

    @property
    def layer(self) -> int | None:
        """N of "blk.N.", None for other tensors."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Head:
    """What the head of one file says."""

    values: dict[str, Value]
    types: dict[str, str]  # of the values: "uint32", "string[]"
    tensors: list[TensorInfo]
    start: int  # of the tensors' data, bytes from the start of the file
    alignment: int  # bytes
    file_bytes: int


def read_head(file: Path, *, whole: bool = False) -> Head:
    """Reads the head of one file.

    Args:
        whole: as it is in the file, for those who write it again: arrays of any length; lone surrogates in place of
            bytes that are not UTF-8, which are U+FFFD otherwise; keys without a name.

    Raises:
        FlashFormatError: not GGUF, no ordinary file, damaged, or cut off within head or data.
        OSError: the file cannot be read.
    """
    if kind := kind_of_file(file):
        raise FlashFormatError(f"{kind}, not a GGUF file", file=file)
    with file.open("rb", buffering=1 << 18) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            return _Reader(stream, file, size, whole).read()
        except (struct.error, OverflowError, MemoryError) as error:
            raise FlashFormatError(f"damaged or cut off within its head ({error})", file=file, mend=GET_ANEW) from None
        finally:
            # the head has been parsed: what the kernel read ahead only takes memory
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def as_stored(name: str) -> bool:
    """Whether a name is the file's own: not where bytes of it were replaced, so that others may look alike."""
    return _REPLACED not in name


class _Reader:
    def __init__(self, stream: BinaryIO, file: Path, size: int, whole: bool) -> None:
        self._stream, self._file, self._size, self._whole = stream, file, size, whole
        self._errors = "surrogateescape" if whole else "replace"

    def read(self) -> Head:
        stream, file = self._stream, self._file
        if stream.read(4) != b"GGUF":
            raise FlashFormatError("not a GGUF file", file=file)
        version = self._number("<I")
        if version not in (2, 3):
            said = f"GGUF version {version} (big-endian or older than 2) cannot be read"
            raise FlashFormatError(said, file=file)
        n_tensors, n_values = self._number("<Q"), self._number("<Q")
        if n_tensors * _SMALLEST_INFO + n_values * _SMALLEST_VALUE > self._size:
            raise self._damaged(f"claims {n_tensors} tensors and {n_values} values, for which it has no room")
        values: dict[str, Value] = {}
        types: dict[str, str] = {}
        for _ in range(n_values):
            key = self._string()
            if key in values and (self._whole or as_stored(key)):
                raise self._damaged("is there twice", key=key)
            if not key and not self._whole:
                raise self._damaged("a key has no name")
            values[key], types[key] = self._value(key)
        heads = [self._info() for _ in range(n_tensors)]
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-stream.tell() // alignment) * alignment
        tensors = [self._placed(*head, start) for head in heads]
        return Head(values, types, tensors, start, alignment, self._size)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        if len(name.encode("utf-8", errors="replace")) > _LONGEST_NAME:
            raise self._damaged(f"a tensor's name is longer than {_LONGEST_NAME} bytes: {name[:80]}")
        n_dims = self._number("<I")
        if n_dims > _MOST_DIMENSIONS:
            raise self._damaged(f"has {n_dims} dimensions", tensor=name)
        shape = tuple(self._number("<Q") for _ in range(n_dims))
        return name, shape, self._number("<I"), self._number("<Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> TensorInfo:
        try:
            size = tensor_bytes(kind, shape)
        except ValueError as error:
            raise self._damaged(str(error), tensor=name) from None
        if max((*shape, size)) > _MOST:
            raise self._damaged(f"has the shape {list(shape)}", tensor=name)
        end = start + offset + size
        if end > self._size:
            said = f"ends at byte {end}, but the file has {self._size}: it is cut off"
            raise FlashFormatError(said, file=self._file, tensor=name, mend=GET_ANEW)
        return TensorInfo(name, shape, kind, self._file, start + offset, size)

    def _damaged(self, said: str, *, key: str = "", tensor: str = "") -> FlashFormatError:
        return FlashFormatError(f"{said}: damaged", file=self._file, key=key, tensor=tensor, mend=GET_ANEW)

    def _value(self, key: str) -> tuple[Value, str]:
        """A value and the name of its type."""
        kind = self._number("<I")
        if kind == _STRING:
            return self._string(), _TYPE_NAMES[kind]
        if kind in _SCALARS:
            value: Scalar = self._unpack(f"<{_SCALARS[kind]}")
            return value, _TYPE_NAMES[kind]
        if kind != _ARRAY:
            raise FlashFormatError(f"is a value of unknown type {kind}", file=self._file, key=key)
        item, length = self._number("<I"), self._number("<Q")
        if item != _STRING and item not in _SCALARS:
            raise FlashFormatError(f"is an array of unknown type {item}", file=self._file, key=key)
        return self._array(item, length), f"{_TYPE_NAMES[item]}[]"

    def _array(self, item: int, length: int) -> Value:
        size = length * (8 if item == _STRING else struct.calcsize(f"<{_SCALARS[item]}"))
        if length > _MOST_ELEMENTS or size > self._left():
            raise struct.error("an array ends behind the end of the file")
        if length > _LONGEST_ARRAY and not self._whole:
            if item == _STRING:
                self._skip_strings(length)
            else:
                self._stream.seek(size, os.SEEK_CUR)
            return SkippedArray(length)
        if item == _STRING:
            return [self._string() for _ in range(length)]
        return list(struct.unpack(f"<{length}{_SCALARS[item]}", self._stream.read(size)))

    def _skip_strings(self, count: int) -> None:
        read, unpack = self._stream.read, struct.Struct("<Q").unpack
        for _ in range(count):
            length = unpack(read(8))[0]
            if len(read(length) if length <= 4096 else self._long(length)) != length:
                raise struct.error("a string ends behind the end of the file")

    def _string(self) -> str:
        length = self._number("<Q")
        data = self._stream.read(length) if length <= 4096 else self._long(length)
        if len(data) != length:
            raise struct.error("a string ends behind the end of the file")
        return data.decode("utf-8", errors=self._errors)

    def _long(self, length: int) -> bytes:
        if length > _LONGEST_STRING or length > self._left():
            raise struct.error(f"a string of {length} bytes")
        return self._stream.read(length)

    def _left(self) -> int:
        """Bytes from here to the end of the file."""
        return self._size - self._stream.tell()

    def _number(self, layout: str) -> int:
        value: int = self._unpack(layout)
        return value

    def _unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self._stream.read(struct.calcsize(layout)))[0]
