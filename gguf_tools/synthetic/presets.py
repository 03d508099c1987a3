"""Named models: the benchmark's large ones, and a tiny one of each form for tests."""

from __future__ import annotations

from dataclasses import replace

from gguf import GGMLQuantizationType as T

from gguf_tools.synthetic.forms import ARCHITECTURES, Shape
from gguf_tools.synthetic.types import Types, everything, types_named
from gguf_tools.synthetic.writer import SyntheticModel

# With this popularity an LRU of 1.6 GB of the 4.08 GB of experts hits 85 %, as python -m gguf_tools.routing measures.
SKEWED = 0.82

_QWEN3_30B_A3B = SyntheticModel(
    Shape(
        form="qwen3moe",
        n_layer=48,
        n_embd=2048,
        n_ff=6144,
        n_head=32,
        n_head_kv=4,
        head_dim=128,
        n_vocab=151936,
        n_expert=128,
        n_expert_used=8,
        n_ff_exp=768,
    ),
    types_named("Q4_K_M"),
)
_QWEN3_30B_A3B_12L = SyntheticModel(replace(_QWEN3_30B_A3B.shape, n_layer=12, n_vocab=16384), everything("Q4_0"))
_GPT_OSS_120B = SyntheticModel(
    Shape(
        form="gpt-oss",
        n_layer=36,
        n_embd=2880,
        n_ff=2880,
        n_head=64,
        n_head_kv=8,
        head_dim=64,
        n_vocab=201088,
        n_expert=128,
        n_expert_used=4,
        n_ff_exp=2880,
        n_ctx_train=131072,
    ),
    types_named("MXFP4"),
)
_LLAMA2_7B_18L = SyntheticModel(
    Shape(form="llama", n_layer=18, n_embd=4096, n_ff=11008, n_head=32, n_head_kv=32, head_dim=128, n_vocab=32000),
    Types(ffn=T.Q8_0, ffn_down=T.Q8_0),
)


def tiny(form: str, quantisation: str = "Q8_0", *, seed: int = 0, n_layer: int = 3, n_ff: int = 512) -> SyntheticModel:
    """A model of a few MB for tests: every row is a multiple of 256, so that every type fits."""
    few_experts = form in ("mixtral", "smallthinker")
    shape = Shape(
        form=form,
        n_layer=n_layer,
        n_embd=256,
        n_ff=n_ff,
        n_head=4,
        n_head_kv=4 if form == "olmoe" else 2,
        head_dim=64,
        n_vocab=512,
        n_expert=8 if few_experts else 16,
        n_expert_used=2 if few_experts else 4,
        n_ff_exp=512 if form == "smallthinker" else 256,  # not square: a bundle holds down transposed
    )
    return SyntheticModel(shape, types_named(quantisation), seed)


PRESETS = {
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "gpt-oss-120b": _GPT_OSS_120B,
    "qwen3-30b-a3b-12l": _QWEN3_30B_A3B_12L,
    "llama2-7b-18l": _LLAMA2_7B_18L,
    # whose KV cache leaves room for many sequences
    "llama3-8b-16l": replace(_LLAMA2_7B_18L, shape=replace(_LLAMA2_7B_18L.shape, n_layer=16, n_ff=14336, n_head_kv=8)),
    # small enough to be written by every test run, large enough for a memory cap to bite
    "moe-400m": replace(
        _QWEN3_30B_A3B_12L, shape=replace(_QWEN3_30B_A3B_12L.shape, n_layer=6, n_embd=1024, n_expert=64, n_ff_exp=512)
    ),
    "dense-400m": replace(
        _LLAMA2_7B_18L,
        shape=replace(_LLAMA2_7B_18L.shape, n_layer=8, n_embd=2048, n_ff=5504, n_head=16, n_head_kv=16, n_vocab=4096),
    ),
} | {f"tiny-{form}": tiny(form) for form in ARCHITECTURES}
