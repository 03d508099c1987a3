"""Whether two GGUF files hold the same model, however they store it.

Bundles are compared as the weights that they replace, and the neurons of a dense layer may be in another order: up,
gate, down and the biases must then agree neuron by neuron. Neurons behind a model's own that say nothing, as an
inflated model has them, do not count. Predictors are not compared: they do not belong to the function.
"""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from gguf_tools.format import bias_name, weight_name
from gguf_tools.idle import Widened, widened
from gguf_tools.neurons import (
    MEMORY,
    Neurons,
    OrdinarySource,
    Transposed,
    dense_layers,
    row_cost,
    row_runs,
    without_bundles,
)
from gguf_tools.progress import byte_progress
from gguf_tools.source import (
    Floats,
    KeyValue,
    SourceTensor,
    data_bytes,
    open_gguf,
    row_length,
)
from gguf_tools.types import WEIGHT_TYPES

Status = Literal["identical", "reordered", "differs", "missing"]
Order = npt.NDArray[np.int64]  # [n_ff]: which neuron of B is neuron i of A; -1: none

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class TensorResult:
    """How a tensor of A compares with that of B."""

    name: str
    status: Status  # identical: the same values, if not the same type; reordered: the same, neurons in another order
    types: str  # "Q8_0", or "F16, F32" where they are stored otherwise
    detail: str = ""
    max_difference: float | None = None  # of two values; None unless both were compared
    relative_error: float | None = None  # root of the sum of squared differences over that of A's squares


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`."""

    tensors: list[TensorResult]
    values: list[str] = field(default_factory=list)  # key-values of the model that differ
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether A and B are the same function."""
        return self.within(0.0)

    def within(self, tolerance: float) -> bool:
        """Whether no tensor differs by more than that relative error."""
        return not self.values and all(_within(result, tolerance) for result in self.tensors)

    def counts(self) -> dict[str, int]:
        """Tensors by status."""
        return dict(Counter(result.status for result in self.tensors))


def _within(result: TensorResult, tolerance: float) -> bool:
    if result.status in ("identical", "reordered"):
        return True
    return bool(tolerance) and result.relative_error is not None and result.relative_error <= tolerance


def verify(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, memory: int = MEMORY, progress: str | None = None
) -> Verification:
    """Compares two models tensor by tensor, in about `memory` bytes.

    progress: what to call the work on stderr; None shows none.

    Raises GgufToolsError if one of the files is damaged, OSError if one cannot be opened.
    """
    left, right = (_Side.open(Path(path)) for path in (a, b))
    longer = [*right.narrowed_to(left), *left.narrowed_to(right)]
    names = list({**left.model.tensors, **right.model.tensors})
    results: list[TensorResult] = []
    with byte_progress(progress, sum(map(data_bytes, left.model.tensors.values()))) as advance:
        for il in sorted(left.layers.keys() & right.layers.keys()):
            for result in _Layer(left, right, il, memory).compare():
                results.append(result)
                advance(left.size(result.name))
        done = {result.name for result in results}
        for name in names:
            if name not in done:
                pair = left.model.tensors.get(name), right.model.tensors.get(name)
                results.append(_compare(name, *pair, memory))
                advance(left.size(name))
    order = {name: i for i, name in enumerate(names)}
    values, notes = _compare_values(left.model.values, right.model.values, _factors(longer))
    if longer:
        pairs = ", ".join(dict.fromkeys(f"{block.wide} for {block.n_ff}" for block in longer))
        notes.append(f"{len(longer)} feed-forward blocks are wider, by neurons that say nothing: {pairs}")
    return Verification(sorted(results, key=lambda result: order[result.name]), values, notes)


@dataclass(frozen=True)
class _Side:
    model: OrdinarySource
    layers: dict[int, Neurons]

    @classmethod
    def open(cls, path: Path) -> _Side:
        source = open_gguf(path)
        return cls(without_bundles(source, path), dense_layers(source, path))

    def narrowed_to(self, other: _Side) -> list[Widened]:
        """Leaves out neurons that say nothing where `other` has fewer. Returns the blocks that had some."""
        found = widened(other.model.tensors, self.model.tensors)
        for block in found:
            self.model.tensors.update(block.tensors)
            for side in (self, other):
                side.layers.pop(int(block.down.split(".")[1]), None)
        return found

    def size(self, name: str) -> int:
        """Bytes of a tensor; 0 where it is missing."""
        tensor = self.model.tensors.get(name)
        return 0 if tensor is None else data_bytes(tensor)


class _Difference:
    """What two tensors differ by, gathered block by block."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.where = ""
        self._squares = self._reference = 0.0

    def add(self, a: Floats, b: Floats, row: int) -> None:
        """Rows of A and B from number `row` on."""
        self._reference += float(np.square(a, dtype=np.float64).sum())
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if same.all():
            return
        difference = np.where(same, 0.0, np.abs(a.astype(np.float64) - b))
        np.nan_to_num(difference, copy=False, nan=math.inf, posinf=math.inf)
        self._squares += float(np.square(difference).sum())
        at = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[at] > self.largest:
            self.largest = float(difference[at])
            self.where = f"row {row + int(at[0])}, column {int(at[1])}"

    @property
    def relative_error(self) -> float:
        return math.sqrt(self._squares / self._reference) if self._reference else math.inf if self.largest else 0.0

    def result(self, name: str, types: str, same: Status = "identical") -> TensorResult:
        if not self.largest:
            return TensorResult(name, same, types)
        detail = f"at most {self.largest:.3g}, in {self.where}; relative error {self.relative_error:.2g}"
        return TensorResult(name, "differs", types, detail, self.largest, self.relative_error)


def _types(a: SourceTensor, b: SourceTensor) -> str:
    kinds = [(t.matrix if isinstance(t, Transposed) else t).kind for t in (a, b)]
    return kinds[0].name if kinds[0] == kinds[1] else f"{kinds[0].name}, {kinds[1].name}"


def _compare(name: str, a: SourceTensor | None, b: SourceTensor | None, memory: int) -> TensorResult:
    """Two tensors as they are."""
    if a is None or b is None:
        present = a or b
        assert present is not None
        return TensorResult(name, "missing", present.kind.name, f"only {'A' if a else 'B'} has it")
    types = _types(a, b)
    if a.shape != b.shape:
        return TensorResult(name, "differs", types, f"shapes {list(a.shape)} and {list(b.shape)}")
    difference, bytes_differ = _Difference(), False
    for rows in _runs(a, b, memory):
        if a.kind == b.kind and np.array_equal(a.raw(rows.start, rows.stop), b.raw(rows.start, rows.stop)):
            continue
        bytes_differ = True
        difference.add(a.floats(rows.start, rows.stop), b.floats(rows.start, rows.stop), rows.start)
    result = difference.result(name, types)
    if bytes_differ and result.status == "identical" and not {a.kind, b.kind} <= WEIGHT_TYPES:
        return TensorResult(name, "differs", types, "other bytes")  # whole numbers that float32 does not tell apart
    return result


def _runs(a: SourceTensor, b: SourceTensor, memory: int) -> Sequence[slice]:
    cost = sum(row_cost(t, t.kind) for t in (a, b)) + 8 * _FLOAT * row_length(a)
    return row_runs([a, b], cost, memory)


class _Layer:
    """The dense feed-forward block of a layer, in A and in B."""

    def __init__(self, a: _Side, b: _Side, il: int, memory: int) -> None:
        self._il, self._memory = il, memory
        self._a, self._b = a.layers[il], b.layers[il]
        self._tensors = (a.model.tensors, b.model.tensors)

    def compare(self) -> Iterator[TensorResult]:
        in_order = [_compare(name, a, b, self._memory) for name, a, b in self._pairs()]
        order = None
        if any(result.status != "identical" for result in in_order) and self._comparable():
            order = self._order()
        if order is None:
            yield from in_order
        elif (order < 0).any():
            yield from _without_counterpart(in_order, order)
        else:
            pairs = {name: (a, b) for name, a, b in self._pairs()}
            for result in in_order:
                yield self._compare_reordered(result, *pairs[result.name], order)

    def _pairs(self) -> Iterator[tuple[str, SourceTensor | None, SourceTensor | None]]:
        """Weights as the ordinary model has them, and the biases that go with the neurons."""
        a, b = self._tensors
        for part in ("gate", "up", "down"):
            name = weight_name(self._il, part)
            if name in a or name in b:
                yield name, a.get(name), b.get(name)
        for part in ("gate", "up"):
            name = bias_name(self._il, part)
            if name in a or name in b:
                yield name, a.get(name), b.get(name)

    def _comparable(self) -> bool:
        return all(a is not None and b is not None and a.shape == b.shape for _, a, b in self._pairs())

    def _order(self) -> Order | None:
        """Finds each neuron of A in B by its rows of gate and up and its biases; None if they are in the same order."""
        rows = [self._digests(side, tensors, ("gate", "up")) for side, tensors in self._sides()]
        if rows[0] == rows[1]:
            return None
        downs = [self._digests(side, {}, ("down",)) for side, _ in self._sides()]
        # among neurons with equal rows, the one with the same column of down
        order = _match(
            *([row + down for row, down in zip(*pair, strict=True)] for pair in zip(rows, downs, strict=True))
        )
        taken = set(order[order >= 0].tolist())
        rest_a = np.flatnonzero(order < 0)
        rest_b = np.array([i for i in range(len(order)) if i not in taken], np.int64)
        found = _match([rows[0][i] for i in rest_a], [rows[1][i] for i in rest_b])
        order[rest_a[found >= 0]] = rest_b[found[found >= 0]]
        moved = (order >= 0) & (order != np.arange(len(order)))
        return order if moved.any() else None

    def _sides(self) -> Iterator[tuple[Neurons, dict[str, SourceTensor]]]:
        yield from zip((self._a, self._b), self._tensors, strict=True)

    def _digests(self, neurons: Neurons, tensors: dict[str, SourceTensor], parts: Sequence[str]) -> list[bytes]:
        hashes = [hashlib.blake2b(digest_size=16) for _ in range(neurons.n_ff)]
        for part in parts:
            if part not in neurons.parts:
                continue
            tensor = neurons.parts[part]
            for rows in row_runs(
                [tensor], row_cost(tensor, tensor.kind) + 3 * _FLOAT * row_length(tensor), self._memory
            ):
                values = tensor.floats(rows.start, rows.stop) + np.float32(0)  # which makes -0 into 0
                for row, one in zip(values, hashes[rows], strict=True):
                    one.update(row.data)
            bias = tensors.get(bias_name(self._il, part))
            if bias is not None:
                for value, one in zip(bias.floats(0, 1)[0] + np.float32(0), hashes, strict=True):
                    one.update(value.tobytes())
        return [one.digest() for one in hashes]

    def _compare_reordered(
        self, in_order: TensorResult, a: SourceTensor | None, b: SourceTensor | None, order: Order
    ) -> TensorResult:
        assert a is not None and b is not None
        if in_order.name != weight_name(self._il, "down"):  # that is what they were matched by
            return (
                in_order if in_order.status == "identical" else TensorResult(in_order.name, "reordered", in_order.types)
            )
        difference = _Difference()
        for rows in _runs(a, b, self._memory):  # neurons are the columns
            difference.add(a.floats(rows.start, rows.stop), b.floats(rows.start, rows.stop)[:, order], rows.start)
        return difference.result(in_order.name, in_order.types, "reordered")


def _without_counterpart(in_order: Sequence[TensorResult], order: Order) -> Iterator[TensorResult]:
    lost = np.flatnonzero(order < 0)
    detail = f"in another order; {len(lost)} of {len(order)} neurons have no counterpart, the first is {lost[0]}"
    for result in in_order:
        if result.status == "identical":
            yield result
        else:
            yield TensorResult(result.name, "differs", result.types, detail)


def _match(a: Sequence[bytes], b: Sequence[bytes]) -> Order:
    """For each entry of A the position of an equal one in B that no other has; -1: there is none."""
    positions: dict[bytes, list[int]] = {}
    for i in range(len(b) - 1, -1, -1):
        positions.setdefault(b[i], []).append(i)
    return np.array([positions[key].pop() if positions.get(key) else -1 for key in a], np.int64)


def _factors(longer: Sequence[Widened]) -> set[Fraction]:
    """By how much blocks are wider, on either side."""
    factors = {Fraction(block.wide, block.n_ff) for block in longer}
    return factors | {1 / factor for factor in factors}


def _is_longer(a: KeyValue, b: KeyValue, factors: set[Fraction]) -> bool:
    """Whether lengths differ as those of the blocks do."""
    pairs = list(zip(*(v.value if isinstance(v.value, list) else [v.value] for v in (a, b)), strict=False))
    return a.type == b.type and any(all(y == x * factor for x, y in pairs) for factor in factors)


def _compare_values(
    a: dict[str, KeyValue], b: dict[str, KeyValue], factors: set[Fraction]
) -> tuple[list[str], list[str]]:
    """Key-values that belong to the function, and what else is worth knowing about them."""
    arch = a["general.architecture"].value if "general.architecture" in a else ""
    differing, notes = [], []
    for key in {**a, **b}:
        if not key.startswith((f"{arch}.", "tokenizer.")) and key != "general.architecture":
            continue
        left, right = a.get(key), b.get(key)
        if left is not None and right is not None and left.value == right.value:
            continue
        if key.endswith("feed_forward_length") and left and right and _is_longer(left, right, factors):
            continue
        text = f"{key}: {_shown(left)}, {_shown(right)}"
        stated_once = left is None or right is None
        if stated_once and key.startswith(f"{arch}.feed_forward_activation"):
            notes.append(f"only {'B' if left is None else 'A'} states the activation, {text}")
        else:
            differing.append(text)
    return differing, notes


def _shown(value: KeyValue | None) -> str:
    return "missing" if value is None else reprlib.repr(value.value)
