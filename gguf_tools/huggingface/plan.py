"""What an architecture makes of a checkpoint: key-values, and for each tensor of the GGUF file where it comes from.

What lives here: the words that the architectures' modules are written in, and turning a plan and weights into tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools import ggml
from gguf_tools.errors import GgufToolsError
from gguf_tools.format import Activation
from gguf_tools.huggingface.checkpoint import Weight, listed
from gguf_tools.source import Bytes, Floats, KeyValue, SourceTensor, row_count

Order = npt.NDArray[np.int64]  # output row (or, of a vector, element) -> that of the checkpoint
_JUNK = r".*(rotary_emb|rotary|maybe_rotary)\.inv_freq|.*\.masked_bias"  # buffers that old checkpoints carry along


def uint32(value: int) -> KeyValue:
    return KeyValue(value, GGUFValueType.UINT32)


def float32(value: float) -> KeyValue:
    return KeyValue(value, GGUFValueType.FLOAT32)


def boolean(value: bool) -> KeyValue:
    return KeyValue(value, GGUFValueType.BOOL)


def string(value: str) -> KeyValue:
    return KeyValue(value, GGUFValueType.STRING)


@dataclass(frozen=True)
class Mapped:
    """A tensor of the GGUF file."""

    name: str
    weight: str  # its name in the checkpoint
    shape: tuple[int, ...]  # there: the row length last
    order: Order | None = None  # None: as it is
    plus: float = 0.0  # added to every element of a vector


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a model."""

    architecture: str
    n_vocab: int
    activation: Activation | None  # None: one that keeps every neuron active, and that the engine computes anyway
    activation_name: str  # as the checkpoint calls it
    values: dict[str, KeyValue]
    tensors: list[Mapped]
    constants: dict[str, Floats] = field(default_factory=dict)  # vectors that no weight holds
    ignored: str = ""  # regular expression of weights that are of no use here


@dataclass(frozen=True)
class Reordered:
    """A SourceTensor: another one's rows, or a vector's elements, in another order."""

    tensor: SourceTensor
    order: Order

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def kind(self) -> GGMLQuantizationType:
        return self.tensor.kind

    def raw(self, start: int, stop: int) -> Bytes:
        if len(self.shape) == 1:
            elements = self.tensor.raw(start, stop).reshape(stop - start, len(self.order), -1)
            return np.ascontiguousarray(elements[:, self.order]).reshape(stop - start, -1)
        wanted = self.order[start:stop]
        rows = np.sort(wanted)
        gaps = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = [self.tensor.raw(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, gaps) if len(run)]
        return np.concatenate(runs)[np.searchsorted(rows, wanted)] if runs else self.tensor.raw(0, 0)

    def floats(self, start: int, stop: int) -> Floats:
        return ggml.dequantize(self.raw(start, stop), self.kind)


@dataclass(frozen=True)
class Vector:
    """A SourceTensor that is held in memory."""

    name: str
    values: Floats

    kind = GGMLQuantizationType.F32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def raw(self, start: int, stop: int) -> Bytes:
        return self.floats(start, stop).view(np.uint8)

    def floats(self, start: int, stop: int) -> Floats:
        return np.ascontiguousarray(self.values[None, :][start:stop])


def matrix(name: str, weight: str, shape: tuple[int, int], *, bias: bool, order: Order | None = None) -> list[Mapped]:
    """A linear layer; shape: outputs, inputs."""
    found = [Mapped(f"{name}.weight", f"{weight}.weight", shape, order)]
    return [*found, Mapped(f"{name}.bias", f"{weight}.bias", shape[:1], order)] if bias else found


def norm(name: str, weight: str, n_embd: int, *, bias: bool, plus: float = 0.0) -> list[Mapped]:
    """A normalisation; plus is added to its weight."""
    found = [Mapped(f"{name}.weight", f"{weight}.weight", (n_embd,), plus=plus)]
    return [*found, Mapped(f"{name}.bias", f"{weight}.bias", (n_embd,))] if bias else found


def repeated(layer: Iterable[Mapped], n_layer: int, prefix: str) -> list[Mapped]:
    """The tensors of one layer for all layers. prefix: of a layer's weights in the checkpoint, {} its number."""
    layer = list(layer)
    return [
        replace(one, name=f"blk.{il}.{one.name}", weight=prefix.format(il) + one.weight)
        for il in range(n_layer)
        for one in layer
    ]


def make_tensors(
    plan: Plan, weights: Mapping[str, Weight], directory: Path
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The model's tensors in file order, and the names of weights that are left out.

    Raises GgufToolsError, naming the tensors, if weights are missing, of another shape or of unknown use.
    """
    missing = [one.weight for one in plan.tensors if one.weight not in weights]
    if missing:
        raise GgufToolsError(f"tensors of a {plan.architecture} model are missing: {listed(missing)}", file=directory)
    used = {one.weight for one in plan.tensors}
    ignorable = re.compile(f"{_JUNK}|{plan.ignored}" if plan.ignored else _JUNK)
    ignored = tuple(name for name in weights if name not in used and ignorable.fullmatch(name))
    unknown = [name for name in weights if name not in used and name not in ignored]
    if unknown:
        raise GgufToolsError(
            f"tensors that a {plan.architecture} model does not have: {listed(unknown)}", file=directory
        )
    tensors = {one.name: _make_tensor(one, weights[one.weight], directory) for one in plan.tensors}
    return tensors | {name: Vector(name, values) for name, values in plan.constants.items()}, ignored


def _make_tensor(mapped: Mapped, weight: Weight, directory: Path) -> SourceTensor:
    if weight.shape != mapped.shape:
        message = f"has the shape {list(weight.shape)}, config.json makes it {list(mapped.shape)}"
        raise GgufToolsError(message, file=directory, tensor=weight.name)
    tensor = weight.tensor(mapped.name)
    if mapped.order is not None:
        tensor = Reordered(tensor, mapped.order)
    if mapped.plus:
        tensor = Vector(mapped.name, tensor.floats(0, row_count(tensor))[0] + np.float32(mapped.plus))
    return tensor
