"""Neuron bundles and predictors of a flash GGUF (docs/reference/format.md), checked for the plugin and for gguf_tools.

Nothing is computed on a file that contradicts itself: every check of the format is made here or, of key-values, in
flash_keys.py, before the model is loaded. The plugin checks only what its addresses and sizes are made of
(plugin/src/bundle_check.h), so that no caller can make it touch memory that is not its own.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import FlashFormatError
from ..native.params import Bytes, NeuronBundle, NeuronPredictor
from .flash_keys import (
    ACTIVATIONS,
    BUNDLE_TYPE,
    PARTS,
    BundleFormat,
    Dimensions,
    Experts,
    Keys,
    read_activation,
    read_layout,
    read_predictor,
    row_bytes,
)
from .ggml_types import TYPE_SIZES, type_name
from .gguf import GgufMeta, TensorInfo, read_gguf

__all__ = ["Bundles", "LayerBundle", "holds_bundles", "read_bundles"]

# in the head of a file: the key flash.version with its length before it and its type, uint32, behind it
_VERSION_KEY = struct.pack("<Q13sI", 13, b"flash.version", 4)
_FIRST_TENSOR = b"\0\0\0\0\0\0\0blk."  # the end of a length, and a name: key-values are over
_PIECE = 64 << 10  # bytes read at a time: small enough for the cache and the heap
_SEARCHED = 64 << 20  # bytes at most

_OURS = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.ffn_((?:bundle|bundle_exps|predictor|predictor_in|predictor_out)\.\w+)")
_BUNDLE, _EXPERTS_BUNDLE = "bundle.weight", "bundle_exps.weight"
_EXPERTS_ARCHITECTURES = ("smallthinker",)  # whose experts compute _EXPERTS_ACTIVATION
_EXPERTS_ACTIVATION = "reglu"
_PREDICTOR_PARTS = ("predictor_in.weight", "predictor_out.weight", "predictor.bias")
_F32 = 0
_PREDICTOR_TYPES = (_F32, 1, 8, 30)  # F16, Q8_0, BF16


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

    def of_layers(self, layers: range) -> Bundles:
        """Those of these layers."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.layer in layers))

    def part_names(self) -> list[str]:
        """Names of the weights as which the loader presents the bundles' parts."""
        return [
            f"blk.{layer.layer}.ffn_{part.name}{'_exps' if layer.n_expert else ''}.weight"
            for layer in self.layers
            for part in self.format.parts
        ]

    def presented(self) -> Iterator[tuple[str, int, tuple[int, ...], TensorInfo]]:
        """The same weights: name, type and shape as the loader makes them up, and the bundle that holds each."""
        form, names = self.format, iter(self.part_names())
        for layer in self.layers:
            for part in form.parts:
                kind, shape = part.type, (form.n_embd, layer.n_ff)
                if part.name == "down":  # its rows are stored transposed
                    kind, shape = (kind if layer.n_ff % TYPE_SIZES[kind][0] == 0 else _F32), shape[::-1]
                yield next(names), kind, (*shape, max(1, layer.n_expert)), layer.tensor

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
            matrix_in=_read(a, row_bytes(a.type, self.format.n_embd) * layer.rank),
            matrix_out=_read(b, row_bytes(b.type, layer.rank) * layer.n_ff),
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
    keys = Keys(meta.values, meta.types, meta.files[0])
    dimensions = Dimensions.of(keys)
    for name in ("expert_count", "expert_feed_forward_length"):
        if (key := f"{dimensions.architecture}.{name}") in keys:
            keys.whole(key)
    form = _format(keys, dimensions)
    predictor = read_predictor(keys, dimensions.n_layer)
    layers = _Layers(meta, keys, dimensions, form, predictor[0] if predictor else []).read()
    n_expert_used = 0
    if any(layer.n_expert for layer in layers):
        _check_experts(keys, dimensions, form)
        key, n_expert = f"{dimensions.architecture}.expert_used_count", max(layer.n_expert for layer in layers)
        n_expert_used = keys.whole(key)
        if not 0 < n_expert_used <= n_expert:
            raise keys.error(key, f"is {n_expert_used} of {n_expert}")
    return Bundles(form, layers, n_expert_used)


def _format(keys: Keys, dimensions: Dimensions) -> BundleFormat:
    layout = read_layout(keys, dimensions.n_embd)
    activation, threshold = read_activation(keys, dimensions.architecture)
    if layout.gated not in ACTIVATIONS[activation]:
        names = ", ".join(part.name for part in layout.parts)
        key = f"{dimensions.architecture}.feed_forward_activation"
        raise keys.error(key, f"is {activation!r}, which does not fit the parts {names}")
    return BundleFormat(layout.parts, layout.record_bytes, dimensions.n_embd, layout.split, activation, threshold)


def _check_ordinary(meta: GgufMeta) -> None:
    """Nothing of the format is there without flash.version."""
    for key in meta.values:
        if key.startswith("flash."):
            raise FlashFormatError("is there without flash.version", file=meta.files[0], key=key)
    for tensor in meta.tensors.values():
        if tensor.type == BUNDLE_TYPE or _OURS.fullmatch(tensor.name):
            raise _error(tensor, "is there without flash.version")


def _check_experts(keys: Keys, model: Dimensions, form: BundleFormat) -> None:
    """What bundles of experts make of the other key-values."""
    if model.architecture not in _EXPERTS_ARCHITECTURES:
        known = ", ".join(_EXPERTS_ARCHITECTURES)
        raise keys.error("general.architecture", f"is {model.architecture!r}, but experts can be in bundles in {known}")
    if form.activation != _EXPERTS_ACTIVATION:
        key = f"{model.architecture}.feed_forward_activation"
        raise keys.error(key, f"is {form.activation!r}, but that of bundles of experts is {_EXPERTS_ACTIVATION}")
    if form.split:
        raise keys.error("flash.bundle.layout", "is 'split', but bundles of experts are 'bundled'")


class _Layers:
    """The tensors of the format, compared with the key-values."""

    def __init__(
        self, meta: GgufMeta, keys: Keys, dimensions: Dimensions, form: BundleFormat, ranks: list[int]
    ) -> None:
        self._meta, self._keys, self._model, self._form, self._ranks = meta, keys, dimensions, form, ranks

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
            said = "is there, but no tensor blk.N.ffn_bundle.weight or blk.N.ffn_bundle_exps.weight"
            raise self._keys.error("flash.version", said)
        experts = None
        if _EXPERTS_BUNDLE in bundles.values():
            experts = Experts.of(self._keys, self._model.architecture)
        for layer, rank in enumerate(self._ranks):
            if rank and bundles.get(layer) == _EXPERTS_BUNDLE:
                said = f"gives layer {layer} a rank, but blk.{layer}.ffn_{_EXPERTS_BUNDLE} has no predictor"
                raise self._keys.error("flash.predictor.ranks", said)
        found = [
            self._experts(layer, experts) if experts and kind == _EXPERTS_BUNDLE else self._bundle(layer)
            for layer, kind in sorted(bundles.items())
        ]
        fitted = {layer: self._predictor(layer) for layer in sorted(predictors)}
        return tuple(
            replace(one, rank=self._ranks[one.layer], predictor=fitted[one.layer]) if one.layer in fitted else one
            for one in found
        )

    def _bundle(self, layer: int) -> LayerBundle:
        tensors, form, n_ff = self._meta.tensors, self._form, self._model.n_ff(layer)
        tensor = tensors[f"blk.{layer}.ffn_bundle.weight"]
        _expect(tensor, (form.record_bytes, n_ff), (BUNDLE_TYPE,))
        biases: dict[str, TensorInfo] = {}
        held = {part.name for part in form.parts}
        for part in PARTS:
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
        return LayerBundle(layer, n_ff, 0, tensor, biases.get("up"), biases.get("gate"), 0, None)

    def _experts(self, layer: int, experts: Experts) -> LayerBundle:
        tensors, form = self._meta.tensors, self._form
        tensor = tensors[f"blk.{layer}.ffn_{_EXPERTS_BUNDLE}"]
        if not form.gated:
            raise _error(tensor, "is there, but the bundles have no gate")
        _expect(tensor, experts.shape(form.record_bytes, experts.n_ff), (BUNDLE_TYPE,))
        for part in (*PARTS, "gate_up"):
            for kind, why in (("weight", ""), ("bias", ": experts in bundles have no biases")):
                for name in (f"{part}_exps.{kind}", f"{part}.{kind}"):
                    if other := tensors.get(f"blk.{layer}.ffn_{name}"):
                        raise _error(other, f"is there besides {tensor.name}{why}")
        return LayerBundle(layer, experts.n_ff, experts.n_expert, tensor, None, None, 0, None)

    def _predictor(self, layer: int) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
        rank = self._ranks[layer] if self._ranks else 0
        found = []
        for part in _PREDICTOR_PARTS:
            name = f"blk.{layer}.ffn_{part}"
            tensor = self._meta.tensors.get(name)
            if rank and tensor is None:
                said = f"is missing: flash.predictor.ranks gives layer {layer} the rank {rank}"
                raise FlashFormatError(said, file=self._meta.files[0], tensor=name)
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


def _error(tensor: TensorInfo, said: str) -> FlashFormatError:
    return FlashFormatError(said, file=tensor.file, tensor=tensor.name)


def _expect(tensor: TensorInfo, shape: tuple[int, ...], types: tuple[int, ...]) -> None:
    """Shape (further dimensions of 1 do not matter) and type. That its bytes are there, read_gguf has seen."""
    n = max(len(shape), len(tensor.shape))
    found, wanted = ((*one, *[1] * (n - len(one))) for one in (tensor.shape, shape))
    if found != wanted or 0 in shape:
        raise _error(tensor, f"has the shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.type not in types:
        raise _error(tensor, f"is of type {type_name(tensor.type)}, expected {' or '.join(map(type_name, types))}")


def _read(tensor: TensorInfo, size: int) -> Bytes:
    """Bytes of a small tensor. They do not stay in the page cache, which counts against a memory cap."""
    with tensor.file.open("rb", buffering=0) as stream:
        data = np.fromfile(stream, np.uint8, size, offset=tensor.offset)
        os.posix_fadvise(stream.fileno(), tensor.offset, size, os.POSIX_FADV_DONTNEED)
    if len(data) != size:
        raise _error(tensor, "is cut short")
    return data
