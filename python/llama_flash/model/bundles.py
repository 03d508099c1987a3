"""Neuron bundles and predictors of a flash GGUF: what docs/reference/format.md says, checked, for the plugin.

Nothing is computed on a file that contradicts itself: every check is made here, before the model is loaded.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import FlashFormatError
from ..native.params import Bytes, NeuronBundle, NeuronPredictor
from .ggml_types import TYPE_SIZES, tensor_bytes
from .gguf import GgufMeta, SkippedArray, TensorInfo, read_gguf

__all__ = ["BUNDLE_TYPE", "BundleFormat", "Bundles", "LayerBundle", "holds_bundles", "read_bundles"]

BUNDLE_TYPE = 17996  # GGML_TYPE_FLASH
VERSION = 1

# in the head of a file: the key flash.version with its length before it and its type, uint32, behind it
_VERSION_KEY = struct.pack("<Q13sI", 13, b"flash.version", 4)
_FIRST_TENSOR = b"\0\0\0\0\0\0\0blk."  # the end of a length, and a name: key-values are over
_PIECE = 64 << 10  # bytes read at a time: small enough for the cache and the heap
_SEARCHED = 64 << 20  # bytes at most

PartName = Literal["gate", "up", "down"]
Activation = Literal["relu", "relu2", "reglu", "fatrelu", "drelu"]

_OURS = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.ffn_((?:bundle|bundle_exps|predictor|predictor_in|predictor_out)\.\w+)")
_BUNDLE, _EXPERTS_BUNDLE = "bundle.weight", "bundle_exps.weight"
_EXPERTS_ARCHITECTURES = ("smallthinker",)  # whose experts compute _EXPERTS_ACTIVATION
_EXPERTS_ACTIVATION = "reglu"
_PARTS: tuple[PartName, ...] = ("gate", "up", "down")
_PREDICTOR_PARTS = ("predictor_in.weight", "predictor_out.weight", "predictor.bias")
_F32 = 0
_PREDICTOR_TYPES = (_F32, 1, 8, 30)  # F16, Q8_0, BF16
_MOST_LAYERS = 512  # of the engine, LLAMA_MAX_LAYERS
_WHOLE = ("uint32", "int32", "uint64", "int64")
_NO_WEIGHTS = frozenset({9, 15, *range(24, 29), BUNDLE_TYPE})  # Q8_1, Q8_K, I8 to I64, F64: the engine's own results
_ACTIVATIONS: dict[str, frozenset[bool]] = {  # name: whether gated
    "relu": frozenset({False}),
    "relu2": frozenset({False, True}),
    "reglu": frozenset({True}),
    "fatrelu": frozenset({True}),
    "drelu": frozenset({True}),
}


@dataclass(frozen=True)
class Part:
    """One part of a record."""

    name: PartName
    type: int  # enum ggml_type
    offset: int  # bytes from the record's begin
    row_bytes: int


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


@dataclass(frozen=True)
class LayerBundle:
    """One layer's bundle, biases and predictor."""

    layer: int
    n_ff: int  # neurons, of each expert
    n_expert: int  # 0: a dense layer
    tensor: TensorInfo
    up_bias: TensorInfo | None
    gate_bias: TensorInfo | None
    rank: int  # 0: no predictor
    predictor: tuple[TensorInfo, TensorInfo, TensorInfo] | None  # in, out, bias

    @property
    def n_neurons(self) -> int:
        return self.n_ff * max(1, self.n_expert)


@dataclass(frozen=True)
class Bundles:
    """All bundles of a file."""

    format: BundleFormat
    layers: tuple[LayerBundle, ...]
    n_expert_used: int  # experts of a token; 0: no layer has experts in bundles

    @property
    def n_neurons(self) -> int:
        return sum(layer.n_neurons for layer in self.layers)

    @property
    def neuron_bytes(self) -> int:
        return self.n_neurons * self.format.record_bytes

    @property
    def predictor_bytes(self) -> int:
        return sum(tensor.size for layer in self.layers for tensor in layer.predictor or ())

    @property
    def has_predictors(self) -> bool:
        """Whether every layer has one."""
        return all(layer.rank for layer in self.layers)

    def part_names(self) -> list[str]:
        """Names of the weights as which the loader presents the bundles' parts."""
        return [
            f"blk.{layer.layer}.ffn_{part.name}{'_exps' if layer.n_expert else ''}.weight"
            for layer in self.layers
            for part in self.format.parts
        ]

    def descriptions(self) -> Iterator[NeuronBundle]:
        """Each layer's bundle as the plugin is told of it, with its biases and predictor read from the file."""
        form = self.format
        for layer in self.layers:
            yield NeuronBundle(
                layer=layer.layer,
                n_ff=layer.n_ff,
                n_embd=form.n_embd,
                activation=form.activation,
                threshold=form.threshold,
                split=form.split,
                n_expert=layer.n_expert,
                n_expert_used=self.n_expert_used if layer.n_expert else 0,
                record_bytes=form.record_bytes,
                parts={part.name: (part.type, part.offset) for part in form.parts},
                up_bias=None if layer.up_bias is None else _read(layer.up_bias, 4 * layer.n_ff),
                gate_bias=None if layer.gate_bias is None else _read(layer.gate_bias, 4 * layer.n_ff),
                predictor=self._predictor(layer),
            )

    def _predictor(self, layer: LayerBundle) -> NeuronPredictor | None:
        if layer.predictor is None:
            return None
        a, b, bias = layer.predictor
        return NeuronPredictor(
            rank=layer.rank,
            in_type=a.type,
            out_type=b.type,
            matrix_in=_read(a, _row_bytes(a.type, self.format.n_embd) * layer.rank),
            matrix_out=_read(b, _row_bytes(b.type, layer.rank) * layer.n_ff),
            bias=_read(bias, 4 * layer.n_ff),
        )


def holds_bundles(path: str | os.PathLike[str]) -> bool:
    """Whether the engine cannot load the file without flash offload. Takes a few milliseconds; False in all doubt."""
    try:
        if not _mentions_version(Path(path)):
            return False
        return any(tensor.type == BUNDLE_TYPE for tensor in read_gguf(path).tensors.values())
    except (OSError, FlashFormatError):
        return False  # the engine has its own words for what is wrong


def _mentions_version(path: Path) -> bool:
    """By a search, which is much faster than to read a vocabulary string by string."""
    with path.open("rb", buffering=0) as stream:
        before = b""
        for _ in range(_SEARCHED // _PIECE):
            chunk = before + stream.read(_PIECE)
            if _VERSION_KEY in chunk:
                return True
            if len(chunk) == len(before) or _FIRST_TENSOR in chunk:
                return False
            before = chunk[-len(_VERSION_KEY) :]
    return False


def read_bundles(meta: GgufMeta) -> Bundles | None:
    """The bundles of a model; None if it has none.

    Raises:
        FlashFormatError: the file contradicts itself or docs/reference/format.md; the message names the key or tensor.
    """
    if "flash.version" not in meta.values:
        _check_ordinary(meta)
        return None
    keys = _Keys(meta)
    if (version := keys.get("flash.version", "uint32")) != VERSION:
        raise keys.error("flash.version", f"is {version}, this engine reads {VERSION}: convert the file again")
    model = _Model.of(keys)
    form = _format(keys, model)
    layers = _Layers(meta, model, form, _ranks(keys, model)).read()
    n_expert_used = 0
    if any(layer.n_expert for layer in layers):
        _check_experts(keys, model, form)
        n_expert_used = keys.get(f"{model.architecture}.expert_used_count", *_WHOLE)
        if not 0 < n_expert_used <= model.n_expert:
            raise keys.error(f"{model.architecture}.expert_used_count", f"is {n_expert_used} of {model.n_expert}")
    return Bundles(form, layers, n_expert_used)


def _check_ordinary(meta: GgufMeta) -> None:
    """Nothing of the format is there without flash.version."""
    for key in meta.values:
        if key.startswith("flash."):
            raise FlashFormatError(f"{meta.files[0]}: key {key} is there without flash.version")
    for tensor in meta.tensors.values():
        if tensor.type == BUNDLE_TYPE or _OURS.fullmatch(tensor.name):
            raise FlashFormatError(f"{tensor.file}: tensor {tensor.name} is there without the key flash.version")


class _Keys:
    """Key-values by their type."""

    def __init__(self, meta: GgufMeta) -> None:
        self._meta = meta

    def __contains__(self, key: str) -> bool:
        return key in self._meta.values

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta.values)

    def error(self, key: str, message: str) -> FlashFormatError:
        return FlashFormatError(f"{self._meta.files[0]}: key {key} {message}")

    def get(self, key: str, *types: str, length: int | None = None) -> Any:
        """The value, of one of these types; length: entries of an array."""
        if key not in self._meta.values:
            raise self.error(key, "is missing")
        if (found := self._meta.types[key]) not in types:
            raise self.error(key, f"is of type {found}, not {' or '.join(types)}")
        value = self._meta.values[key]
        n = value.length if isinstance(value, SkippedArray) else len(value) if isinstance(value, list) else None
        if isinstance(value, SkippedArray) or (length is not None and n != length):
            raise self.error(key, f"has {n} entries" + ("" if length is None else f", not {length}"))
        return value

    def one_of(self, key: str, accepted: Collection[str]) -> str:
        value: str = self.get(key, "string")
        if value not in accepted:
            raise self.error(key, f"is {value!r:.80}: expected one of {', '.join(accepted)}")
        return value


@dataclass(frozen=True)
class _Model:
    """The numbers that the feed-forward blocks follow from."""

    architecture: str
    n_layer: int
    n_embd: int
    n_expert: int  # 0: none
    n_ff_expert: int  # neurons of an expert
    _n_ff: int | list[int]  # of a dense layer

    @classmethod
    def of(cls, keys: _Keys) -> _Model:
        arch = keys.get("general.architecture", "string")
        n_layer, n_embd = (keys.get(f"{arch}.{key}", *_WHOLE) for key in ("block_count", "embedding_length"))
        if not 0 < n_layer <= _MOST_LAYERS:
            raise keys.error(f"{arch}.block_count", f"is {n_layer}: expected 1 to {_MOST_LAYERS}")
        n_expert, n_ff_expert = (
            keys.get(f"{arch}.{key}", *_WHOLE) if f"{arch}.{key}" in keys else 0
            for key in ("expert_count", "expert_feed_forward_length")
        )
        n_ff: int | list[int] = 0
        if not n_ff_expert or f"{arch}.feed_forward_length" in keys:  # a mixture of experts may have no dense layer
            n_ff = keys.get(f"{arch}.feed_forward_length", *_WHOLE, *(f"{kind}[]" for kind in _WHOLE))
        return cls(arch, n_layer, n_embd, n_expert, n_ff_expert, n_ff)

    def n_ff(self, layer: int) -> int:
        """Neurons of a layer; 0 if the file does not say it."""
        if isinstance(self._n_ff, int):
            return self._n_ff
        return self._n_ff[layer] if layer < len(self._n_ff) else 0


def _format(keys: _Keys, model: _Model) -> BundleFormat:
    names = keys.get("flash.bundle.parts", "string[]")
    if names not in (["up", "down"], ["gate", "up", "down"]):
        raise keys.error("flash.bundle.parts", f"is {names!r:.80}: expected ['up', 'down'] or ['gate', 'up', 'down']")
    gated = len(names) == 3
    types = keys.get("flash.bundle.types", "uint32[]", length=len(names))
    lengths = keys.get("flash.bundle.row_lengths", "uint32[]", length=len(names))
    offsets = keys.get("flash.bundle.offsets", "uint64[]", length=len(names))
    parts: list[Part] = []
    end = 0
    for name, kind, length, offset in zip(names, types, lengths, offsets, strict=True):
        if length != model.n_embd:
            raise keys.error("flash.bundle.row_lengths", f"says {length}, embedding_length is {model.n_embd}")
        try:
            row_bytes = _row_bytes(kind, length)
        except ValueError as error:
            raise keys.error("flash.bundle.types", f"gives {name} the type {kind}: {error}") from None
        if offset != end:
            raise keys.error("flash.bundle.offsets", f"lets {name} begin at {offset}, the parts before it end at {end}")
        end += row_bytes
        parts.append(Part(name, kind, offset, row_bytes))
    if gated and types[0] != types[1]:
        raise keys.error("flash.bundle.types", "gives gate and up different types")
    if (record_bytes := keys.get("flash.bundle.record_bytes", "uint64")) != end:
        raise keys.error("flash.bundle.record_bytes", f"is {record_bytes}, the parts add up to {end}")
    layout = keys.one_of("flash.bundle.layout", ("bundled", "split"))

    key = f"{model.architecture}.feed_forward_activation"
    activation = keys.one_of(key, _ACTIVATIONS)
    if gated not in _ACTIVATIONS[activation]:
        raise keys.error(key, f"is {activation!r}, which does not fit the parts {', '.join(names)}")
    threshold = keys.get(f"{key}_threshold", "float32") if activation == "fatrelu" else 0.0
    if not math.isfinite(threshold):
        raise keys.error(f"{key}_threshold", f"is {threshold}")
    return BundleFormat(
        tuple(parts),
        end,
        model.n_embd,
        layout == "split",
        activation,  # type: ignore[arg-type]  # a key of _ACTIVATIONS
        threshold,
    )


def _check_experts(keys: _Keys, model: _Model, form: BundleFormat) -> None:
    """What bundles of experts make of the other key-values."""
    if model.architecture not in _EXPERTS_ARCHITECTURES:
        known = ", ".join(_EXPERTS_ARCHITECTURES)
        raise keys.error("general.architecture", f"is {model.architecture!r}, but experts can be in bundles in {known}")
    if form.activation != _EXPERTS_ACTIVATION:
        key = f"{model.architecture}.feed_forward_activation"
        raise keys.error(key, f"is {form.activation!r}, but that of bundles of experts is {_EXPERTS_ACTIVATION}")
    if form.split:
        raise keys.error("flash.bundle.layout", "is 'split', but bundles of experts are 'bundled'")


def _ranks(keys: _Keys, model: _Model) -> list[int]:
    """Rank of each layer's predictor; empty if the file has none."""
    if "flash.predictor.kind" not in keys:
        for key in keys:
            if key.startswith("flash.predictor."):
                raise keys.error(key, "is there without flash.predictor.kind")
        return []
    keys.one_of("flash.predictor.kind", ("lowrank",))
    ranks: list[int] = keys.get("flash.predictor.ranks", "uint32[]", length=model.n_layer)
    if "flash.predictor.recall" in keys:
        recall = keys.get("flash.predictor.recall", "float32")
        if not 0 <= recall <= 1:
            raise keys.error("flash.predictor.recall", f"is {recall}, not a share")
    return ranks


class _Layers:
    """The tensors of the format, compared with the key-values."""

    def __init__(self, meta: GgufMeta, model: _Model, form: BundleFormat, ranks: list[int]) -> None:
        self._meta, self._model, self._form, self._ranks = meta, model, form, ranks

    def read(self) -> tuple[LayerBundle, ...]:
        bundles: dict[int, str] = {}
        predictors = {layer for layer, rank in enumerate(self._ranks) if rank}
        for tensor in self._meta.tensors.values():
            match = _OURS.fullmatch(tensor.name)
            kind = match[2] if match else ""
            if tensor.type == BUNDLE_TYPE and kind not in (_BUNDLE, _EXPERTS_BUNDLE):
                raise _error(tensor, "is of the type of bundles, but is none")
            if match is None:
                continue
            layer = int(match[1])
            if layer >= self._model.n_layer:
                raise _error(tensor, f"is there, but the model has {self._model.n_layer} layers")
            if kind in (_BUNDLE, _EXPERTS_BUNDLE):
                if layer in bundles:
                    raise _error(tensor, f"is there besides blk.{layer}.ffn_{bundles[layer]}")
                bundles[layer] = kind
            elif kind in _PREDICTOR_PARTS:
                predictors.add(layer)
        if not bundles:
            raise FlashFormatError(
                f"{self._meta.files[0]}: key flash.version is there, but no tensor blk.N.ffn_bundle.weight or "
                "blk.N.ffn_bundle_exps.weight"
            )
        for layer in predictors:
            if bundles.get(layer) == _EXPERTS_BUNDLE:
                raise FlashFormatError(f"{self._meta.files[0]}: layer {layer} has experts in bundles and a predictor")
        found = {layer: self._predictor(layer) for layer in sorted(predictors)}
        return tuple(
            self._bundle(layer, found.get(layer)) if kind == _BUNDLE else self._experts(layer)
            for layer, kind in sorted(bundles.items())
        )

    def _bundle(self, layer: int, predictor: tuple[TensorInfo, TensorInfo, TensorInfo] | None) -> LayerBundle:
        tensors, form, n_ff = self._meta.tensors, self._form, self._model.n_ff(layer)
        tensor = tensors[f"blk.{layer}.ffn_bundle.weight"]
        _expect(tensor, (form.record_bytes, n_ff), (BUNDLE_TYPE,))
        biases: dict[str, TensorInfo] = {}
        held = {part.name for part in form.parts}
        for part in _PARTS:
            if weight := tensors.get(f"blk.{layer}.ffn_{part}.weight"):
                raise _error(weight, f"is there besides {tensor.name}")
            bias = tensors.get(f"blk.{layer}.ffn_{part}.bias")
            if bias is None:
                continue
            if part not in held:
                raise _error(bias, f"is there, but the bundles have no {part}")
            n = form.n_embd if part == "down" else n_ff
            _expect(bias, (n,), (_F32,))
            biases[part] = bias
        rank = self._ranks[layer] if predictor else 0
        return LayerBundle(layer, n_ff, 0, tensor, biases.get("up"), biases.get("gate"), rank, predictor)

    def _experts(self, layer: int) -> LayerBundle:
        tensors, form, model = self._meta.tensors, self._form, self._model
        tensor = tensors[f"blk.{layer}.ffn_{_EXPERTS_BUNDLE}"]
        if not form.gated:
            raise _error(tensor, "is there, but the bundles have no gate")
        _expect(tensor, (form.record_bytes, model.n_ff_expert, model.n_expert), (BUNDLE_TYPE,))
        for part in _PARTS:
            for name in (f"{part}_exps.weight", f"{part}_exps.bias", f"{part}.weight", f"{part}.bias"):
                if other := tensors.get(f"blk.{layer}.ffn_{name}"):
                    raise _error(other, f"is there besides {tensor.name}")
        return LayerBundle(layer, model.n_ff_expert, model.n_expert, tensor, None, None, 0, None)

    def _predictor(self, layer: int) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
        rank = self._ranks[layer] if self._ranks else 0
        found = []
        for part in _PREDICTOR_PARTS:
            name = f"blk.{layer}.ffn_{part}"
            tensor = self._meta.tensors.get(name)
            if rank and tensor is None:
                raise FlashFormatError(
                    f"{self._meta.files[0]}: tensor {name} is missing: flash.predictor.ranks gives layer {layer} "
                    f"the rank {rank}"
                )
            if tensor and not rank:
                raise _error(tensor, f"is there, but flash.predictor.ranks gives layer {layer} no rank")
            if tensor:
                found.append(tensor)
        a, b, bias = found
        n_embd, n_ff = self._model.n_embd, self._model.n_ff(layer)
        for matrix, columns, rows in ((a, n_embd, rank), (b, rank, n_ff)):
            _expect(matrix, (columns, rows), _PREDICTOR_TYPES)
        _expect(bias, (n_ff,), (_F32,))
        return a, b, bias


def _error(tensor: TensorInfo, message: str) -> FlashFormatError:
    return FlashFormatError(f"{tensor.file}: tensor {tensor.name} {message}")


def _expect(tensor: TensorInfo, shape: tuple[int, ...], types: tuple[int, ...]) -> None:
    """Shape (further dimensions of 1 do not matter) and type. That its bytes are there, read_gguf has seen."""
    n = max(len(shape), len(tensor.shape))
    found, wanted = ((*one, *[1] * (n - len(one))) for one in (tensor.shape, shape))
    if found != wanted or 0 in shape:
        raise _error(tensor, f"has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.type not in types:
        raise _error(tensor, f"is of type {tensor.type}, expected {' or '.join(map(str, types))}")


def _row_bytes(kind: int, length: int) -> int:
    """Bytes of a row of weights. Raises ValueError if the type is not one of weights, or does not fit the length."""
    if kind in _NO_WEIGHTS or kind not in TYPE_SIZES:
        raise ValueError("not a known type of weights")
    block = TYPE_SIZES[kind][0]
    if length % block or not length:
        raise ValueError(f"rows of {length} elements are not whole blocks of {block}")
    return tensor_bytes(kind, (length,))


def _read(tensor: TensorInfo, size: int) -> Bytes:
    """Bytes of a small tensor. They do not stay in the page cache, which counts against a memory cap."""
    with tensor.file.open("rb", buffering=0) as stream:
        data = np.fromfile(stream, np.uint8, size, offset=tensor.offset)
        os.posix_fadvise(stream.fileno(), tensor.offset, size, os.POSIX_FADV_DONTNEED)
    if len(data) != size:
        raise FlashFormatError(f"{tensor.file}: tensor {tensor.name} is cut short")
    return data
