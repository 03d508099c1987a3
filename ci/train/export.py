"""Write one of the small models as GGUF: matrices of the chosen type, all else float32, the tokenizer inside.

    python ci/train/export.py --run DIR --gguf FILE [--type q8_0]

DIR is the folder that train.py wrote. "All else": norms, biases, the router and the table of positions.
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
from model import FORMS, POSITION_OFFSET, ModelConfig

FloatArray = npt.NDArray[np.float32]

NAMES = {"arcee": "stdlib-arcee", "draft": "stdlib-draft", "moe": "stdlib-moe", "opt": "stdlib-opt"}
KINDS = {
    "arcee": "A dense model with a squared-ReLU feed-forward block",
    "draft": "A draft model for stdlib-arcee, taught by it",
    "moe": "A mixture of experts",
    "opt": "A dense model in OPT's form with a sparse ReLU feed-forward block",
}
TYPES = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}

# Our names -> llama.cpp's, inside a block. What a form does not have is absent from its state dict. Modules, each with
# a weight and perhaps a bias:
BLOCK_MODULES = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.output": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
    "ffn.router": "ffn_gate_inp",
}
# Tensors of all experts:
EXPERT_TENSORS = {
    "ffn.gate": "ffn_gate_exps.weight",
    "ffn.up": "ffn_up_exps.weight",
    "ffn.down": "ffn_down_exps.weight",
}
KEPT_IN_FLOAT = ("ffn_gate_inp.weight", "position_embd.weight")  # and what is not a matrix


def gguf_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, FloatArray]]:
    """Every weight under its GGUF name. Shapes are row-major: GGUF's `ne` reversed."""
    for name, tensor in state.items():
        target = name  # outside the blocks the names are the same
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            module, _, kind = rest.rpartition(".")
            target = f"blk.{layer}." + (EXPERT_TENSORS.get(rest) or f"{BLOCK_MODULES[module]}.{kind}")
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
    if config.form == "opt":
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_uint32("opt.position_offset", POSITION_OFFSET)
        writer.add_string("opt.feed_forward_activation", "relu")
    else:
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


def add_provenance(
    writer: gguf.GGUFWriter, config: ModelConfig, training: dict[str, Any], n_parameters: int, file_type: LlamaFileType
) -> None:
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
    writer.add_file_type(file_type)
    writer.add_key_value("training.steps", training["steps"], GGUFValueType.UINT32)
    writer.add_key_value("training.seed", training["seed"], GGUFValueType.UINT32)
    writer.add_key_value("training.text.sha256", corpus["sha256"], GGUFValueType.STRING)


def load_run(run: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """DIR/checkpoint.pt's form and weights, DIR/training.json."""
    training: dict[str, Any] = json.loads((run / "training.json").read_text())
    checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    config = FORMS[checkpoint["form"]]
    if checkpoint["step"] != training["steps"]:
        raise SystemExit("the checkpoint is not the end of the run")
    return config, checkpoint["model"], training


def export(run: Path, path: Path, type_name: str) -> None:
    """Write the GGUF file, its matrices of a type of `TYPES`."""
    config, state, training = load_run(run)
    kind, file_type = TYPES[type_name]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, config.architecture)
    add_provenance(writer, config, training, sum(t.numel() for t in state.values()), file_type)
    add_hyperparameters(writer, config)
    add_tokenizer(writer, run / "tokenizer.json")
    for name, data in gguf_tensors(state):
        if data.ndim < 2 or name.endswith(KEPT_IN_FLOAT):
            writer.add_tensor(name, data)
        else:
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
    parser.add_argument("--type", choices=TYPES, default="q8_0", help="of the matrices")
    args = parser.parse_args()
    export(args.run, args.gguf, args.type)


if __name__ == "__main__":
    main()
