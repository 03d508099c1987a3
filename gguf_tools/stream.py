"""Writes GGUF files piece by piece: tensors are made while they are written, and never held whole.

A file takes its name only when it is complete and on the disk; whatever goes wrong before, nothing is left behind. What
a run that was killed has left is removed by the next one that writes to the same name.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools.errors import GgufToolsError
from gguf_tools.progress import byte_progress
from gguf_tools.source import SCALARS, Bytes, KeyValue, SourceTensor, data_bytes, raw_row_bytes, row_blocks, row_count
from llama_flash.whole_files import remove_abandoned, whole_file

_VERSION = 3
_DEFAULT_ALIGNMENT = 32  # where a file has no general.alignment
_RESERVE = 64 << 20  # bytes of disk space left alone


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written. `chunks` is called once, when its turn has come; any arrays of bytes, in order."""

    name: str
    shape: tuple[int, ...]  # in ggml's order: the row length first
    kind: GGMLQuantizationType
    chunks: Callable[[], Iterator[Bytes]]


def copied(tensor: SourceTensor) -> PlannedTensor:
    """The tensor as it is, byte for byte."""

    def chunks() -> Iterator[Bytes]:
        for rows in row_blocks(row_count(tensor), raw_row_bytes(tensor)):
            yield tensor.raw(rows.start, rows.stop)

    return PlannedTensor(tensor.name, tensor.shape, tensor.kind, chunks)


def write_gguf(
    path: str | os.PathLike[str],
    values: Mapping[str, KeyValue],
    tensors: Sequence[PlannedTensor],
    *,
    alignment: int = 4096,
    progress: str | None = None,
    force: bool = False,
    inputs: Iterable[Path] = (),
) -> None:
    """Writes a GGUF file.

    alignment: of tensors, in bytes; general.alignment is set accordingly. progress: what to call the work in progress
    that is shown on stderr; None shows none. force: replaces a file that is there. inputs: files that are being read.

    Raises:
        GgufToolsError: the file is there or is an input, the disk has no room, writing failed, or a tensor's chunks are
            not as many bytes as its shape and type say.
    """
    path = Path(path)
    _check_target(path, force=force, inputs=inputs)
    sizes = [data_bytes(tensor) for tensor in tensors]
    head = _head(values, tensors, sizes, alignment)
    remove_abandoned(path)
    _check_room(path, len(head) + sum(_padded(size, alignment) for size in sizes))
    try:
        with (
            whole_file(path, before=lambda: _check_target(path, force=force)) as file,
            byte_progress(progress, sum(sizes)) as advance,
        ):
            _write_all(file, np.frombuffer(head, np.uint8))
            for tensor, size in zip(tensors, sizes, strict=True):
                _write_tensor(file, path, tensor, size, advance)
                _write_all(file, np.zeros(_padded(size, alignment) - size, np.uint8))
    except OSError as error:
        raise GgufToolsError(f"cannot be written: {error.strerror or error}", file=path) from error


def _check_target(path: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    if not path.parent.is_dir():
        raise GgufToolsError(f"the folder {path.parent} does not exist", file=path)
    if path.is_dir():
        raise GgufToolsError("is a folder", file=path)
    if not path.exists():
        return
    if any(path.samefile(other) for other in inputs):
        raise GgufToolsError("is the input: write to another file", file=path)
    if not force:
        raise GgufToolsError("is already there (--force replaces it)", file=path)


def _check_room(path: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes + _RESERVE:
        raise GgufToolsError(
            f"needs {n_bytes / 1e9:.2f} GB, but {path.parent} has {free / 1e9:.2f} GB free "
            f"({_RESERVE >> 20} MiB are left alone)",
            file=path,
        )


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _write_tensor(file: BinaryIO, path: Path, tensor: PlannedTensor, size: int, advance: Callable[[int], None]) -> None:
    done = 0
    for chunk in tensor.chunks():
        done += chunk.nbytes
        if done <= size:
            _write_all(file, chunk)
            advance(chunk.nbytes)
    if done != size:
        raise GgufToolsError(f"its chunks are {done} bytes, its shape says {size}", file=path, tensor=tensor.name)


def _write_all(file: BinaryIO, data: Bytes) -> None:
    view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    while len(view):
        view = view[file.write(view) :]


def _head(
    values: Mapping[str, KeyValue], tensors: Sequence[PlannedTensor], sizes: Sequence[int], alignment: int
) -> bytes:
    """All that is before the tensors' data, padding included."""
    if alignment < 8 or alignment & (alignment - 1):
        raise GgufToolsError(f"the alignment must be a power of two, at least 8: {alignment}")
    values = {key: value for key, value in values.items() if key != "general.alignment"}
    if alignment != _DEFAULT_ALIGNMENT:
        values["general.alignment"] = KeyValue(alignment, GGUFValueType.UINT32)
    head = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(values)))
    for key, value in values.items():
        head += _string(key) + _value(key, value)
    names: set[str] = set()
    offset = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor.name in names:
            raise GgufToolsError("is there twice", tensor=tensor.name)
        names.add(tensor.name)
        head += _string(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        head += struct.pack("<IQ", int(tensor.kind), offset)
        offset += _padded(size, alignment)
    head += bytes(_padded(len(head), alignment) - len(head))
    return bytes(head)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: KeyValue) -> bytes:
    try:
        if value.type != GGUFValueType.ARRAY:
            return struct.pack("<I", int(value.type)) + _scalars(value.type, [value.value])
        if value.sub_type is None:
            raise TypeError("an array without the type of its items")
        head = struct.pack("<IIQ", int(value.type), int(value.sub_type), len(value.value))
        return head + _scalars(value.sub_type, value.value)
    except (struct.error, OverflowError, TypeError, KeyError, AttributeError) as error:
        raise GgufToolsError(f"cannot be stored ({error})", key=key) from None


def _scalars(kind: GGUFValueType, values: Sequence[object]) -> bytes:
    if kind == GGUFValueType.STRING:
        return b"".join(_string(str(value)) for value in values)
    layout = SCALARS[kind]
    return struct.pack(f"<{len(values)}{layout[1]}", *values)
