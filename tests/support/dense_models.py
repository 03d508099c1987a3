"""Small models in memory, for the tests of gguf_tools: a `Source` of any types and shapes, with or without a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as K
from gguf import GGUFValueType as V

from gguf_tools import ggml
from gguf_tools.source import KeyValue, SourceTensor, raw_row_bytes, row_count
from gguf_tools.stream import copied, write_gguf
from gguf_tools.types import row_bytes

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ArrayTensor:
    """A SourceTensor that offers rows only, as those of other file formats do."""

    name: str
    shape: tuple[int, ...]
    kind: K
    rows: Bytes  # [rows, bytes per row]

    def raw(self, start: int, stop: int) -> Bytes:
        return self.rows[start:stop]

    def floats(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        return ggml.dequantize(self.rows[start:stop], self.kind)


@dataclass(frozen=True)
class ArraySource:
    values: dict[str, KeyValue]
    tensors: dict[str, SourceTensor]

    def save(self, path: Path, *, alignment: int = 32) -> Path:
        write_gguf(path, self.values, [copied(tensor) for tensor in self.tensors.values()], alignment=alignment)
        return path

    def with_values(self, **values: KeyValue | None) -> ArraySource:
        """Keys by keyword, "__" for "."; None removes one."""
        changed = {**self.values, **{key.replace("__", "."): value for key, value in values.items()}}
        return replace(self, values={key: value for key, value in changed.items() if value is not None})

    def with_tensors(self, *tensors: ArrayTensor) -> ArraySource:
        return replace(self, tensors={**self.tensors, **{tensor.name: tensor for tensor in tensors}})

    def without(self, *names: str) -> ArraySource:
        return replace(self, tensors={name: t for name, t in self.tensors.items() if name not in names})


def u32(value: int) -> KeyValue:
    return KeyValue(value, V.UINT32)


def text(value: str) -> KeyValue:
    return KeyValue(value, V.STRING)


def array(values: list[Any], kind: V) -> KeyValue:
    return KeyValue(values, V.ARRAY, kind)


def tensor(name: str, values: npt.NDArray[np.float32], kind: K = K.F32) -> ArrayTensor:
    rows = values.reshape(-1, values.shape[-1])
    return ArrayTensor(name, tuple(reversed(values.shape)), kind, ggml.quantize(rows, kind))


def raw_tensor(name: str, shape: tuple[int, ...], kind: K, rng: np.random.Generator) -> ArrayTensor:
    """Any bytes."""
    n_rows = int(np.prod(shape[1:]))
    rows = rng.integers(0, 256, (n_rows, row_bytes(kind, shape[0])), np.uint8)
    return ArrayTensor(name, shape, kind, rows)


def dense_model(
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 96,
    kind: K = K.F32,
    down: K | None = None,
    gated: bool = True,
    biases: bool = False,
    arch: str = "llama",
    activation: str | None = "reglu",
    seed: int = 0,
) -> ArraySource:
    """The feed-forward blocks of a model, and an embedding to be left alone."""
    rng = np.random.default_rng(seed)
    values = {
        "general.architecture": text(arch),
        "general.file_type": u32(7),
        f"{arch}.block_count": u32(n_layer),
        f"{arch}.embedding_length": u32(n_embd),
        f"{arch}.feed_forward_length": u32(n_ff),
    }
    if activation:
        values[f"{arch}.feed_forward_activation"] = text(activation)

    def random(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    def tensors() -> Iterator[ArrayTensor]:
        yield tensor("token_embd.weight", random(5, n_embd))
        for il in range(n_layer):
            blk = f"blk.{il}."
            yield tensor(blk + "ffn_norm.weight", random(n_embd))
            if gated:
                yield tensor(blk + "ffn_gate.weight", random(n_ff, n_embd), kind)
            yield tensor(blk + "ffn_down.weight", random(n_embd, n_ff), kind if down is None else down)
            yield tensor(blk + "ffn_up.weight", random(n_ff, n_embd), kind)
            if biases:
                if gated:
                    yield tensor(blk + "ffn_gate.bias", random(n_ff))
                yield tensor(blk + "ffn_up.bias", random(n_ff))
                yield tensor(blk + "ffn_down.bias", random(n_embd))
        yield tensor("output_norm.weight", random(n_embd))

    return ArraySource(values, {t.name: t for t in tensors()})


def expert_model(
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 96,
    n_expert: int = 4,
    kind: K = K.F32,
    down: K | None = None,
    arch: str = "smallthinker",
    activation: str | None = None,
    seed: int = 0,
) -> ArraySource:
    """Layers of experts, and a tensor that nothing is done to. No values are alike."""
    rng = np.random.default_rng(seed)
    values = {
        "general.architecture": text(arch),
        f"{arch}.block_count": u32(n_layer),
        f"{arch}.embedding_length": u32(n_embd),
        f"{arch}.feed_forward_length": u32(7),  # of dense layers, of which there are none
        f"{arch}.expert_feed_forward_length": u32(n_ff),
        f"{arch}.expert_count": u32(n_expert),
        f"{arch}.expert_used_count": u32(1),
    }
    if activation:
        values[f"{arch}.feed_forward_activation"] = text(activation)

    def random(*shape: int) -> npt.NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    def tensors() -> Iterator[ArrayTensor]:
        yield tensor("token_embd.weight", random(5, n_embd))
        for il in range(n_layer):
            blk = f"blk.{il}."
            yield tensor(blk + "ffn_gate_inp.weight", random(n_expert, n_embd))
            yield tensor(blk + "ffn_gate_exps.weight", random(n_expert, n_ff, n_embd), kind)
            yield tensor(blk + "ffn_down_exps.weight", random(n_expert, n_embd, n_ff), kind if down is None else down)
            yield tensor(blk + "ffn_up_exps.weight", random(n_expert, n_ff, n_embd), kind)

    return ArraySource(values, {t.name: t for t in tensors()})


def contents(tensors: Mapping[str, SourceTensor]) -> dict[str, tuple[tuple[int, ...], K, bytes]]:
    """All that there is to compare about tensors."""
    return {name: (t.shape, t.kind, t.raw(0, row_count(t)).tobytes()) for name, t in tensors.items()}


def all_floats(source_tensor: SourceTensor) -> npt.NDArray[np.float32]:
    return source_tensor.floats(0, row_count(source_tensor))


def read_everything(tensors: Mapping[str, SourceTensor]) -> int:
    """Reads all bytes; how many they are."""
    return sum(t.raw(0, row_count(t)).nbytes for t in tensors.values() if raw_row_bytes(t))
