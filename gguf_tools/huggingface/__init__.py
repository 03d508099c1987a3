"""Hugging Face checkpoints as models: safetensors (or pytorch_model.bin), config.json and tokenizer files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.format import Activation
from gguf_tools.huggingface.checkpoint import read_weights
from gguf_tools.huggingface.config import Config, read_json
from gguf_tools.huggingface.families import plan_for
from gguf_tools.huggingface.plan import make_tensors, string
from gguf_tools.huggingface.vocabulary import tokenizer_values
from gguf_tools.source import KeyValue, SourceTensor

__all__ = ["HuggingFaceSource", "open_huggingface"]


@dataclass(frozen=True)
class HuggingFaceSource:
    """A Source. Its tensors are of the checkpoint's types and are read when their rows are asked for."""

    directory: Path
    values: dict[str, KeyValue]
    tensors: dict[str, SourceTensor]
    activation: Activation | None  # None: it keeps every neuron active
    activation_name: str  # as config.json calls it
    ignored: tuple[str, ...]  # weights that are left out


def open_huggingface(directory: str | os.PathLike[str]) -> HuggingFaceSource:
    """Opens a checkpoint: a folder with config.json, weights and tokenizer.

    Raises:
        GgufToolsError: files or tensors are missing, damaged or of unknown use; the architecture is unknown; the engine
            would compute its activation, its positions or its tokens otherwise than they should be.
        OSError: if a file cannot be opened.
    """
    directory = Path(directory)
    file = directory / "config.json"
    config = Config(read_json(file), file)
    weights = read_weights(directory)
    plan = plan_for(config, weights)
    tensors, ignored = make_tensors(plan, weights, directory)
    values = {
        "general.architecture": string(plan.architecture),
        "general.type": string("model"),
        "general.name": string(directory.resolve().name),
        **plan.values,
        **(plan.activation.to_values(plan.architecture) if plan.activation else {}),
        **tokenizer_values(directory, plan.n_vocab),
    }
    return HuggingFaceSource(directory, values, tensors, plan.activation, plan.activation_name, ignored)
