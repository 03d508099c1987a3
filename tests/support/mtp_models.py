"""Tiny models with a head of multi-token prediction, whose guesses are sometimes right.

Of random weights alone a head would never say what the model says. So the model's layers add little to the embedding of
the last token, which the output matrix turns into the next one; and the head's projection leaves that embedding as it
is, to which its own layer adds little, too. The smaller `added` is, the more often they agree.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from architectures import Weights, fuse, quantise, write_plain

__all__ = ["write_mtp"]

N_CTX = 512


def write_mtp(
    arch: str,
    path: Path,
    *,
    dense: bool = False,
    own_head: bool = False,
    added: float = 0.3,
    head: bool = True,
    heads: int = 1,
    mixed: bool = False,
    sections: bool = False,
) -> Path:
    """Writes a model of Q8_0 weights with two layers and a head.

    Args:
        dense: without experts in any layer.
        own_head: the head has an embedding and an output matrix of its own, with the values of the model's.
        added: times what layers add.
        mixed: the head's projection is random: it needs the model's states as much as the tokens.
        heads: how many it has, all with the same values.
        head: False: the file has no head, the same layers and values otherwise.
        sections: positions have several directions.
    """
    n_layers = 2 + (heads if head else 0)
    values: dict[str, Any] = {
        ".block_count": n_layers,
        ".nextn_predict_layers": n_layers - 2,
        ".context_length": N_CTX,
        ".rope.dimension_sections": [8] * 4 if sections else None,
        ".attention.sliding_window_pattern": [0, 1, *(heads * [0])][:n_layers],
        ".leading_dense_block_count": max(3, n_layers) if dense else 1,
    }

    def edit(weights: Weights) -> None:
        if arch == "mimo2":  # published files are fused
            fuse(weights)
        if dense or arch == "mimo2":
            of = r"exps|ffn_gate_inp|exp_probs" if dense else r"^blk\.[2-9]\.(ffn_\w+_exps|ffn_gate_inp|exp_probs)"
            for name in [name for name in weights if re.search(of, name)]:
                del weights[name]
        for name, data in weights.items():
            if re.search(r"attn_output\.weight|ffn_down", name):
                data *= np.float32(added)
            elif name.endswith("eh_proj.weight") and not mixed:
                data[:] = 0
                data[:, : len(data)] = np.eye(len(data), dtype=np.float32)
            elif re.search(r"(output|enorm|shared_head)_?norm\.weight$|enorm\.weight$", name):
                data[:] = 1
        for own, shared in (("embed_tokens", "token_embd"), ("shared_head_head", "output")):
            for layer in range(2, max(3, n_layers)):
                if own_head:
                    weights[f"blk.{layer}.nextn.{own}.weight"] = weights[f"{shared}.weight"]
                else:
                    weights.pop(f"blk.{layer}.nextn.{own}.weight", None)

    plain = path.with_suffix(".f32")
    try:
        write_plain(arch, plain, "mixture", more=values, edit=edit)
        return quantise(plain, path, "q8_0")
    finally:
        plain.unlink(missing_ok=True)
