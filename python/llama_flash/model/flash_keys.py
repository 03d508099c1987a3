"""Key-values of the flash format: what docs/reference/format.md says of them, checked. Tensors are bundles.py's matter.

Read here for the plugin and for gguf_tools.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..errors import FlashFormatError
from .ggml_types import TYPE_SIZES, tensor_bytes
from .gguf import MOST_LAYERS
from .head import SkippedArray

__all__ = [
    "ACTIVATIONS",
    "BUNDLE_TYPE",
    "LAYOUTS",
    "PARTS",
    "PREDICTOR_KIND",
    "VERSION",
    "Activation",
    "BundleFormat",
    "Dimensions",
    "Experts",
    "Keys",
    "Layout",
    "Part",
    "PartName",
    "read_activation",
    "read_layout",
    "read_predictor",
    "row_bytes",
]

BUNDLE_TYPE = 17996  # GGML_TYPE_FLASH
VERSION = 1
LAYOUTS = ("bundled", "split")
PREDICTOR_KIND = "lowrank"

PartName = Literal["gate", "up", "down"]
Activation = Literal["relu", "relu2", "reglu", "fatrelu", "drelu"]

PARTS: tuple[PartName, ...] = ("gate", "up", "down")  # the order within a record
ACTIVATIONS: dict[str, frozenset[bool]] = {  # name: whether its model has a gate
    "relu": frozenset({False}),
    "relu2": frozenset({False, True}),
    "reglu": frozenset({True}),
    "fatrelu": frozenset({True}),
    "drelu": frozenset({True}),
}

_WHOLE = ("uint32", "int32", "uint64", "int64")
_NO_WEIGHTS = frozenset({9, 15, *range(24, 29), BUNDLE_TYPE})  # Q8_1, Q8_K, I8 to I64, F64: the engine's own results
_short = reprlib.repr  # a damaged file may hold a lot


@dataclass(frozen=True)
class Part:
    """One part of a record."""

    name: PartName
    type: int  # enum ggml_type
    offset: int  # bytes from the record's begin
    row_bytes: int


@dataclass(frozen=True)
class Layout:
    """How records are laid out."""

    parts: tuple[Part, ...]
    record_bytes: int
    split: bool

    @property
    def gated(self) -> bool:
        return self.parts[0].name == "gate"


@dataclass(frozen=True)
class BundleFormat:
    """How all bundles of a file are made."""

    parts: tuple[Part, ...]
    record_bytes: int
    n_embd: int
    split: bool
    activation: Activation
    threshold: float

    @property
    def gated(self) -> bool:
        return self.parts[0].name == "gate"


class Keys:
    """Key-values of a file, by their type ("uint32", "string[]")."""

    def __init__(self, values: Mapping[str, Any], types: Mapping[str, str], file: str | os.PathLike[str]) -> None:
        self._values, self._types, self._file = values, types, file

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def error(self, key: str, said: str) -> FlashFormatError:
        return FlashFormatError(said, file=self._file, key=key)

    def get(self, key: str, *types: str, length: int | None = None) -> Any:
        """The value, of one of these types; length: entries of an array."""
        if key not in self._values:
            raise self.error(key, "is missing")
        if (found := self._types[key]) not in types:
            raise self.error(key, f"is of type {found}, not {' or '.join(types)}")
        value = self._values[key]
        n = value.length if isinstance(value, SkippedArray) else len(value) if isinstance(value, list) else None
        if isinstance(value, SkippedArray) or (length is not None and n != length):
            raise self.error(key, f"has {n} entries" + ("" if length is None else f", not {length}"))
        return value

    def whole(self, key: str) -> int:
        """A whole number."""
        value: int = self.get(key, *_WHOLE)
        return value

    def one_of(self, key: str, accepted: Collection[str]) -> str:
        value: str = self.get(key, "string")
        if value not in accepted:
            raise self.error(key, f"is {_short(value)}: expected one of {', '.join(accepted)}")
        return value


@dataclass(frozen=True)
class Dimensions:
    """The few numbers of a model that the feed-forward blocks follow from."""

    architecture: str
    n_layer: int
    n_embd: int
    _n_ff: int | list[int]  # of a dense layer

    @classmethod
    def of(cls, keys: Keys) -> Dimensions:
        """Raises FlashFormatError, naming the key that is missing or not a number."""
        arch = keys.get("general.architecture", "string")
        n_layer, n_embd = keys.whole(f"{arch}.block_count"), keys.whole(f"{arch}.embedding_length")
        if not 0 < n_layer <= MOST_LAYERS:
            raise keys.error(f"{arch}.block_count", f"is {n_layer}: expected 1 to {MOST_LAYERS}")
        n_ff: int | list[int] = 0
        key = f"{arch}.feed_forward_length"
        if key in keys or f"{arch}.expert_feed_forward_length" not in keys:  # an MoE may have no dense layer
            n_ff = keys.get(key, *_WHOLE, *(f"{kind}[]" for kind in _WHOLE))
        return cls(arch, n_layer, n_embd, n_ff)

    def n_ff(self, layer: int) -> int:
        """Neurons of a layer; 0 if the file does not say it."""
        if isinstance(self._n_ff, int):
            return self._n_ff
        return int(self._n_ff[layer]) if layer < len(self._n_ff) else 0


@dataclass(frozen=True)
class Experts:
    """The experts of a model: as many, and as wide, in all layers that have some."""

    n_expert: int
    n_ff: int  # neurons of each

    @classmethod
    def of(cls, keys: Keys, architecture: str) -> Experts:
        """Raises FlashFormatError, naming the key that is missing or not a number."""
        return cls(keys.whole(f"{architecture}.expert_count"), keys.whole(f"{architecture}.expert_feed_forward_length"))

    def shape(self, row_length: int, n_rows: int) -> tuple[int, ...]:
        """Of a tensor of one such matrix per expert. ggml does not write the last dimension of a single one."""
        return (row_length, n_rows) if self.n_expert == 1 else (row_length, n_rows, self.n_expert)


def read_layout(keys: Keys, n_embd: int) -> Layout:
    """Raises FlashFormatError, naming the key, if flash.bundle.* are not there or contradict each other."""
    if (version := keys.get("flash.version", "uint32")) != VERSION:
        raise keys.error("flash.version", f"is {version}, this engine reads {VERSION}: convert the file again")
    names = keys.get("flash.bundle.parts", "string[]")
    if names not in (["up", "down"], ["gate", "up", "down"]):
        said = f"is {_short(names)}: expected ['up', 'down'] or ['gate', 'up', 'down']"
        raise keys.error("flash.bundle.parts", said)
    types = keys.get("flash.bundle.types", "uint32[]", length=len(names))
    lengths = keys.get("flash.bundle.row_lengths", "uint32[]", length=len(names))
    offsets = keys.get("flash.bundle.offsets", "uint64[]", length=len(names))
    if len(names) == len(PARTS) and types[0] != types[1]:
        raise keys.error("flash.bundle.types", "gives gate and up different types")
    parts: list[Part] = []
    end = 0
    for name, kind, length, offset in zip(names, types, lengths, offsets, strict=True):
        if length != n_embd:
            raise keys.error("flash.bundle.row_lengths", f"says {length}, embedding_length is {n_embd}")
        try:
            size = row_bytes(kind, length)
        except ValueError as error:
            raise keys.error("flash.bundle.types", f"gives {name} the type {kind}: {error}") from None
        if offset != end:
            raise keys.error("flash.bundle.offsets", f"lets {name} begin at {offset}, the parts before it end at {end}")
        end += size
        parts.append(Part(name, kind, offset, size))
    if (record_bytes := keys.get("flash.bundle.record_bytes", "uint64")) != end:
        raise keys.error("flash.bundle.record_bytes", f"is {record_bytes}, the parts add up to {end}")
    return Layout(tuple(parts), end, keys.one_of("flash.bundle.layout", LAYOUTS) == "split")


def read_activation(keys: Keys, architecture: str) -> tuple[Activation, float]:
    """The function between up (and gate) and down, and its threshold: of fatrelu, else 0."""
    key = f"{architecture}.feed_forward_activation"
    name = keys.one_of(key, ACTIVATIONS)
    threshold = keys.get(f"{key}_threshold", "float32") if name == "fatrelu" else 0.0
    if not math.isfinite(threshold):
        raise keys.error(f"{key}_threshold", f"is {threshold}")
    return cast(Activation, name), threshold


def read_predictor(keys: Keys, n_layer: int) -> tuple[list[int], float | None] | None:
    """Rank of each layer's predictor, and the recall that they were made for; None if the file has none."""
    if "flash.predictor.kind" not in keys:
        for key in keys:
            if key.startswith("flash.predictor."):
                raise keys.error(key, "is there without flash.predictor.kind")
        return None
    keys.one_of("flash.predictor.kind", (PREDICTOR_KIND,))
    ranks: list[int] = keys.get("flash.predictor.ranks", "uint32[]", length=n_layer)
    recall: float | None = None
    if "flash.predictor.recall" in keys:
        recall = keys.get("flash.predictor.recall", "float32")
        if not 0 <= cast(float, recall) <= 1:
            raise keys.error("flash.predictor.recall", f"is {recall}, not a share")
    return ranks, recall


def row_bytes(kind: int, length: int) -> int:
    """Bytes of a row of weights. Raises ValueError if the type is not one of weights, or does not fit the length."""
    if kind in _NO_WEIGHTS or kind not in TYPE_SIZES:
        raise ValueError("not a known type of weights")
    block = TYPE_SIZES[kind][0]
    if length % block or not length:
        raise ValueError(f"rows of {length} elements are not whole blocks of {block}")
    return tensor_bytes(kind, (length,))
