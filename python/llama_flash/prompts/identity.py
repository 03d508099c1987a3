"""What a state depends on beside its tokens: the model, the engine that computed it, and how its context was set."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..model.gguf import GgufMeta
from ..native.build import build_mark

__all__ = ["adapter_text", "identity_of", "label_of"]

# of llama_context_params: those that change what is computed, or how it lies in memory. Widths and threads change no
# bit (docs/explanation/width.md).
_PARAMETERS = (
    *("rope_scaling_type", "attention_type", "flash_attn_type", "pooling_type", "type_k", "type_v"),
    *("rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)
_SAMPLES, _SAMPLE = 64, 4096  # places of each file that are looked at, and bytes of each


def identity_of(meta: GgufMeta, context_params: Any, predictor: str, adapters: str, kind: object, block: int) -> bytes:
    """A hash of all of it. Two states with the same one and the same tokens are the same bytes.

    Args:
        context_params: llama_context_params.
        predictor: how active neurons are found.
        adapters: see adapter_text.
        kind: what a state consists of.

    Raises OSError: a file of the model is gone.
    """
    values = {name: getattr(context_params, name, None) for name in _PARAMETERS}
    # where the factors of rope depend on the length of the context
    if any(name.startswith("rope_factors") for name in meta.tensors):
        values["n_ctx"] = int(context_params.n_ctx) // max(1, int(context_params.n_seq_max))
    parts = [
        [_file_mark(path) for path in meta.files],
        build_mark(),
        {name: value if isinstance(value, int | float | None) else str(value) for name, value in values.items()},
        os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""),
        *(predictor, adapters, str(kind), block),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def label_of(meta: GgufMeta) -> str:
    """The model's name for people, by what its file says: it may be moved."""
    name = meta.values.get("general.name")
    return name if isinstance(name, str) and name else meta.architecture


def adapter_text(path: str | None, scale: float = 1.0) -> str:
    """Which adapter is applied, and how much of it."""
    return f"{_file_mark(Path(path))} {scale}" if path else ""


def _file_mark(path: Path) -> str:
    """Of a file as it is now, wherever it lies: size, time of its last change, head, and samples of all of it."""
    about = path.stat()
    mark = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode())
    with path.open("rb") as file:
        mark.update(file.read(1 << 20))
        for i in range(_SAMPLES):
            file.seek(about.st_size * i // _SAMPLES)
            mark.update(file.read(_SAMPLE))
    return mark.hexdigest()
