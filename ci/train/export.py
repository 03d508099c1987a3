"""Write a trained model as GGUF: Q8_0 matrices, float32 norms and router, the tokenizer inside.

    python ci/train/export.py --run DIR --gguf FILE

DIR is the folder that train.py wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType, TokenType
from torch import Tensor

from corpus import BOS_ID, EOS_ID
from model import FORMS, ModelConfig

FloatArray = npt.NDArray[np.float32]

NAMES = {"arcee": "stdlib-arcee", "moe": "stdlib-moe"}
KINDS = {"arcee": "A dense model with a squared-ReLU feed-forward block", "moe": "A mixture of experts"}

# Our names -> llama.cpp's, inside a block. What a form does not have is absent from its state dict.
BLOCK_TENSORS = {
    "attn_norm.weight": "attn_norm.weight",
    "attn.q.weight": "attn_q.weight",
    "attn.k.weight": "attn_k.weight",
    "attn.v.weight": "attn_v.weight",
    "attn.output.weight": "attn_output.weight",
    "attn.q_norm.weight": "attn_q_norm.weight",
    "attn.k_norm.weight": "attn_k_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn.up.weight": "ffn_up.weight",
    "ffn.down.weight": "ffn_down.weight",
    "ffn.router.weight": "ffn_gate_inp.weight",
    "ffn.gate": "ffn_gate_exps.weight",
    "ffn.up": "ffn_up_exps.weight",
    "ffn.down": "ffn_down_exps.weight",
}
MODEL_TENSORS = {
    "token_embd.weight": "token_embd.weight",
    "output_norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
KEPT_IN_FLOAT = ("norm.weight", "ffn_gate_inp.weight")


def gguf_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, FloatArray]]:
    """Every weight under its GGUF name. Shapes are row-major: GGUF's `ne` reversed."""
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            target = f"blk.{layer}.{BLOCK_TENSORS[rest]}"
        else:
            target = MODEL_TENSORS[name]
        yield target, tensor.float().cpu().numpy()


def add_hyperparameters(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff * max(1, config.n_expert_used))
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.n_vocab)
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.n_expert_used)
        writer.add_expert_feed_forward_length(config.n_ff)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer_json: Path) -> None:
    model: dict[str, Any] = json.loads(tokenizer_json.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = [TokenType.CONTROL if i in (BOS_ID, EOS_ID) else TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def add_provenance(writer: gguf.GGUFWriter, config: ModelConfig, training: dict[str, Any], n_parameters: int) -> None:
    corpus = training["corpus"]
    writer.add_name(NAMES[config.form])
    writer.add_author("the llama_flash project")
    writer.add_description(
        f"{KINDS[config.form]}, {n_parameters / 1e6:.1f} million parameters, trained on the sources of Python "
        f"{corpus['python']}'s standard library. For tests and demonstrations."
    )
    writer.add_license("PSF-2.0")
    writer.add_license_link("https://docs.python.org/3/license.html")
    writer.add_tags(["text-generation", "python"])
    writer.add_languages(["en"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_key_value("training.steps", training["steps"], GGUFValueType.UINT32)
    writer.add_key_value("training.seed", training["seed"], GGUFValueType.UINT32)
    writer.add_key_value("training.text.sha256", corpus["sha256"], GGUFValueType.STRING)


def export(run: Path, path: Path) -> None:
    """Read DIR/checkpoint.pt, DIR/tokenizer.json and DIR/training.json; write the GGUF file."""
    training: dict[str, Any] = json.loads((run / "training.json").read_text())
    checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    config = FORMS[checkpoint["form"]]
    if checkpoint["step"] != training["steps"]:
        raise SystemExit("the checkpoint is not the end of the run")
    state: dict[str, Tensor] = checkpoint["model"]

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, config.architecture)
    add_provenance(writer, config, training, sum(t.numel() for t in state.values()))
    add_hyperparameters(writer, config)
    add_tokenizer(writer, run / "tokenizer.json")
    for name, data in gguf_tensors(state):
        if name.endswith(KEPT_IN_FLOAT):
            writer.add_tensor(name, data)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path}: {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--gguf", type=Path, required=True)
    args = parser.parse_args()
    export(args.run, args.gguf)


if __name__ == "__main__":
    main()
