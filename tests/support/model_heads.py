"""Heads of models that exist in no file, and what the engine would say of them: for budgets, plans and costs."""

from __future__ import annotations

from pathlib import Path

from llama_flash.model.gguf import GgufMeta, TensorInfo
from llama_flash.model.graphs import Graphs, Use
from llama_flash.model.shape import ContextShape

MIB = 1 << 20


def model(**sizes: int) -> GgufMeta:
    """A mixture of experts of 4 layers: 8 experts of 2 MiB per weight, unless told otherwise (MiB, 0: none)."""
    shapes = {
        "ffn_up_exps": (256, 512, 8),
        "ffn_gate_exps": (256, 512, 8),
        "ffn_down_exps": (512, 256, 8),
        "ffn_up_shexp": (256, 512),
        "ffn_gate_inp": (256, 8),
        "attn_q": (256, 256),
        "attn_kv_b": (256, 256),
        "attn_norm": (256,),
    }
    default = {"ffn_up_exps": 16, "ffn_gate_exps": 16, "ffn_down_exps": 16, "ffn_up_shexp": 12, "attn_q": 4}
    default |= {"attn_kv_b": 4, "ffn_gate_inp": 1, "attn_norm": 1}
    tensors = {}
    for kind, size in {**default, **sizes}.items():
        for layer in range(4):
            if size and kind in shapes:
                name = f"blk.{layer}.{kind}.weight"
                tensors[name] = TensorInfo(name, shapes[kind], 8, Path("m.gguf"), 0, size * MIB)
    for name, size in {"token_embd.weight": 32, "output.weight": sizes.get("output", 32)}.items():
        tensors[name] = TensorInfo(name, (256, 1000), 8, Path("m.gguf"), 0, size * MIB)
    values: dict[str, object] = {"general.architecture": "x", "x.block_count": 4, "x.embedding_length": 256}
    values |= {"x.attention.head_count": 4, "x.attention.head_count_kv": 2, "x.expert_count": 8}
    values |= {"x.expert_used_count": 2, "x.expert_feed_forward_length": 512, "x.vocab_size": 1000}
    return GgufMeta((Path("m.gguf"),), values, tensors, sum(t.size for t in tensors.values()))  # type: ignore[arg-type]


DENSE = {"ffn_up_exps": 0, "ffn_gate_exps": 0, "ffn_down_exps": 0, "ffn_up_shexp": 32}
SHAPE = ContextShape(n_ctx=256, n_batch=64, n_ubatch=64)


def told(meta: GgufMeta, shape: ContextShape) -> Graphs:
    """What the engine would say of `model()`: its graphs pick rows of the embedding and look at parts of attn_kv_b."""
    uses = {}
    for name, tensor in meta.tensors.items():
        multiplied = Use.MUL_MAT_ID if len(tensor.shape) == 3 else Use.MUL_MAT
        uses[name] = multiplied
        if name == "token_embd.weight":
            uses[name] = Use.GET_ROWS
        elif "norm" in name or "kv_b" in name:
            uses[name] = Use.OTHER
        elif "gate_inp" in name:
            uses[name] |= Use.ROUTES
    return Graphs(uses, 1 * MIB, 2 * MIB)
