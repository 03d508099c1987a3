"""What the tests of neuron bundles share: bundle files with and without predictors, and sessions with little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engines import Model, _open
from gguf import GGMLQuantizationType as K
from gguf import GGUFValueType as V

from gguf_tools.bundle import bundle
from gguf_tools.source import KeyValue, open_gguf
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from gguf_tools.synthetic import tiny, write
from gguf_tools.synthetic.types import everything
from llama_flash import FlashOffload

Floats = npt.NDArray[np.float32]
Predictor = Callable[[int, int, int], tuple[Floats, Floats, Floats]]  # (layer, n_embd, n_ff) -> in, out, bias


def open_neurons(
    path: Any, *, predictor: Any = "auto", share: float = 0.25, window: int | None = None, **options: Any
) -> Model:
    """Opens a bundle file with memory for `share` of its neurons above the least that works."""
    flash = {key: options.pop(key) for key in ("io_engine", "lookahead") if key in options}
    llm = _open(path, flash_offload=FlashOffload(predictor=predictor, window=window, follow=False, **flash), **options)
    give_neurons(llm, share)
    return llm


def give_neurons(llm: Any, share: float) -> None:
    session = llm.flash
    needs = session.native.requirements()
    assert needs.n_bundles > 0, "the file has no bundles"
    n_bytes = int(needs.min_memory + share * needs.neuron_bytes)
    session.native.set_memory(n_bytes)


def slots_of(llm: Any) -> int:
    return int(llm.flash.native.memory().n_neuron_slots)


def bundled(path: Path, **options: Any) -> Path:
    """The bundle file of an ordinary GGUF file, beside it."""
    out = path.with_name("-".join([path.stem, *map(str, options.values()), "bundled.gguf"]))
    if not out.exists():
        bundle(path, out, **options)
    return out


def with_predictors(path: Path, out: Path, make: Predictor, kind: K = K.F32) -> Path:
    """A copy of a bundle file with predictors made by `make`."""
    from gguf_tools import ggml

    source = open_gguf(path)
    values: dict[str, KeyValue] = dict(source.values)
    arch = values["general.architecture"].value
    n_layer, n_embd, n_ff = (
        int(values[f"{arch}.{key}"].value) for key in ("block_count", "embedding_length", "feed_forward_length")
    )
    planned = [copied(tensor) for tensor in source.tensors.values()]
    ranks = []
    for layer in range(n_layer):
        a, b, bias = make(layer, n_embd, n_ff)
        ranks.append(a.shape[0])
        planned += [
            _planned(f"blk.{layer}.ffn_predictor_in.weight", ggml.quantize(a, kind), a.shape[::-1], kind),
            _planned(f"blk.{layer}.ffn_predictor_out.weight", ggml.quantize(b, kind), b.shape[::-1], kind),
            _planned(f"blk.{layer}.ffn_predictor.bias", bias.view(np.uint8), (n_ff,), K.F32),
        ]
    values["flash.predictor.kind"] = KeyValue("lowrank", V.STRING)
    values["flash.predictor.ranks"] = KeyValue(ranks, V.ARRAY, V.UINT32)
    values["flash.predictor.recall"] = KeyValue(0.99, V.FLOAT32)
    write_gguf(out, values, planned, force=True)
    return out


def _planned(name: str, data: Any, shape: tuple[int, ...], kind: K) -> PlannedTensor:
    def chunks() -> Iterator[Any]:
        yield np.ascontiguousarray(data).reshape(-1)

    return PlannedTensor(name, shape, kind, chunks)


def rewritten(path: Path, out: Path, change: Callable[[dict[str, KeyValue]], Mapping[str, KeyValue]]) -> Path:
    """A copy of a GGUF file with other key-values."""
    source = open_gguf(path)
    write_gguf(out, change(dict(source.values)), [copied(t) for t in source.tensors.values()], force=True)
    return out


def write_model(folder: Path, form: str, kind: str, activation: str | None = None) -> Path:
    """A tiny model, all of it of one type, with the activation as its key says."""
    path = folder / f"neurons-{form}-{kind}-{activation}.gguf"
    if not path.exists():
        model = tiny(form, kind)
        plain = path.with_suffix(".plain")
        write(type(model)(model.shape, everything(kind), model.seed), plain)
        values = {} if activation is None else {f"{form}.feed_forward_activation": KeyValue(activation, V.STRING)}
        if activation == "fatrelu":
            values[f"{form}.feed_forward_activation_threshold"] = KeyValue(0.3, V.FLOAT32)
        rewritten(plain, path, lambda old: {**old, **values})
        plain.unlink()
    return path


def some_active(layer: int, n_embd: int, n_ff: int) -> Any:
    """About a third of the neurons, depending on the input."""
    rng = np.random.default_rng(layer)
    a = rng.standard_normal((32, n_embd)).astype(np.float32) / np.float32(n_embd**0.5)
    b = rng.standard_normal((n_ff, 32)).astype(np.float32) / np.float32(32**0.5)
    return a, b, np.full(n_ff, -0.4, np.float32)
