"""Writes a synthetic OPT as an ordinary GGUF file or as a flash GGUF (docs/reference/format.md), with equal weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from gguf_tools import FLASH, format, ggml
from gguf_tools.source import Bytes, Floats, KeyValue, data_bytes
from gguf_tools.stream import PlannedTensor, write_gguf
from gguf_tools.synthetic.codes import WIDTH
from gguf_tools.synthetic.opt import Layer, OptModel
from gguf_tools.synthetic.tokenizer import tokenizer_values

Layout = Literal["plain", "bundled", "split"]

_RECALL = 0.99
_ROWS = 1024  # records put together at a time


def write_opt(model: OptModel, path: Path, layout: Layout = "plain", *, progress: str | None = None) -> Path:
    """Writes the model, in place of a file that is there.

    Both flash layouts hold the weights of the plain file; with Q8_0 the down matrix is quantised along n_embd in them
    and along n_ff in the plain file, so there it differs by its rounding. progress: as in `write_gguf`, which also says
    what is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    alignment = 32 if layout == "plain" else format.ALIGNMENT
    tensors = list(_tensors(model, layout))
    write_gguf(path, _values(model, layout), tensors, alignment=alignment, progress=progress, force=True)
    return path


def opt_bytes(model: OptModel, layout: Layout = "plain") -> int:
    """Bytes of all tensors."""
    return sum(data_bytes(tensor) for tensor in _tensors(model, layout))


def _values(model: OptModel, layout: Layout) -> dict[str, KeyValue]:
    shape = model.shape
    numbers = {
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "opt.block_count": shape.n_layer,
        "opt.context_length": shape.n_ctx,
        "opt.embedding_length": shape.n_embd,
        "opt.feed_forward_length": shape.n_ff,
        "opt.vocab_size": shape.n_vocab,
        "opt.attention.head_count": shape.n_head,
        "opt.attention.head_count_kv": shape.n_head,
        "opt.position_offset": shape.position_offset,
    }
    name = f"synthetic OPT, {shape.n_layer} layers, seed {model.seed}"
    values = {
        "general.architecture": KeyValue("opt", V.STRING),
        "general.name": KeyValue(name, V.STRING),
        **{key: KeyValue(int(number), V.UINT32) for key, number in numbers.items()},
        "opt.attention.layer_norm_epsilon": KeyValue(1e-5, V.FLOAT32),
        **format.Activation("relu").to_values("opt"),
        **tokenizer_values(shape.n_vocab),
    }
    if layout != "plain":
        bundle = format.BundleLayout.of({"up": model.kind, "down": model.kind}, shape.n_embd, layout)
        predictors = format.PredictorInfo((WIDTH,) * shape.n_layer, _RECALL)
        values |= bundle.to_values() | predictors.to_values()
    return values


def _tensors(model: OptModel, layout: Layout) -> Iterator[PlannedTensor]:
    """All tensors, in file order."""
    shape = model.shape
    positions = (shape.n_embd, shape.n_ctx + shape.position_offset)
    yield PlannedTensor("token_embd.weight", (shape.n_embd, shape.n_vocab), model.kind, model.embeddings)
    yield _planned("position_embd.weight", positions, T.F32, model.positions)
    for il in range(shape.n_layer):
        yield from _layer(model, model.layer(il), layout)
    yield _planned("output_norm.weight", (shape.n_embd,), T.F32, model.output_norm)
    yield _bias(model, "output_norm.bias", shape.n_embd, 0.05)


def _layer(model: OptModel, layer: Layer, layout: Layout) -> Iterator[PlannedTensor]:
    n_embd, kind = model.shape.n_embd, model.kind
    yield _norm(model, layer.name("attn_norm.weight"))
    yield _bias(model, layer.name("attn_norm.bias"), n_embd, 0.05)
    for part, sigma in (("attn_q", 0.1), ("attn_k", 0.1), ("attn_v", 0.1), ("attn_output", 0.01)):
        yield PlannedTensor(layer.name(f"{part}.weight"), (n_embd, n_embd), kind, _once(_attention(layer, part)))
        yield _bias(model, layer.name(f"{part}.bias"), n_embd, sigma)
    yield _norm(model, layer.name("ffn_norm.weight"))
    yield _bias(model, layer.name("ffn_norm.bias"), n_embd, 0.05)
    yield _planned(format.bias_name(layer.il, "up"), (model.shape.n_ff,), T.F32, layer.up_bias)
    yield _bias(model, format.bias_name(layer.il, "down"), n_embd, 0.01)
    yield from _plain_weights(model, layer) if layout == "plain" else _flash_weights(model, layer, layout)


def _plain_weights(model: OptModel, layer: Layer) -> Iterator[PlannedTensor]:
    n_embd, n_ff, kind = model.shape.n_embd, model.shape.n_ff, model.kind
    yield _planned(format.weight_name(layer.il, "up"), (n_embd, n_ff), kind, layer.up)
    yield _planned(format.weight_name(layer.il, "down"), (n_ff, n_embd), kind, lambda: layer.down().T)


def _flash_weights(model: OptModel, layer: Layer, layout: Layout) -> Iterator[PlannedTensor]:
    n_embd, n_ff, kind, il = model.shape.n_embd, model.shape.n_ff, model.kind, layer.il
    bundle = format.BundleLayout.of({"up": kind, "down": kind}, n_embd, layout)

    def records() -> Iterator[Bytes]:
        up, down = ggml.quantize(layer.up(), kind), ggml.quantize(layer.down(), kind)
        if layout == "split":
            yield from (up, down)
            return
        for start in range(0, n_ff, _ROWS):
            rows = slice(start, start + _ROWS)
            yield np.concatenate([up[rows], down[rows]], axis=1)

    yield _planned(format.weight_name(il, "predictor_in"), (n_embd, WIDTH), T.F16, layer.predictor_in)
    yield _planned(format.weight_name(il, "predictor_out"), (WIDTH, n_ff), T.F16, layer.predictor_out)
    yield _planned(format.bias_name(il, "predictor"), (n_ff,), T.F32, layer.predictor_bias)
    yield PlannedTensor(format.weight_name(il, "bundle"), (bundle.record_bytes, n_ff), FLASH, records)


def _planned(name: str, shape: tuple[int, ...], kind: T, make: Callable[[], Floats]) -> PlannedTensor:
    def data() -> npt.NDArray[Any]:
        values = make()
        return values if kind == T.F32 else ggml.quantize(values, kind)

    return PlannedTensor(name, shape, kind, _once(data))


def _norm(model: OptModel, name: str) -> PlannedTensor:
    return _planned(name, (model.shape.n_embd,), T.F32, lambda: model.norm_weight(name))


def _bias(model: OptModel, name: str, n: int, sigma: float) -> PlannedTensor:
    return _planned(name, (n,), T.F32, lambda: model.normal(name, (n,), sigma))


def _attention(layer: Layer, part: str) -> Callable[[], Bytes]:
    return lambda: layer.attention(part)


def _once(make: Callable[[], npt.NDArray[Any]]) -> Callable[[], Iterator[Bytes]]:
    """The tensor in one piece."""

    def chunks() -> Iterator[Bytes]:
        yield make().reshape(-1).view(np.uint8)

    return chunks
