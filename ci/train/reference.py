"""The trained float model, run by torch: what the GGUF file is compared with, and what its blocks do inside."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model import FORMS, LanguageModel, MoeFeedForward, ReluFeedForward

FloatArray = npt.NDArray[np.float32]
ExpertArray = npt.NDArray[np.int64]


def lru_hit_rate(choices: ExpertArray, n_slots: int) -> float:
    """Share of expert requests that a least-recently-used cache of `n_slots` experts serves; choices [tokens, used]."""
    slots: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in choices.flatten().tolist():
        if request in slots:
            hits += 1
            slots.move_to_end(request)
        else:
            slots[request] = None
            if len(slots) > n_slots:
                slots.popitem(last=False)
    return hits / choices.size


def routing_statistics(choices: ExpertArray, n_expert: int) -> dict[str, Any]:
    """For one layer; choices [tokens, used] in reading order."""
    shares = np.sort(np.bincount(choices.flatten(), minlength=n_expert) / choices.size)[::-1]
    hundreds = [len(np.unique(choices[i : i + 100])) for i in range(0, len(choices) - 99, 100)]
    return {
        "share_per_expert": [round(float(share), 4) for share in shares],
        "distinct_experts_per_100_tokens": round(float(np.mean(hundreds)), 1),
        "lru_hit_rate_25_percent": round(lru_hit_rate(choices, n_expert // 4), 4),
        "lru_hit_rate_50_percent": round(lru_hit_rate(choices, n_expert // 2), 4),
    }


class ReferenceModel:
    """Logits in float32; gathers what the feed-forward blocks did for the positions that were asked for."""

    def __init__(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self.config = FORMS[state["form"]]
        self.model = LanguageModel(self.config).eval()
        self.model.load_state_dict(state["model"])
        self.n_tokens = 0
        self.active = np.zeros(self.config.n_layer)
        self.choices: list[list[ExpertArray]] = [[] for _ in range(self.config.n_layer)]

    @torch.no_grad()
    def logits(self, tokens: list[int], first: int) -> FloatArray:
        """[len(tokens) - first, n_vocab]: the logits after each token from `first` on."""
        logits: FloatArray = self.model(torch.tensor([tokens]))[0, first:].numpy()
        self.n_tokens += len(tokens) - first
        for layer, block in enumerate(self.model.blocks):
            ffn = block.ffn
            if isinstance(ffn, ReluFeedForward) and ffn.rectified is not None:
                self.active[layer] += (ffn.rectified[0, first:] > 0).float().mean(-1).sum().item()
            elif isinstance(ffn, MoeFeedForward) and ffn.chosen is not None:
                self.choices[layer].append(ffn.chosen[first:].numpy())
        return logits

    def statistics(self) -> dict[str, Any]:
        if self.config.n_expert:
            return {
                "routing": [routing_statistics(np.concatenate(c), self.config.n_expert) for c in self.choices],
            }
        return {"active_share_per_layer": [round(float(a), 4) for a in self.active / self.n_tokens]}
