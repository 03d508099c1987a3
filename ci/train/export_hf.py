"""Write the trained OPT model as a Hugging Face directory: configuration, float32 weights, tokenizer.

    python ci/train/export_hf.py --run DIR --hf DIR

The first DIR is the folder that train.py wrote, with --form opt. Source of the names: transformers'
models/opt/modeling_opt.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from corpus import BOS, BOS_ID, EOS, EOS_ID
from export import load_run
from model import ModelConfig

DECODER = "model.decoder."
BLOCK_MODULES = {
    "attn_norm": "self_attn_layer_norm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.output": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
}
MODEL_MODULES = {
    "token_embd": "embed_tokens",
    "position_embd": "embed_positions",
    "output_norm": "final_layer_norm",
}


def hf_name(name: str) -> str:
    """Our name of a tensor -> Hugging Face's."""
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        return f"{DECODER}layers.{layer}.{BLOCK_MODULES[module]}.{kind}"
    return f"{DECODER}{MODEL_MODULES[module]}.{kind}"


def hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "hidden_size": config.n_embd,
        "word_embed_proj_dim": config.n_embd,
        "ffn_dim": config.n_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_ctx,
        "vocab_size": config.n_vocab,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer_json: Path, folder: Path) -> None:
    """As one file, which adds BOS, and as vocabulary and merges."""
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    tokenizer.save(str(folder / "tokenizer.json"))
    model: dict[str, Any] = json.loads(tokenizer_json.read_text())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, **special},
    )


def export_hf(run: Path, folder: Path) -> None:
    config, state, _ = load_run(run)
    if config.form != "opt":
        raise SystemExit("only the opt form has a Hugging Face architecture")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", hf_config(config))
    tensors = {hf_name(name): tensor.float().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(run / "tokenizer.json", folder)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--hf", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    export_hf(args.run, args.hf)


if __name__ == "__main__":
    main()
