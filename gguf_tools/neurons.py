"""The feed-forward weights of a model, neuron by neuron, wherever its file keeps them.

What lives here: views of tensors that are not stored as such, all of them `SourceTensor`s that are read in rows: a part
of a bundle, transposed matrices, and a flash file's model without bundles. Not here: what is written where.
The neurons of a layer of experts are those of expert 0, then those of expert 1, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_tools import ggml
from gguf_tools.errors import GgufToolsError
from gguf_tools.format import (
    EXPERTS,
    PARTS,
    BundleLayout,
    Dimensions,
    Experts,
    FlashInfo,
    PartLayout,
    dimensions_of,
    experts_of,
    has_shape,
    read_flash,
    weight_name,
)
from gguf_tools.source import (
    Bytes,
    Floats,
    KeyValue,
    Source,
    SourceTensor,
    raw_columns,
    raw_row_bytes,
    row_blocks,
    row_count,
    row_length,
)
from gguf_tools.types import PLAIN_TYPES, WEIGHT_TYPES, block_of, row_bytes

MEMORY = 256 << 20  # bytes that a conversion works in, unless it is told otherwise

_F32, _F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
_WEIGHT = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.ffn_(?:gate|up|down)\.weight")
_EXPERT_WEIGHT = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.ffn_(?:gate|up|down)_exps\.weight")


@dataclass(frozen=True)
class BundlePart:
    """A part of a layer's bundle as a matrix, or one of each expert: row i is neuron i's."""

    name: str  # of the weight that the bundle replaces
    bundle: SourceTensor
    layout: BundleLayout
    part: PartLayout

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.part.row_length, *self.bundle.shape[1:])

    @property
    def kind(self) -> GGMLQuantizationType:
        return self.part.kind

    @property
    def _n_ff(self) -> int:
        return row_count(self.bundle)

    def raw(self, start: int, stop: int) -> Bytes:
        size, record = self.part.row_bytes, self.layout.record_bytes
        if self.layout.layout == "bundled":
            return self.bundle.raw(start, stop)[:, self.part.offset : self.part.offset + size]
        if start == stop:
            return np.empty((0, size), np.uint8)
        begin = self.layout.begin(self.part, start, self._n_ff)
        end = begin + (stop - start) * size
        first = begin // record  # a row of the tensor is as long as a record, also where it holds none
        run = self.bundle.raw(first, -(-end // record)).reshape(-1)
        return run[begin - first * record : end - first * record].reshape(stop - start, size)

    def floats(self, start: int, stop: int) -> Floats:
        return ggml.dequantize(self.raw(start, stop), self.kind)

    def raw_columns(self, start: int, stop: int) -> Bytes:
        begin, end = row_bytes(self.kind, start), row_bytes(self.kind, stop)
        if self.layout.layout == "bundled":  # an element of a bundle is a byte
            return raw_columns(self.bundle, self.part.offset + begin, self.part.offset + end)
        out = np.empty((self._n_ff, end - begin), np.uint8)
        for rows in row_blocks(self._n_ff, self.part.row_bytes):
            out[rows] = self.raw(rows.start, rows.stop)[:, begin:end]
        return out


@dataclass(frozen=True)
class Matrix:
    """One expert's matrix of a tensor that holds those of all experts."""

    tensor: SourceTensor
    number: int  # of the expert

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[:2]

    @property
    def kind(self) -> GGMLQuantizationType:
        return self.tensor.kind

    @property
    def _first(self) -> int:
        return self.number * self.shape[1]

    def raw(self, start: int, stop: int) -> Bytes:
        return self.tensor.raw(self._first + start, self._first + stop)

    def floats(self, start: int, stop: int) -> Floats:
        return self.tensor.floats(self._first + start, self._first + stop)


@dataclass(frozen=True)
class Transposed:
    """A matrix, or each expert's, transposed: of its own type if stored element by element, else dequantised."""

    matrix: SourceTensor

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.matrix.shape[1], self.matrix.shape[0], *self.matrix.shape[2:])

    @property
    def kind(self) -> GGMLQuantizationType:
        return self.matrix.kind if self.matrix.kind in PLAIN_TYPES else _F32

    def raw(self, start: int, stop: int) -> Bytes:
        if self.matrix.kind not in PLAIN_TYPES:
            return self.floats(start, stop).view(np.uint8)
        element = np.uint32 if self.kind == _F32 else np.uint16
        return _joined(
            np.ascontiguousarray(raw_columns(matrix, first, last).view(element).T).view(np.uint8)
            for matrix, first, last in self._matrices(start, stop)
        )

    def floats(self, start: int, stop: int) -> Floats:
        block = block_of(self.matrix.kind)[0]
        pieces = []
        for matrix, first, last in self._matrices(start, stop):
            begin, end = first // block * block, -(-last // block) * block
            columns = ggml.dequantize(raw_columns(matrix, begin, end), matrix.kind)
            pieces.append(np.ascontiguousarray(columns[:, first - begin : last - begin].T))
        return _joined(pieces)

    def _matrices(self, start: int, stop: int) -> Iterator[tuple[SourceTensor, int, int]]:
        """The matrices that rows start to stop are of, each with the columns that become those rows."""
        if len(self.shape) == 2:
            yield self.matrix, start, stop
            return
        n_rows = self.shape[1]
        for number in range(start // n_rows, max(start // n_rows + 1, -(-stop // n_rows))):
            begin = number * n_rows
            yield _matrix(self.matrix, number), max(start - begin, 0), min(stop - begin, n_rows)

    @property
    def row_cost(self) -> int:
        """Bytes of memory that one more row takes while it is read."""
        block, size = block_of(self.matrix.kind)
        return self.matrix.shape[1] * (8 + -(-int(size) // int(block)))


def _matrix(tensor: SourceTensor, number: int) -> SourceTensor:
    if isinstance(tensor, BundlePart):  # of whose records only the part is then kept in memory
        return replace(tensor, bundle=Matrix(tensor.bundle, number))
    return Matrix(tensor, number)


def _joined(pieces: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Rows one after the other; not copied if they are in one piece."""
    arrays = list(pieces)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def row_cost(tensor: SourceTensor, kind: GGMLQuantizationType) -> int:
    """Bytes of memory that one more row takes while it is read and converted to that type."""
    reading = tensor.row_cost if isinstance(tensor, Transposed) else 2 * raw_row_bytes(tensor)
    return reading + row_bytes(kind, row_length(tensor)) + (0 if kind == tensor.kind else 5 * row_length(tensor))


def row_runs(tensors: Sequence[SourceTensor], cost: int, memory: int) -> Sequence[slice]:
    """Cuts the rows of tensors that are read side by side into runs that take about `memory` bytes.

    cost: bytes that a row of all of them takes. At least one block of a transposed matrix is read at a time, and the
    matrices of experts whole where the memory allows it: half of a transposed one costs as many reads.
    """
    n_rows = row_count(tensors[0])
    block = max(block_of(t.matrix.kind)[0] if isinstance(t, Transposed) else 1 for t in tensors)
    step = max(1, memory // (cost * block)) * block
    per_expert = tensors[0].shape[1] if len(tensors[0].shape) > 2 else n_rows
    if step > per_expert:
        step -= step % per_expert
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def rows_as(tensor: SourceTensor, kind: GGMLQuantizationType, start: int, stop: int) -> Bytes:
    """Rows start to stop in that type; as they are stored, bit by bit, if it is the tensor's own.

    Raises GgufToolsError, naming the tensor, for values that the type cannot hold.
    """
    if kind == tensor.kind:
        return tensor.raw(start, stop)
    values = tensor.floats(start, stop)
    if not np.isfinite(values).all():
        raise GgufToolsError(f"rows {start} to {stop} hold values that are not numbers", tensor=tensor.name)
    if kind == _F32:
        return np.ascontiguousarray(values).view(np.uint8)
    rows = ggml.quantize(values, kind)
    if kind == _F16 and not np.isfinite(rows.view(np.float16)).all():
        raise GgufToolsError("holds values too large for F16", tensor=tensor.name)
    return rows


def all_rows_as(tensor: SourceTensor, kind: GGMLQuantizationType, memory: int = MEMORY) -> Iterator[Bytes]:
    """All rows in that type, in blocks that take about `memory` bytes to make."""
    for rows in row_runs([tensor], row_cost(tensor, kind), memory):
        yield rows_as(tensor, kind, rows.start, rows.stop)


@dataclass(frozen=True)
class Neurons:
    """The feed-forward block of one layer, dense or of experts."""

    il: int
    parts: dict[str, SourceTensor]  # (gate,) up, down, each of shape [n_embd, n_ff(, n_expert)]: row i is neuron i's
    n_expert: int = 0  # 0: dense

    @property
    def n_ff(self) -> int:
        """Neurons; of a layer of experts: of each expert."""
        return self.parts["up"].shape[1]

    def name(self, part: str) -> str:
        """Name of the weight that holds a part, or of the "bundle"."""
        return weight_name(self.il, part + EXPERTS if self.n_expert else part)


def dense_layers(source: Source, file: Path | str = "") -> dict[int, Neurons]:
    """The dense feed-forward blocks of a model, by layer.

    Raises GgufToolsError, naming the tensor, where weights are missing or shaped otherwise than the key-values say
    (gate and up in one matrix, say), and what `read_flash` raises.
    """
    info = read_flash(source, file)
    layers = {il: _bundled(source, info, il) for il in info.n_ff if il not in info.n_expert} if info else {}
    matches = (_WEIGHT.fullmatch(name) for name in source.tensors)
    unbundled = sorted({int(match[1]) for match in matches if match} - set(layers))
    if unbundled:
        dimensions = dimensions_of(source.values, file)
        layers |= {il: _ordinary(source, dimensions, il, file) for il in unbundled}
    return dict(sorted(layers.items()))


def expert_layers(source: Source, file: Path | str = "") -> dict[int, Neurons]:
    """The layers of experts of an ordinary model with gate, up and down in matrices of their own, by layer.

    Raises GgufToolsError, naming the tensor, where weights are missing or shaped otherwise than the key-values say.
    """
    matches = (_EXPERT_WEIGHT.fullmatch(name) for name in source.tensors)
    found = sorted({int(match[1]) for match in matches if match})
    if not found:
        return {}
    dimensions = dimensions_of(source.values, file)
    experts = experts_of(source.values, dimensions.architecture, file)
    return {il: _ordinary_experts(source, dimensions.n_embd, experts, il, file) for il in found}


def _ordinary_experts(source: Source, n_embd: int, experts: Experts, il: int, file: Path | str) -> Neurons:
    neurons = Neurons(il, {}, experts.n_expert)
    for part in PARTS:
        name = weight_name(il, part + EXPERTS)
        tensor = source.tensors.get(name)
        if tensor is None:
            raise GgufToolsError(f"is missing, but layer {il} has experts", file=file, tensor=name)
        expected = experts.shape(*((experts.n_ff, n_embd) if part == "down" else (n_embd, experts.n_ff)))
        if not has_shape(tensor.shape, expected):
            message = f"has the shape {list(tensor.shape)}, expected {list(expected)}"
            raise GgufToolsError(message, file=file, tensor=name)
        if tensor.kind not in WEIGHT_TYPES:
            raise GgufToolsError(f"is of type {tensor.kind.name}", file=file, tensor=name)
        neurons.parts[part] = Transposed(tensor) if part == "down" else tensor
    return neurons


def _bundled(source: Source, info: FlashInfo, il: int) -> Neurons:
    neurons = Neurons(il, {}, info.n_expert.get(il, 0))
    bundle = source.tensors[neurons.name("bundle")]
    for part in info.bundle.parts:
        neurons.parts[part.name] = BundlePart(neurons.name(part.name), bundle, info.bundle, part)
    return neurons


def _ordinary(source: Source, dimensions: Dimensions, il: int, file: Path | str) -> Neurons:
    n_embd, n_ff = dimensions.n_embd, dimensions.n_ff(il)
    parts: dict[str, SourceTensor] = {}
    for part in PARTS:
        name = weight_name(il, part)
        tensor = source.tensors.get(name)
        if tensor is None:
            if part == "gate":
                continue
            raise GgufToolsError(f"is missing, but layer {il} has a dense feed-forward block", file=file, tensor=name)
        if part == "up" and tensor.shape == (n_embd, 2 * n_ff):
            raise GgufToolsError("holds gate and up in one matrix, which cannot be bundled", file=file, tensor=name)
        expected = (n_ff, n_embd) if part == "down" else (n_embd, n_ff)
        if tensor.shape != expected:
            message = f"has the shape {list(tensor.shape)}, expected {list(expected)}"
            raise GgufToolsError(message, file=file, tensor=name)
        if tensor.kind not in WEIGHT_TYPES:
            raise GgufToolsError(f"is of type {tensor.kind.name}", file=file, tensor=name)
        parts[part] = Transposed(tensor) if part == "down" else tensor
    return Neurons(il, parts)


@dataclass(frozen=True)
class OrdinarySource:
    """A Source without what the flash format adds: ordinary weights in place of bundles, no predictors."""

    values: dict[str, KeyValue]
    tensors: dict[str, SourceTensor]


def without_bundles(source: Source, file: Path | str = "") -> OrdinarySource:
    """The model as an ordinary one; down of a bundled layer is of type F32 unless it is stored element by element.

    The activation stays in the key-values if the model has dense layers in bundles: the engine has no use for that of
    experts, and refuses what it has no use for. Raises what `read_flash` raises.
    """
    info = read_flash(source, file)
    if info is None:
        return OrdinarySource(dict(source.values), dict(source.tensors))
    values = {key: value for key, value in source.values.items() if not key.startswith("flash.")}
    values.pop("general.alignment", None)
    if len(info.n_expert) == len(info.n_ff):
        for key in info.activation.to_values(info.architecture):
            values.pop(key)
    tensors: dict[str, SourceTensor] = {}
    layers = [_bundled(source, info, il) for il in info.n_ff]
    bundles = {neurons.name("bundle"): neurons for neurons in layers}
    for name, tensor in source.tensors.items():
        if name in bundles:
            for part, rows in bundles[name].parts.items():
                tensors[bundles[name].name(part)] = Transposed(rows) if part == "down" else rows
        elif not re.fullmatch(r"blk\.\d+\.ffn_predictor(?:_in|_out)?\.\w+", name):
            tensors[name] = tensor
    return OrdinarySource(values, tensors)
