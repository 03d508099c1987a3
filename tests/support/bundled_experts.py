"""A tiny SmallThinker as an ordinary GGUF file, and with its experts in neuron bundles that are packed here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as K
from gguf import GGUFValueType as V

from gguf_tools import ggml
from gguf_tools.synthetic.tokenizer import add_tokenizer

Bytes = npt.NDArray[np.uint8]
Tensors = dict[str, tuple[Any, int]]  # rows (of bytes, if quantised), and their type
FLASH = 17996
ARCH = "smallthinker"
PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class TinyExperts:
    """n_ff: of each expert; not a multiple of the rows that are computed together."""

    kind: K = K.F32  # of the experts
    n_layer: int = 3
    n_embd: int = 256
    n_ff: int = 320
    n_expert: int = 8
    n_expert_used: int = 3
    n_head: int = 4
    n_head_kv: int = 2
    n_vocab: int = 512
    seed: int = 0

    def keys(self) -> dict[str, Any]:
        """With the architecture's name before them; without what only a flash file has."""
        head = self.n_embd // self.n_head
        keys = {
            "block_count": self.n_layer,
            "context_length": 2048,
            "embedding_length": self.n_embd,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": head,
            "attention.value_length": head,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": head,
            "rope.freq_base": 1e6,
            "expert_count": self.n_expert,
            "expert_used_count": self.n_expert_used,
            "expert_feed_forward_length": self.n_ff,
            "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        }
        return {f"{ARCH}.{key}": value for key, value in keys.items()}

    def flash_keys(self) -> dict[str, Any]:
        row = self.row_bytes
        return {
            "general.alignment": 4096,
            "flash.version": 1,
            "flash.bundle.parts": list(PARTS),
            "flash.bundle.types": ([int(self.kind)] * 3, V.UINT32),
            "flash.bundle.row_lengths": ([self.n_embd] * 3, V.UINT32),
            "flash.bundle.offsets": ([0, row, 2 * row], V.UINT64),
            "flash.bundle.record_bytes": np.uint64(3 * row),
            "flash.bundle.layout": "bundled",
            f"{ARCH}.feed_forward_activation": "reglu",
        }

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.n_embd // block * size

    def _matrices(self) -> dict[str, npt.NDArray[np.float32]]:
        rng = np.random.default_rng(self.seed)

        def normal(*shape: int) -> npt.NDArray[np.float32]:
            return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

        def norm() -> npt.NDArray[np.float32]:
            return (1 + 0.1 * rng.standard_normal(self.n_embd)).astype(np.float32)

        n_embd, n_kv = self.n_embd, self.n_embd // self.n_head * self.n_head_kv
        found = {"token_embd.weight": normal(self.n_vocab, n_embd) * np.float32(n_embd**0.5)}
        for il in range(self.n_layer):
            blk = f"blk.{il}."
            found |= {
                blk + "attn_norm.weight": norm(),
                blk + "attn_q.weight": normal(n_embd, n_embd),
                blk + "attn_k.weight": normal(n_kv, n_embd),
                blk + "attn_v.weight": normal(n_kv, n_embd),
                blk + "attn_output.weight": normal(n_embd, n_embd),
                blk + "ffn_norm.weight": norm(),
                blk + "ffn_gate_inp.weight": normal(self.n_expert, n_embd),
                blk + "ffn_gate_exps.weight": normal(self.n_expert, self.n_ff, n_embd),
                blk + "ffn_up_exps.weight": normal(self.n_expert, self.n_ff, n_embd),
                blk + "ffn_down_exps.weight": 3 * normal(self.n_expert, n_embd, self.n_ff),
            }
        return found | {"output_norm.weight": norm(), "output.weight": 3 * normal(self.n_vocab, n_embd)}

    def _records(self, matrices: dict[str, npt.NDArray[np.float32]], il: int) -> Bytes:
        """[expert, neuron, bytes]"""
        gate, up, down = (matrices[f"blk.{il}.ffn_{part}_exps.weight"] for part in PARTS)
        rows = (gate, up, down.transpose(0, 2, 1))
        packed = [_packed(part, self.kind).reshape(self.n_expert, self.n_ff, self.row_bytes) for part in rows]
        return np.concatenate(packed, axis=2)

    def flash_tensors(self) -> Tensors:
        tensors: Tensors = {}
        matrices = self._matrices()
        for name, data in matrices.items():
            if "_exps" not in name:
                tensors[name] = data, int(K.F32)
            elif "_gate_" in name:
                il = int(name.split(".")[1])
                tensors[f"blk.{il}.ffn_bundle_exps.weight"] = self._records(matrices, il), FLASH
        return tensors

    def plain_tensors(self) -> Tensors:
        """Of the values that the bundles hold; a down that is quantised along neurons would hold others: it is F32."""
        tensors: Tensors = {}
        for name, data in self._matrices().items():
            if "_exps" not in name:
                tensors[name] = data, int(K.F32)
            elif "_down_" in name:
                rows = np.ascontiguousarray(data.transpose(0, 2, 1))
                back = ggml.dequantize(_packed(rows, self.kind), self.kind).reshape(rows.shape)
                tensors[name] = np.ascontiguousarray(back.transpose(0, 2, 1)), int(K.F32)
            else:
                packed = _packed(data, self.kind).reshape(*data.shape[:-1], self.row_bytes)
                tensors[name] = packed, int(self.kind)
        return tensors

    def write(self, path: Path) -> Path:
        return write(path, self.keys(), self.plain_tensors(), self.n_vocab)

    def write_bundled(self, path: Path) -> Path:
        return write(path, self.keys() | self.flash_keys(), self.flash_tensors(), self.n_vocab)


def _packed(rows: npt.NDArray[np.float32], kind: K) -> Bytes:
    """[rows, bytes]"""
    return ggml.quantize(np.ascontiguousarray(rows).reshape(-1, rows.shape[-1]), kind)


def write(path: Path, keys: dict[str, Any], tensors: Tensors, n_vocab: int = 512) -> Path:
    """Keys are typed by their values: int (uint32), np.uint64, float, str, list of str, (list, its elements' type)."""
    gguf.GGML_QUANT_SIZES.setdefault(FLASH, (1, 1))  # type: ignore[call-overload]
    writer = gguf.GGUFWriter(path, keys.get("general.architecture", ARCH))
    for key, value in keys.items():
        if key == "general.architecture":
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, tuple):
            writer.add_key_value(key, value[0], V.ARRAY, value[1])
        elif isinstance(value, np.uint64):
            writer.add_uint64(key, int(value))
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_key_value(key, value, V.get_type(value))
    add_tokenizer(writer, n_vocab)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if data.dtype == np.float32 else kind)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
