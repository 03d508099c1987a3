"""What a GGUF file holds, without its tensor data: key-values and where each tensor lies.

Reads the head of the file only, and not through a mapping: the page cache counts against a memory cap. Long arrays (the
vocabulary) are skipped, so that a file with 150 000 tokens takes a fraction of a second.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import FlashFormatError
from ..file_kind import kind_of_file
from .ggml_types import tensor_bytes

__all__ = [
    "MOST_LAYERS",
    "GgufMeta",
    "SkippedArray",
    "TensorInfo",
    "check_is_model",
    "check_vocabulary",
    "claims_wide_heads",
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
# of the engine: ggml/src/gguf.cpp, GGML_MAX_DIMS and GGML_MAX_NAME of ggml.h, LLAMA_MAX_LAYERS
_LONGEST_STRING = _MOST_ELEMENTS = 1 << 30
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 63  # bytes
MOST_LAYERS = 512
_MOST_SHARDS = (1 << 16) - 1  # of a uint16
_MOST = (1 << 63) - 1  # of the elements of a dimension, and of a tensor's bytes
_SMALLEST_INFO = 8 + 4 + 4 + 8  # bytes of a tensor in the head, without its name and shape
_SMALLEST_VALUE = 8 + 1 + 4 + 1

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_REPLACED = "\ufffd"  # in place of what is not UTF-8: such names may differ and look alike
_WIDTHS = ("attention.key_length", "attention.value_length")
_OTHER_FILES = {  # general.type: what it is, and what to do with it
    "adapter": ("a LoRA adapter", "name the model that it is for, and this file as lora_path"),
    "mmproj": ("the part of a model that looks at images", "name the model's own file"),
    "imatrix": ("an importance matrix", "it is for quantising a model: name the model's file"),
}
_GET_ANEW = "get the file anew, and compare its size and checksum"


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
class GgufMeta:
    """A model: one GGUF file, or all of its shards."""

    files: tuple[Path, ...]
    values: dict[str, Value]  # of the first file
    tensors: dict[str, TensorInfo]
    file_bytes: int  # all shards, without what is behind the last tensor of each
    types: dict[str, str] = field(default_factory=dict)  # of the values: "uint32", "string[]"

    @property
    def architecture(self) -> str:
        value = self.values.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: int = 0) -> int:
        """Whole number of "{architecture}.{key}"; the largest one where it is given per layer."""
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            return max((v for v in value if isinstance(v, int)), default=default)
        return int(value) if isinstance(value, int) else default

    def per_layer(self, key: str, n_layer: int, default: int = 0) -> list[int]:
        """Whole numbers of "{architecture}.{key}" for each layer, whether it is given once or per layer.

        n_layer: as a file says it; of more than the engine can have, that many.
        """
        n_layer = min(n_layer, MOST_LAYERS)
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and len(value) >= n_layer:
            return [int(v) if isinstance(v, int) else default for v in value[:n_layer]]
        return [self.number(key, default)] * n_layer

    @property
    def n_vocab(self) -> int:
        tokens = self.values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, SkippedArray):
            return tokens.length
        return len(tokens) if isinstance(tokens, list) else self.number("vocab_size")


def shard_paths(path: str | os.PathLike[str]) -> list[Path]:
    """All shards of the model whose first (or only) file is `path`, by their names.

    Raises:
        FlashFormatError: if a shard is missing, or `path` is not the first.
    """
    file = Path(path)
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match[3])
    if int(match[2]) != 1:
        raise _not_first(file, int(match[2]), count)
    shards = [file.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise FlashFormatError(f"{file}: {len(missing)} of {count} shards are missing, the first is {missing[0]}")
    return shards


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

    What only the engine can judge (whether it knows the architecture, whether all tensors are there) is not judged
    here: see dry_run.check_model.

    Raises:
        FlashFormatError: not GGUF, no ordinary file, damaged, cut off within head or data, shards missing, or not the
            first shard.
        OSError: if a file cannot be read.
    """
    files = [Path(path)]
    values: dict[str, Value] = {}
    types: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    file_bytes = 0
    for index in range(_MOST_SHARDS):
        file = files[index]
        if kind := kind_of_file(file):
            raise FlashFormatError(f"{file}: {kind}, not a GGUF file")
        with file.open("rb", buffering=1 << 18) as stream:
            size = os.fstat(stream.fileno()).st_size
            try:
                shard_values, shard_types, infos = _Head(stream, file, size).read()
            except (struct.error, OverflowError, MemoryError) as error:
                raise FlashFormatError(
                    f"{file}: damaged or cut off within its head ({error})", mend=_GET_ANEW
                ) from None
            finally:
                # the head has been parsed: what the kernel read ahead only takes memory
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file_bytes += max((info.offset + info.size for info in infos), default=size)
        if index == 0:
            values, types = shard_values, shard_types
            files = _shards(file, values)
        for info in infos:
            if info.name in tensors and _REPLACED not in info.name:
                raise FlashFormatError(f"{file}: tensor {info.name} is there twice", mend=_GET_ANEW)
            tensors[info.name] = info
        if index + 1 == len(files):
            break
    return GgufMeta(tuple(files), values, tensors, file_bytes, types)


def check_is_model(meta: GgufMeta) -> None:
    """Refuses GGUF files that hold something else than a model.

    Raises:
        FlashFormatError: with what it is, and what it is for.
    """
    kind = meta.values.get("general.type", "model")
    if isinstance(kind, str) and kind in _OTHER_FILES and "token_embd.weight" not in meta.tensors:
        what, mend = _OTHER_FILES[kind]
        raise FlashFormatError(f"{meta.files[0]}: is no model but {what}", mend=mend)
    if not meta.tensors:
        raise FlashFormatError(
            f"{meta.files[0]}: holds no weights, a vocabulary at most",
            mend="name the model's file; Llama(vocab_only=True) loads this one for its vocabulary",
        )


def claims_wide_heads(meta: GgufMeta) -> bool:
    """Whether heads are said to be wider than any weight of a layer: a KV cache of that width can be enormous.

    Some architectures do not look at the key; where it counts, the engine allocates the cache before it finds that the
    weights do not fit.
    """
    widest = max((n for tensor in meta.tensors.values() if tensor.layer is not None for n in tensor.shape), default=0)
    return any(meta.number(key) > widest for key in _WIDTHS)


def _shards(file: Path, values: dict[str, Value]) -> list[Path]:
    """All shards of the model with that first file. As in the engine, the head decides about that, not the name."""
    count, number = values.get("split.count", 0), values.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or count <= 1:
        return [file]
    if number != 0:
        raise _not_first(file, number + 1, count)
    match = _SHARD.fullmatch(file.name)
    if match is None or int(match[3]) != count:
        raise FlashFormatError(
            f"{file}: is the first of {count} shards, but not named so (...-00001-of-{count:05d}.gguf)",
            mend="shards that were joined byte by byte, or renamed, cannot be loaded: keep them as they are, side by "
            "side, and name the first; gguf-split --merge joins them",
        )
    return shard_paths(file)


def _not_first(file: Path, number: int, count: int) -> FlashFormatError:
    match = _SHARD.fullmatch(file.name)
    first = (
        f"{match[1]}-00001-of-{match[3]}.gguf" if match else f"the one whose name ends in -00001-of-{count:05d}.gguf"
    )
    return FlashFormatError(f"{file}: is shard {number} of {count}, not the first", mend=f"load the first one: {first}")


class _Head:
    """Reads the head of one file. What it says is compared with the file's size before it is believed."""

    def __init__(self, stream: BinaryIO, file: Path, size: int) -> None:
        self._stream, self._file, self._size = stream, file, size

    def read(self) -> tuple[dict[str, Value], dict[str, str], list[TensorInfo]]:
        stream, file = self._stream, self._file
        if stream.read(4) != b"GGUF":
            raise FlashFormatError(f"{file}: not a GGUF file")
        version = _unpack(stream, "<I")
        if version not in (2, 3):
            raise FlashFormatError(f"{file}: GGUF version {version} (big-endian or older than 2) cannot be read")
        n_tensors, n_values = _unpack(stream, "<Q"), _unpack(stream, "<Q")
        if n_tensors * _SMALLEST_INFO + n_values * _SMALLEST_VALUE > self._size:
            raise self._damaged(f"claims {n_tensors} tensors and {n_values} values, for which it has no room")
        values: dict[str, Value] = {}
        types: dict[str, str] = {}
        for _ in range(n_values):
            key = _string(stream)
            if (key in values and _REPLACED not in key) or not key:
                raise self._damaged(f"key {key} is there twice" if key else "a key has no name")
            values[key], types[key] = _value(stream, int(_unpack(stream, "<I")), file)
        heads = [self._info() for _ in range(n_tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-stream.tell() // alignment) * alignment
        return values, types, [self._placed(*head, start) for head in heads]

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        stream = self._stream
        name = _string(stream)
        if len(name.encode("utf-8", errors="replace")) > _LONGEST_NAME:
            raise self._damaged(f"a tensor's name is longer than {_LONGEST_NAME} bytes: {name[:80]}")
        n_dims = int(_unpack(stream, "<I"))
        if n_dims > _MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(int(_unpack(stream, "<Q")) for _ in range(n_dims))
        return name, shape, int(_unpack(stream, "<I")), int(_unpack(stream, "<Q"))

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> TensorInfo:
        try:
            size = tensor_bytes(kind, shape)
        except ValueError as error:
            raise self._damaged(f"tensor {name} {error}") from None
        if max((*shape, size)) > _MOST:
            raise self._damaged(f"tensor {name} has the shape {list(shape)}")
        end = start + offset + size
        if end > self._size:
            raise FlashFormatError(
                f"{self._file}: tensor {name} ends at byte {end}, but the file has {self._size}: it is cut off",
                mend=_GET_ANEW,
            )
        return TensorInfo(name, shape, kind, self._file, start + offset, size)

    def _damaged(self, message: str) -> FlashFormatError:
        return FlashFormatError(f"{self._file}: {message}: damaged", mend=_GET_ANEW)


def _value(stream: BinaryIO, kind: int, file: Path) -> tuple[Value, str]:
    """A value and the name of its type."""
    if kind != _ARRAY:
        return _string(stream) if kind == _STRING else _scalar(stream, kind, file), _TYPE_NAMES[kind]
    item, length = int(_unpack(stream, "<I")), int(_unpack(stream, "<Q"))
    if item != _STRING and item not in _SCALARS:
        raise FlashFormatError(f"{file}: array of unknown type {item}")
    return _array(stream, item, length, file), f"{_TYPE_NAMES[item]}[]"


def _array(stream: BinaryIO, item: int, length: int, file: Path) -> Value:
    size = length * (8 if item == _STRING else struct.calcsize(_SCALARS[item]))
    if length > _MOST_ELEMENTS or size > _left(stream):
        raise struct.error("an array ends behind the end of the file")
    if length > _LONGEST_ARRAY:
        if item == _STRING:
            _skip_strings(stream, length)
        else:
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
    if length > _LONGEST_STRING or length > _left(stream):
        raise struct.error(f"a string of {length} bytes")
    return stream.read(length)


def _left(stream: BinaryIO) -> int:
    """Bytes from here to the end of the file."""
    return os.fstat(stream.fileno()).st_size - stream.tell()


def _string(stream: BinaryIO) -> str:
    length = int(_unpack(stream, "<Q"))
    data = stream.read(length) if length <= 4096 else _long(stream, length)
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
