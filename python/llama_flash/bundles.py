"""Neuron bundles and predictors of a flash GGUF: what docs/format.md says, checked, for the plugin.

Nothing is computed on a file that contradicts itself: every check is made here, before the model is loaded.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from . import _bindings
from .errors import FlashFormatError
from .gguf_meta import GgufMeta, TensorInfo

__all__ = ["BUNDLE_TYPE", "BundleFormat", "LayerBundle", "read_bundles"]

BUNDLE_TYPE = 17996  # GGML_TYPE_FLASH
VERSION = 1

PartName = Literal["gate", "up", "down"]
Activation = Literal["relu", "relu2", "reglu", "fatrelu", "drelu"]

_BUNDLE = re.compile(r"blk\.(\d+)\.ffn_bundle\.weight")
_ACTIVATIONS: dict[str, tuple[int, frozenset[bool]]] = {  # name: (enum, whether gated)
    "relu": (_bindings.llama_flash_activation.LLAMA_FLASH_RELU, frozenset({False})),
    "relu2": (_bindings.llama_flash_activation.LLAMA_FLASH_RELU2, frozenset({False, True})),
    "reglu": (_bindings.llama_flash_activation.LLAMA_FLASH_RELU, frozenset({True})),
    "fatrelu": (_bindings.llama_flash_activation.LLAMA_FLASH_FATRELU, frozenset({True})),
    "drelu": (_bindings.llama_flash_activation.LLAMA_FLASH_DRELU, frozenset({True})),
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
    n_ff: int
    tensor: TensorInfo
    up_bias: TensorInfo | None
    gate_bias: TensorInfo | None
    rank: int  # 0: no predictor
    predictor: tuple[TensorInfo, TensorInfo, TensorInfo] | None  # in, out, bias


@dataclass(frozen=True)
class Bundles:
    """All bundles of a file."""

    format: BundleFormat
    layers: tuple[LayerBundle, ...]

    @property
    def neuron_bytes(self) -> int:
        return sum(layer.n_ff * self.format.record_bytes for layer in self.layers)

    @property
    def predictor_bytes(self) -> int:
        return sum(tensor.size for layer in self.layers for tensor in layer.predictor or ())

    @property
    def has_predictors(self) -> bool:
        """Whether every layer has one."""
        return all(layer.rank for layer in self.layers)

    def part_names(self) -> list[str]:
        """Names of the weights as which the loader presents the bundles' parts."""
        return [f"blk.{layer.layer}.ffn_{part.name}.weight" for layer in self.layers for part in self.format.parts]

    def descriptions(self) -> Iterator[Any]:
        """`struct llama_flash_bundle` of each layer, in order; each is valid until the next is asked for."""
        form = self.format
        for layer in self.layers:
            raw = _bindings.llama_flash_bundle()
            raw.layer, raw.n_ff, raw.n_embd = layer.layer, layer.n_ff, form.n_embd
            raw.activation = _ACTIVATIONS[form.activation][0]
            raw.threshold = form.threshold
            raw.split = form.split
            raw.record_bytes = form.record_bytes
            raw.gate.type = -1
            for part in form.parts:
                target = getattr(raw, part.name)
                target.type, target.offset = part.type, part.offset
            kept = []
            floats = ctypes.POINTER(ctypes.c_float)
            for name, tensor in (("up_bias", layer.up_bias), ("gate_bias", layer.gate_bias)):
                if tensor is not None:
                    kept.append(_read(tensor, 4 * layer.n_ff))
                    setattr(raw, name, kept[-1].ctypes.data_as(floats))
            if layer.predictor is not None:
                a, b, bias = layer.predictor
                raw.predictor_rank, raw.predictor_in_type, raw.predictor_out_type = layer.rank, a.type, b.type
                kept += [
                    _read(a, _row_bytes(a.type, form.n_embd) * layer.rank),
                    _read(b, _row_bytes(b.type, layer.rank) * layer.n_ff),
                    _read(bias, 4 * layer.n_ff),
                ]
                raw.predictor_in, raw.predictor_out = kept[-3].ctypes.data, kept[-2].ctypes.data
                raw.predictor_bias = kept[-1].ctypes.data_as(floats)
            yield raw


def read_bundles(meta: GgufMeta) -> Bundles | None:
    """The bundles of a model; None if it has none.

    Raises:
        FlashFormatError: the file contradicts itself or docs/format.md; the message names the key or tensor.
    """
    names = [match for name in meta.tensors if (match := _BUNDLE.fullmatch(name))]
    if not names and "flash.version" not in meta.values:
        return None
    path = meta.files[0]
    version = meta.values.get("flash.version")
    if version != VERSION:
        raise FlashFormatError(f"{path}: flash.version is {version!r}, this engine reads {VERSION}: convert it again")
    if not names:
        raise FlashFormatError(f"{path}: flash.version says that there are neuron bundles, but no tensor holds any")
    form = _format(meta)
    n_layer = meta.number("block_count")
    n_ff = meta.per_layer("feed_forward_length", n_layer)
    ranks = _ranks(meta, n_layer)
    layers = []
    for match in sorted(names, key=lambda m: int(m[1])):
        layer = int(match[1])
        if layer >= n_layer:
            raise FlashFormatError(f"{path}: tensor {match[0]}: the model has {n_layer} layers")
        layers.append(_layer(meta, form, layer, n_ff[layer], ranks[layer]))
    return Bundles(form, tuple(layers))


def _format(meta: GgufMeta) -> BundleFormat:
    path = meta.files[0]
    names = _list(meta, "flash.bundle.parts", str)
    if names not in (["up", "down"], ["gate", "up", "down"]):
        raise FlashFormatError(
            f"{path}: flash.bundle.parts is {names}: expected ['up', 'down'] or ['gate', 'up', 'down']"
        )
    n_embd = meta.number("embedding_length")
    types, lengths, offsets = (_list(meta, f"flash.bundle.{key}", int) for key in ("types", "row_lengths", "offsets"))
    for key, values in (("types", types), ("row_lengths", lengths), ("offsets", offsets)):
        if len(values) != len(names):
            raise FlashFormatError(f"{path}: flash.bundle.{key} has {len(values)} entries for {len(names)} parts")
    parts = []
    end = 0
    for name, kind, length, offset in zip(names, types, lengths, offsets, strict=True):
        if length != n_embd:
            raise FlashFormatError(f"{path}: flash.bundle.row_lengths says {length}, embedding_length is {n_embd}")
        try:
            row_bytes = _row_bytes(kind, length)
        except ValueError as error:
            raise FlashFormatError(f"{path}: flash.bundle.types, part {name}: {error}") from None
        if offset != end:
            raise FlashFormatError(
                f"{path}: flash.bundle.offsets: part {name} is said to begin at byte {offset}, the parts before it end "
                f"at {end}"
            )
        end += row_bytes
        parts.append(Part(name, kind, offset, row_bytes))
    if len(parts) == 3 and parts[0].type != parts[1].type:
        raise FlashFormatError(f"{path}: flash.bundle.types: gate and up differ")
    record_bytes = meta.values.get("flash.bundle.record_bytes")
    if record_bytes != end:
        raise FlashFormatError(f"{path}: flash.bundle.record_bytes is {record_bytes!r}, the parts add up to {end}")
    layout = meta.values.get("flash.bundle.layout", "bundled")
    if layout not in ("bundled", "split"):
        raise FlashFormatError(f"{path}: flash.bundle.layout is {layout!r}: expected 'bundled' or 'split'")

    key = f"{meta.architecture}.feed_forward_activation"
    activation = meta.values.get(key)
    if activation not in get_args(Activation):
        raise FlashFormatError(f"{path}: {key} is {activation!r}: expected one of {', '.join(get_args(Activation))}")
    gated = len(parts) == 3
    if gated not in _ACTIVATIONS[str(activation)][1]:
        raise FlashFormatError(f"{path}: {key} is {activation!r}, which does not fit the parts {names}")
    threshold = meta.values.get(f"{key}_threshold", 0.0)
    if activation == "fatrelu" and f"{key}_threshold" not in meta.values:
        raise FlashFormatError(f"{path}: {key} is 'fatrelu', but {key}_threshold is missing")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise FlashFormatError(f"{path}: {key}_threshold is {threshold!r}: expected a number")
    return BundleFormat(
        tuple(parts),
        end,
        n_embd,
        layout == "split",
        activation,  # type: ignore[arg-type]  # one of get_args(Activation)
        float(threshold),
    )


def _layer(meta: GgufMeta, form: BundleFormat, layer: int, n_ff: int, rank: int) -> LayerBundle:
    tensor = meta.tensors[f"blk.{layer}.ffn_bundle.weight"]
    where = f"{tensor.file}: tensor {tensor.name}"
    if tensor.type != BUNDLE_TYPE:
        raise FlashFormatError(f"{where} has type {tensor.type}, expected {BUNDLE_TYPE}")
    if tensor.shape != (form.record_bytes, n_ff):
        raise FlashFormatError(
            f"{where} has shape {list(tensor.shape)}, expected [{form.record_bytes}, {n_ff}]: record_bytes and the "
            "layer's feed_forward_length"
        )
    _within(tensor, form.record_bytes * n_ff)
    for part in form.parts:
        name = f"blk.{layer}.ffn_{part.name}.weight"
        if name in meta.tensors:
            raise FlashFormatError(f"{where} and {name} are both there: which one holds?")
    biases = []
    for kind in ("up", "gate"):
        bias = meta.tensors.get(f"blk.{layer}.ffn_{kind}.bias")
        if bias is not None:
            _expect(bias, (n_ff,), (0,))
            _within(bias, 4 * n_ff)
        biases.append(bias)

    found = [
        meta.tensors.get(f"blk.{layer}.ffn_predictor{suffix}") for suffix in ("_in.weight", "_out.weight", ".bias")
    ]
    if rank == 0 and any(found):
        raise FlashFormatError(f"{where}: a predictor is there, but flash.predictor.ranks says 0")
    predictor = None
    if rank:
        a, b, bias = found
        if a is None or b is None or bias is None:
            raise FlashFormatError(f"{where}: flash.predictor.ranks says {rank}, but its predictor is incomplete")
        _expect(a, (form.n_embd, rank), (0, 1, 8, 30))
        _expect(b, (rank, n_ff), (0, 1, 8, 30))
        _expect(bias, (n_ff,), (0,))
        _within(a, _row_bytes(a.type, form.n_embd) * rank)
        _within(b, _row_bytes(b.type, rank) * n_ff)
        _within(bias, 4 * n_ff)
        predictor = (a, b, bias)
    return LayerBundle(layer, n_ff, tensor, biases[0], biases[1], rank, predictor)


def _ranks(meta: GgufMeta, n_layer: int) -> list[int]:
    kind = meta.values.get("flash.predictor.kind")
    if kind is None:
        stray = [name for name in meta.tensors if ".ffn_predictor" in name]
        if stray:
            raise FlashFormatError(f"{meta.files[0]}: tensor {stray[0]} is there, but flash.predictor.kind is not")
        return [0] * n_layer
    if kind != "lowrank":
        raise FlashFormatError(f"{meta.files[0]}: flash.predictor.kind is {kind!r}: expected 'lowrank'")
    ranks: list[int] = _list(meta, "flash.predictor.ranks", int)
    if len(ranks) != n_layer or any(rank < 0 for rank in ranks):
        raise FlashFormatError(f"{meta.files[0]}: flash.predictor.ranks has {len(ranks)} entries for {n_layer} layers")
    return ranks


def _list(meta: GgufMeta, key: str, kind: type) -> list[Any]:
    value = meta.values.get(key)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise FlashFormatError(f"{meta.files[0]}: {key} is {value!r}: expected a list of {kind.__name__}")
    return value


def _expect(tensor: TensorInfo, shape: tuple[int, ...], types: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.type not in types:
        raise FlashFormatError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)} and type {tensor.type}, expected "
            f"{list(shape)} and a type of {types}"
        )


def _within(tensor: TensorInfo, size: int) -> None:
    if tensor.size < size:
        raise FlashFormatError(
            f"{tensor.file}: tensor {tensor.name} takes {size} bytes from byte {tensor.offset}, but {tensor.size} are "
            "there: the file is cut short or tensors overlap"
        )


def _row_bytes(kind: int, length: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise ValueError(f"unknown type {kind}") from None
    if length % block or not length:
        raise ValueError(f"rows of {length} are not whole blocks of {block}")
    return int(length // block * size)


def _read(tensor: TensorInfo, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of a small tensor. They do not stay in the page cache, which counts against a memory cap."""
    with tensor.file.open("rb", buffering=0) as stream:
        data = np.fromfile(stream, np.uint8, size, offset=tensor.offset)
        os.posix_fadvise(stream.fileno(), tensor.offset, size, os.POSIX_FADV_DONTNEED)
    if len(data) != size:
        raise FlashFormatError(f"{tensor.file}: tensor {tensor.name} is cut short")
    return data
