"""LoRA adapters and neuron bundles: which neurons are active is found without the adapter."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import FlashError, FlashFormatError
from ..options import Predictor
from .bundles import Bundles, read_bundles
from .gguf import GgufMeta, read_gguf

__all__ = ["check_adapter", "predictor_with"]

_PAIR = re.compile(r"(.+)\.lora_[ab]")
_PART = re.compile(r"blk\.(\d+)\.ffn_(gate|up)(_exps)?\.weight\.lora_[ab]")


def check_adapter(path: str | Path, model: GgufMeta) -> None:
    """Raises FlashFormatError where the file is no adapter, or is one of another model; OSError: it cannot be read."""
    adapter = read_gguf(path)
    if adapter.values.get("general.type") != "adapter":
        raise FlashFormatError(f"{path}: not a LoRA adapter", mend="convert_lora_to_gguf.py makes them")
    architecture = adapter.values.get("general.architecture")
    if architecture != model.architecture:
        raise FlashFormatError(
            f"{path}: an adapter for {architecture}, the model is {model.architecture}", mend="name the one for it"
        )
    bundles = read_bundles(model)
    known = {*model.tensors, *(bundles.part_names() if bundles else ())}
    adapted = {match[1] for match in map(_PAIR.fullmatch, adapter.tensors) if match}
    if unknown := sorted(adapted - known):
        raise FlashFormatError(f"{path}: adapts {unknown[0]}, which the model has not", mend="name one that is for it")


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
