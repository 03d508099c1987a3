"""What makes a GGUF file a flash file (docs/reference/format.md): key-values and tensors of bundles and predictors.

What lives here: those key-values as the tools write them, and what a flash file is to the tools. Not here: the checks
that a reader owes them (llama_flash), and the bytes of the records (neurons.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools.errors import GgufToolsError, errors_of_tools
from gguf_tools.source import KeyValue, TensorInfo
from gguf_tools.types import row_bytes
from llama_flash.model.bundles import read_bundles
from llama_flash.model.flash_keys import (
    ACTIVATIONS,
    LAYOUTS,
    PARTS,
    PREDICTOR_KIND,
    VERSION,
    BundleFormat,
    Dimensions,
    Experts,
    Keys,
    Layout,
    read_activation,
    read_layout,
    read_predictor,
)
from llama_flash.model.gguf import GgufMeta
from llama_flash.model.gguf import TensorInfo as FileTensorInfo

__all__ = [
    "ACTIVATIONS",
    "ALIGNMENT",
    "EXPERTS",
    "EXPERTS_ACTIVATION",
    "LAYOUTS",
    "PARTS",
    "PREDICTOR_TYPES",
    "Activation",
    "BundleLayout",
    "Described",
    "Dimensions",
    "Experts",
    "FlashInfo",
    "PartLayout",
    "PredictorInfo",
    "bias_name",
    "dimensions_of",
    "experts_of",
    "has_shape",
    "read_flash",
    "weight_name",
]

ALIGNMENT = 4096  # of a flash file's tensors, in bytes
PREDICTOR_TYPES = frozenset(GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))

_UINT32, _UINT64 = GGUFValueType.UINT32, GGUFValueType.UINT64
_FLOAT32, _STRING, _ARRAY = GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.ARRAY
EXPERTS = "_exps"  # ends the name of a part, or of the bundle, that holds all experts of a layer
EXPERTS_ACTIVATION = "reglu"  # of layers whose experts are bundled


def weight_name(il: int, part: str) -> str:
    """Name of a weight of layer `il`. part: gate, up, down or bundle, of experts with `EXPERTS`; predictor_in, _out."""
    return f"blk.{il}.ffn_{part}.weight"


def bias_name(il: int, part: str) -> str:
    return f"blk.{il}.ffn_{part}.bias"


@dataclass(frozen=True)
class PartLayout:
    """One of a record's parts."""

    name: str  # gate, up or down
    kind: GGMLQuantizationType
    row_length: int  # elements
    offset: int  # bytes from the record's begin

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.kind, self.row_length)


@dataclass(frozen=True)
class BundleLayout:
    """How the bundles of a file are laid out."""

    parts: tuple[PartLayout, ...]  # in their order
    layout: str  # bundled or split

    @classmethod
    def of(cls, kinds: Mapping[str, GGMLQuantizationType], n_embd: int, layout: str = "bundled") -> BundleLayout:
        """kinds: type of each part (gate), up, down. Raises GgufToolsError if that is not a layout of the format."""
        values = cls._values(kinds, n_embd, layout)
        return cls.from_values(values, n_embd)

    @staticmethod
    def _values(kinds: Mapping[str, GGMLQuantizationType], n_embd: int, layout: str) -> dict[str, KeyValue]:
        names = [name for name in PARTS if name in kinds]
        try:
            sizes = [row_bytes(kinds[name], n_embd) for name in names]
        except ValueError as error:
            raise GgufToolsError(str(error)) from None
        return {
            "flash.version": KeyValue(VERSION, _UINT32),
            "flash.bundle.parts": KeyValue(names, _ARRAY, _STRING),
            "flash.bundle.types": KeyValue([int(kinds[name]) for name in names], _ARRAY, _UINT32),
            "flash.bundle.row_lengths": KeyValue([n_embd] * len(names), _ARRAY, _UINT32),
            "flash.bundle.offsets": KeyValue([sum(sizes[:i]) for i in range(len(sizes))], _ARRAY, _UINT64),
            "flash.bundle.record_bytes": KeyValue(sum(sizes), _UINT64),
            "flash.bundle.layout": KeyValue(layout, _STRING),
        }

    @classmethod
    def from_values(cls, values: Mapping[str, KeyValue], n_embd: int, file: Path | str = "") -> BundleLayout:
        """Raises GgufToolsError, naming the key, if the values are not there or contradict each other."""
        with errors_of_tools(file):
            return cls.from_layout(read_layout(keys_of(values, file), n_embd), n_embd)

    @classmethod
    def from_layout(cls, layout: Layout | BundleFormat, n_embd: int) -> BundleLayout:
        """Of what llama_flash has read."""
        parts = (PartLayout(part.name, GGMLQuantizationType(part.type), n_embd, part.offset) for part in layout.parts)
        return cls(tuple(parts), LAYOUTS[layout.split])

    def to_values(self) -> dict[str, KeyValue]:
        """The key-values flash.version and flash.bundle.*."""
        return self._values({part.name: part.kind for part in self.parts}, self.n_embd, self.layout)

    @property
    def n_embd(self) -> int:
        return self.parts[0].row_length

    @property
    def record_bytes(self) -> int:
        return sum(part.row_bytes for part in self.parts)

    @property
    def gated(self) -> bool:
        return len(self.parts) == len(PARTS)

    def begin(self, part: PartLayout, neuron: int, n_ff: int) -> int:
        """First byte of a part of a neuron, from the begin of the layer's bundle."""
        if self.layout == "split":
            return n_ff * part.offset + neuron * part.row_bytes
        return neuron * self.record_bytes + part.offset


@dataclass(frozen=True)
class Activation:
    """The function between up (and gate) and down."""

    name: str
    threshold: float | None = None  # of fatrelu; rounded to float32, as files hold it

    def __post_init__(self) -> None:
        if self.threshold is not None:
            object.__setattr__(self, "threshold", float(np.float32(self.threshold)))

    @classmethod
    def from_values(cls, values: Mapping[str, KeyValue], arch: str, file: Path | str = "") -> Activation | None:
        """None if the file does not say it. Raises GgufToolsError, naming the key, for an unknown one."""
        if f"{arch}.feed_forward_activation" not in values:
            return None
        with errors_of_tools(file):
            name, threshold = read_activation(keys_of(values, file), arch)
        return cls(name, threshold if name == "fatrelu" else None)

    def to_values(self, arch: str) -> dict[str, KeyValue]:
        values = {f"{arch}.feed_forward_activation": KeyValue(self.name, _STRING)}
        if self.threshold is not None:
            values[f"{arch}.feed_forward_activation_threshold"] = KeyValue(self.threshold, _FLOAT32)
        return values

    def fits(self, *, gated: bool) -> bool:
        return gated in ACTIVATIONS[self.name]

    def __str__(self) -> str:
        return self.name if self.threshold is None else f"{self.name} > {self.threshold:g}"


@dataclass(frozen=True)
class PredictorInfo:
    """The predictors of a file."""

    ranks: tuple[int, ...]  # by layer; 0: it has none
    recall: float | None = None  # share of the activation mass that the calibration aimed at
    kind: str = PREDICTOR_KIND

    @classmethod
    def from_values(cls, values: Mapping[str, KeyValue], n_layer: int, file: Path | str = "") -> PredictorInfo | None:
        """None if the file has no predictors. Raises GgufToolsError, naming the key."""
        with errors_of_tools(file):
            found = read_predictor(keys_of(values, file), n_layer)
        return None if found is None else cls(tuple(found[0]), found[1])

    def to_values(self) -> dict[str, KeyValue]:
        values = {
            "flash.predictor.kind": KeyValue(self.kind, _STRING),
            "flash.predictor.ranks": KeyValue(list(self.ranks), _ARRAY, _UINT32),
        }
        if self.recall is not None:
            values["flash.predictor.recall"] = KeyValue(self.recall, _FLOAT32)
        return values


@dataclass(frozen=True)
class FlashInfo:
    """All that the format adds to a file, checked."""

    architecture: str
    bundle: BundleLayout
    activation: Activation
    predictor: PredictorInfo | None
    n_ff: dict[int, int]  # neurons of each layer that has a bundle; of a layer of experts: of each expert
    n_expert: dict[int, int] = field(default_factory=dict)  # experts of each layer that has a bundle of them


def dimensions_of(values: Mapping[str, KeyValue], file: Path | str = "") -> Dimensions:
    """Raises GgufToolsError, naming the key that is missing or not a number."""
    with errors_of_tools(file):
        return Dimensions.of(keys_of(values, file))


def experts_of(values: Mapping[str, KeyValue], arch: str, file: Path | str = "") -> Experts:
    """Raises GgufToolsError, naming the key that is missing or not a number."""
    with errors_of_tools(file):
        return Experts.of(keys_of(values, file), arch)


def keys_of(values: Mapping[str, KeyValue], file: Path | str) -> Keys:
    """Key-values as llama_flash reads them."""
    return Keys({key: value.value for key, value in values.items()}, _types(values), file)


def _types(values: Mapping[str, KeyValue]) -> dict[str, str]:
    """As "uint32", "string[]"."""
    return {
        key: f"{value.sub_type.name.lower()}[]" if value.sub_type is not None else value.type.name.lower()
        for key, value in values.items()
    }


class Described(Protocol):
    """A model, as far as it is known without its tensors' data. Every `Source` is one."""

    @property
    def values(self) -> Mapping[str, KeyValue]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


def read_flash(source: Described, file: Path | str = "") -> FlashInfo | None:
    """What the format adds to a model; None for an ordinary one.

    Raises GgufToolsError, naming tensor or key, where the model is not as docs/reference/format.md says. That its
    tensors lie within the file has been checked by `open_gguf`.
    """
    values = source.values
    described = GgufMeta(
        files=(Path(file),),
        values={key: value.value for key, value in values.items()},
        tensors={
            tensor.name: FileTensorInfo(tensor.name, tensor.shape, int(tensor.kind), Path(file), 0, 0)
            for tensor in source.tensors.values()
        },
        file_bytes=0,
        types=_types(values),
    )
    with errors_of_tools(file):
        bundles = read_bundles(described)
    if bundles is None:
        return None
    dimensions, form = dimensions_of(values, file), bundles.format
    return FlashInfo(
        architecture=dimensions.architecture,
        bundle=BundleLayout.from_layout(form, form.n_embd),
        activation=Activation(form.activation, form.threshold if form.activation == "fatrelu" else None),
        predictor=PredictorInfo.from_values(values, dimensions.n_layer, file),
        n_ff={layer.layer: layer.n_ff for layer in bundles.layers},
        n_expert={layer.layer: layer.n_expert for layer in bundles.layers if layer.n_expert},
    )


def has_shape(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor's shape is that one, which may have been written with more dimensions of 1."""
    return found in (shape, (*shape, *[1] * (len(found) - len(shape))))
