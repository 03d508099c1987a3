"""LoRA adapters and neuron bundles: which neurons are active is found without the adapter."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import FlashError
from ..options import Predictor
from .bundles import Bundles
from .gguf import read_gguf

__all__ = ["predictor_with"]

_PART = re.compile(r"blk\.(\d+)\.ffn_(gate|up)(_exps)?\.weight\.lora_[ab]")


def predictor_with(lora_path: str | Path | None, bundles: Bundles, asked: Predictor) -> Predictor:
    """How active neurons may be found for a model with this adapter: "off" where it changes up or gate of a bundle.

    Raises:
        FlashError: `asked` is another way, which would leave out neurons that only the adapter makes active.
        FlashFormatError, OSError: the adapter cannot be read.
    """
    if not lora_path:
        return asked
    layers = {layer.layer for layer in bundles.layers}
    matches = (_PART.fullmatch(name) for name in read_gguf(lora_path).tensors)
    changed = sorted({int(match[1]) for match in matches if match} & layers)
    if not changed or asked == "off":
        return asked
    if asked == "auto":
        return "off"
    raise FlashError(
        f"predictor={asked!r}, but the LoRA adapter {lora_path} changes the feed-forward block of layer {changed[0]}, "
        "whose active neurons are found without it: choose 'off' or 'auto', or merge the adapter into the model"
    )
