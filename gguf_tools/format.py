"""What makes a GGUF file a flash file (docs/reference/format.md): key-values and tensors of bundles and predictors.

What lives here: reading and writing those key-values, and every check that a reader owes them. Not here: the bytes of
the records (neurons.py).
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from gguf_tools.errors import GgufToolsError
from gguf_tools.source import KeyValue, TensorInfo
from gguf_tools.types import FLASH, WEIGHT_TYPES, fits, row_bytes

VERSION = 1
ALIGNMENT = 4096  # of a flash file's tensors, in bytes
LAYOUTS = ("bundled", "split")
PARTS = ("gate", "up", "down")  # the order within a record
# activation -> whether its model has a gate
ACTIVATIONS: dict[str, frozenset[bool]] = {
    "relu": frozenset({False}),
    "relu2": frozenset({False, True}),
    "reglu": frozenset({True}),
    "fatrelu": frozenset({True}),
    "drelu": frozenset({True}),
}
PREDICTOR_KIND = "lowrank"
PREDICTOR_TYPES = frozenset(GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))

_F32 = GGMLQuantizationType.F32
_UINT32, _UINT64 = GGUFValueType.UINT32, GGUFValueType.UINT64
_FLOAT32, _STRING, _ARRAY = GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.ARRAY
_WHOLE = (GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.INT64)
_short = reprlib.repr  # a damaged file may hold a lot
_FFN = re.compile(
    r"blk\.(0|[1-9][0-9]{0,8})"
    r"\.ffn_((?:(?:bundle|up|gate|down|gate_up)(?:_exps)?|predictor_in|predictor_out|predictor)\.\w+)"
)
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
        take = _Values(values, file)
        if (version := take.get("flash.version", _UINT32)) != VERSION:
            raise take.error("flash.version", f"is {version}, only {VERSION} is known")
        names = take.get("flash.bundle.parts", _ARRAY, _STRING)
        if names not in (["up", "down"], ["gate", "up", "down"]):
            raise take.error("flash.bundle.parts", f"is {_short(names)}, not (gate,) up, down")
        numbers = take.get("flash.bundle.types", _ARRAY, _UINT32, len(names))
        known = {int(kind): kind for kind in WEIGHT_TYPES}
        for number in numbers:
            if number not in known:
                raise take.error("flash.bundle.types", f"has {number}, which is not the type of a weight")
        if len(names) == 3 and numbers[0] != numbers[1]:
            raise take.error("flash.bundle.types", "gives gate and up different types")
        kinds = [known[number] for number in numbers]
        lengths = take.get("flash.bundle.row_lengths", _ARRAY, _UINT32, len(names))
        if lengths != [n_embd] * len(names):
            raise take.error("flash.bundle.row_lengths", f"is {_short(lengths)}, the embedding length is {n_embd}")
        for kind in kinds:
            if not fits(kind, n_embd):
                block = GGML_QUANT_SIZES[kind][0]
                raise take.error("flash.bundle.row_lengths", f"{n_embd} is not a multiple of {kind.name}'s {block}")
        sizes = [row_bytes(kind, n_embd) for kind in kinds]
        offsets = take.get("flash.bundle.offsets", _ARRAY, _UINT64, len(names))
        expected = [sum(sizes[:i]) for i in range(len(sizes))]
        if offsets != expected:
            raise take.error("flash.bundle.offsets", f"is {_short(offsets)}, the parts' row bytes make it {expected}")
        record = take.get("flash.bundle.record_bytes", _UINT64)
        if record != sum(sizes):
            raise take.error("flash.bundle.record_bytes", f"is {record}, the parts' row bytes make it {sum(sizes)}")
        layout = take.get("flash.bundle.layout", _STRING)
        if layout not in LAYOUTS:
            raise take.error("flash.bundle.layout", f"is {_short(layout)}, known: {', '.join(LAYOUTS)}")
        parts = zip(names, kinds, offsets, strict=True)
        return cls(tuple(PartLayout(name, kind, n_embd, offset) for name, kind, offset in parts), layout)

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
        key = f"{arch}.feed_forward_activation"
        if key not in values:
            return None
        take = _Values(values, file)
        name = take.get(key, _STRING)
        if name not in ACTIVATIONS:
            raise take.error(key, f"is {_short(name)}, known: {', '.join(ACTIVATIONS)}")
        if name != "fatrelu":
            return cls(name)
        threshold = take.get(f"{key}_threshold", _FLOAT32)
        if not math.isfinite(threshold):
            raise take.error(f"{key}_threshold", f"is {threshold}")
        return cls(name, threshold)

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
        if "flash.predictor.kind" not in values:
            for key in values:
                if key.startswith("flash.predictor."):
                    raise GgufToolsError("is there without flash.predictor.kind", file=file, key=key)
            return None
        take = _Values(values, file)
        if (kind := take.get("flash.predictor.kind", _STRING)) != PREDICTOR_KIND:
            raise take.error("flash.predictor.kind", f"is {_short(kind)}, only {PREDICTOR_KIND!r} is known")
        ranks = take.get("flash.predictor.ranks", _ARRAY, _UINT32, n_layer)
        recall = None
        if "flash.predictor.recall" in values:
            recall = take.get("flash.predictor.recall", _FLOAT32)
            if not 0 <= recall <= 1:
                raise take.error("flash.predictor.recall", f"is {recall}, not a share")
        return cls(tuple(ranks), recall)

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


@dataclass(frozen=True)
class Dimensions:
    """The few numbers of a model that the feed-forward blocks follow from."""

    architecture: str
    n_layer: int
    n_embd: int
    _n_ff: int | list[int]

    @classmethod
    def of(cls, values: Mapping[str, KeyValue], file: Path | str = "") -> Dimensions:
        """Raises GgufToolsError, naming the key that is missing or not a number."""
        take = _Values(values, file)
        arch = take.get("general.architecture", _STRING)
        n_ff: int | list[int]
        key = f"{arch}.feed_forward_length"
        if key not in values and f"{arch}.expert_feed_forward_length" in values:
            n_ff = 0  # a mixture of experts may have no dense layer
        elif key in values and values[key].type == _ARRAY:
            n_ff = take.get(key, _ARRAY, None)
            if values[key].sub_type not in _WHOLE:
                raise take.error(key, "is not an array of whole numbers")
        else:
            n_ff = take.whole(key)
        return cls(arch, take.whole(f"{arch}.block_count"), take.whole(f"{arch}.embedding_length"), n_ff)

    def n_ff(self, il: int) -> int:
        """Neurons of a layer; 0 if the file does not say it."""
        if isinstance(self._n_ff, int):
            return self._n_ff
        return int(self._n_ff[il]) if il < len(self._n_ff) else 0


@dataclass(frozen=True)
class Experts:
    """The experts of a model: as many, and as wide, in all layers that have some."""

    n_expert: int
    n_ff: int  # neurons of each

    @classmethod
    def of(cls, values: Mapping[str, KeyValue], arch: str, file: Path | str = "") -> Experts:
        """Raises GgufToolsError, naming the key that is missing or not a number."""
        take = _Values(values, file)
        return cls(take.whole(f"{arch}.expert_count"), take.whole(f"{arch}.expert_feed_forward_length"))

    def shape(self, row_length: int, n_rows: int) -> tuple[int, ...]:
        """Of a tensor of one such matrix per expert. ggml does not write the last dimension of a single one."""
        return (row_length, n_rows) if self.n_expert == 1 else (row_length, n_rows, self.n_expert)


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
    values, tensors = source.values, source.tensors
    if "flash.version" not in values:
        for key in values:
            if key.startswith("flash."):
                raise GgufToolsError("is there without flash.version", file=file, key=key)
        for tensor in tensors.values():
            match = _FFN.fullmatch(tensor.name)
            if tensor.kind == FLASH or (match and match[2].startswith(("bundle", "predictor"))):
                raise GgufToolsError("is there without flash.version", file=file, tensor=tensor.name)
        return None
    dimensions = Dimensions.of(values, file)
    bundle = BundleLayout.from_values(values, dimensions.n_embd, file)
    activation = Activation.from_values(values, dimensions.architecture, file)
    key = f"{dimensions.architecture}.feed_forward_activation"
    if activation is None:
        raise GgufToolsError("is missing", file=file, key=key)
    if not activation.fits(gated=bundle.gated):
        names = ", ".join(part.name for part in bundle.parts)
        raise GgufToolsError(f"is {activation.name}, which does not fit the parts {names}", file=file, key=key)
    predictor = PredictorInfo.from_values(values, dimensions.n_layer, file)
    checks = _TensorChecks(tensors, dimensions, bundle, predictor, file)
    checks.check_names()
    n_ff = {il: checks.check_bundle(il) for il in checks.layers_with("bundle.weight")}
    n_expert: dict[int, int] = {}
    if layers := checks.layers_with(f"bundle{EXPERTS}.weight"):
        _check_experts(bundle, activation, key, file)
        experts = Experts.of(values, dimensions.architecture, file)
        n_ff |= {il: checks.check_experts(il, experts) for il in layers}
        n_expert = dict.fromkeys(layers, experts.n_expert)
    if not n_ff:
        message = f"is there, but no tensor blk.N.ffn_bundle.weight or blk.N.ffn_bundle{EXPERTS}.weight"
        raise GgufToolsError(message, file=file, key="flash.version")
    checks.check_predictors()
    return FlashInfo(dimensions.architecture, bundle, activation, predictor, dict(sorted(n_ff.items())), n_expert)


def _check_experts(bundle: BundleLayout, activation: Activation, key: str, file: Path | str) -> None:
    """What bundles of experts make of the other key-values. key: the activation's."""
    if not bundle.gated:
        message = "has no gate, but the file has bundles of experts"
        raise GgufToolsError(message, file=file, key="flash.bundle.parts")
    if bundle.layout != "bundled":
        message = f"is {bundle.layout}, but the file has bundles of experts"
        raise GgufToolsError(message, file=file, key="flash.bundle.layout")
    if activation.name != EXPERTS_ACTIVATION:
        raise GgufToolsError(f"is {activation.name}, that of experts is {EXPERTS_ACTIVATION}", file=file, key=key)


class _Values:
    """Key-values by their type."""

    def __init__(self, values: Mapping[str, KeyValue], file: Path | str) -> None:
        self._values, self._file = values, file

    def error(self, key: str, message: str) -> GgufToolsError:
        return GgufToolsError(message, file=self._file, key=key)

    def get(
        self, key: str, kind: GGUFValueType, sub_type: GGUFValueType | None = None, length: int | None = None
    ) -> Any:
        value = self._values.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if value.type != kind or (sub_type is not None and value.sub_type != sub_type):
            raise self.error(
                key, f"is of type {_type_name(value.type, value.sub_type)}, not {_type_name(kind, sub_type)}"
            )
        if length is not None and len(value.value) != length:
            raise self.error(key, f"has {len(value.value)} entries, not {length}")
        return value.value

    def whole(self, key: str) -> int:
        value = self._values.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if value.type not in _WHOLE:
            raise self.error(key, f"is of type {_type_name(value.type, value.sub_type)}, not a whole number")
        return int(value.value)


def _type_name(kind: GGUFValueType, sub_type: GGUFValueType | None) -> str:
    return f"{sub_type.name.lower()}[]" if sub_type is not None else kind.name.lower()


class _TensorChecks:
    """The tensors of a flash file, compared with its key-values."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        dimensions: Dimensions,
        bundle: BundleLayout,
        predictor: PredictorInfo | None,
        file: Path | str,
    ) -> None:
        self._tensors, self._dimensions = tensors, dimensions
        self._bundle, self._predictor, self._file = bundle, predictor, file

    def _error(self, tensor: str, message: str) -> GgufToolsError:
        return GgufToolsError(message, file=self._file, tensor=tensor)

    def check_names(self) -> None:
        n_layer = self._dimensions.n_layer
        for name, tensor in self._tensors.items():
            match = _FFN.fullmatch(name)
            if tensor.kind == FLASH and not (match and match[2] in ("bundle.weight", f"bundle{EXPERTS}.weight")):
                raise self._error(name, "is of type FLASH, but no bundle")
            if match and match[2].startswith(("bundle", "predictor")) and int(match[1]) >= n_layer:
                raise self._error(name, f"the model has {n_layer} layers")

    def layers_with(self, *kinds: str) -> list[int]:
        matches = (_FFN.fullmatch(name) for name in self._tensors)
        return sorted({int(match[1]) for match in matches if match and match[2] in kinds})

    def check_bundle(self, il: int) -> int:
        name, n_ff = weight_name(il, "bundle"), self._dimensions.n_ff(il)
        self._check_kind(name, (FLASH,))
        self._check_shape(name, (self._bundle.record_bytes, n_ff))
        for part in PARTS:
            if weight_name(il, part) in self._tensors:
                raise self._error(weight_name(il, part), f"is there besides {name}")
        held = {part.name for part in self._bundle.parts}
        for part in PARTS:
            bias = bias_name(il, part)
            if bias not in self._tensors:
                continue
            if part not in held:
                raise self._error(bias, f"the bundles have no {part}")
            self._check_shape(bias, (self._bundle.n_embd if part == "down" else n_ff,))
            self._check_kind(bias, (_F32,))
        return n_ff

    def check_experts(self, il: int, experts: Experts) -> int:
        name = weight_name(il, f"bundle{EXPERTS}")
        if (dense := weight_name(il, "bundle")) in self._tensors:
            raise self._error(dense, f"is there besides {name}")
        self._check_kind(name, (FLASH,))
        self._check_shape(name, experts.shape(self._bundle.record_bytes, experts.n_ff))
        for part in (*PARTS, "gate_up"):
            if (weight := weight_name(il, f"{part}{EXPERTS}")) in self._tensors:
                raise self._error(weight, f"is there besides {name}")
            for bias in (bias_name(il, part), bias_name(il, f"{part}{EXPERTS}")):
                if bias in self._tensors:
                    raise self._error(bias, f"is there besides {name}: experts in bundles have no biases")
        if self._predictor and self._predictor.ranks[il]:
            message = f"gives layer {il} a rank, but {name} has no predictor"
            raise GgufToolsError(message, file=self._file, key="flash.predictor.ranks")
        return experts.n_ff

    def check_predictors(self) -> None:
        present = self.layers_with("predictor_in.weight", "predictor_out.weight", "predictor.bias")
        ranks = self._predictor.ranks if self._predictor else ()
        for il in sorted({*present, *(il for il, rank in enumerate(ranks) if rank)}):
            names = (weight_name(il, "predictor_in"), weight_name(il, "predictor_out"), bias_name(il, "predictor"))
            rank = ranks[il] if il < len(ranks) else 0
            for name in names:
                if rank and name not in self._tensors:
                    raise self._error(name, f"is missing: flash.predictor.ranks gives layer {il} the rank {rank}")
                if not rank and name in self._tensors:
                    raise self._error(name, f"is there, but flash.predictor.ranks gives layer {il} no rank")
            n_embd, n_ff = self._dimensions.n_embd, self._dimensions.n_ff(il)
            shapes = ((n_embd, rank), (rank, n_ff), (n_ff,))
            kinds: tuple[Iterable[GGMLQuantizationType], ...] = (PREDICTOR_TYPES, PREDICTOR_TYPES, (_F32,))
            for name, shape, allowed in zip(names, shapes, kinds, strict=True):
                self._check_shape(name, shape)
                self._check_kind(name, allowed)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._tensors[name].shape
        if not has_shape(found, shape):
            raise self._error(name, f"has the shape {list(found)}, expected {list(shape)}")

    def _check_kind(self, name: str, allowed: Iterable[GGMLQuantizationType]) -> None:
        kind = self._tensors[name].kind
        if kind not in allowed:
            names = ", ".join(sorted(one.name for one in allowed))
            raise self._error(name, f"is of type {kind.name}, expected {names}")


def has_shape(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor's shape is that one, which may have been written with more dimensions of 1."""
    return found in (shape, (*shape, *[1] * (len(found) - len(shape))))
