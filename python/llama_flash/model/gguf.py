"""What a model holds, without its tensor data: the heads of a GGUF file, or of all its shards.

Long arrays (the vocabulary) are skipped, so that a file with 150 000 tokens takes a fraction of a second.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FlashFormatError
from .head import GET_ANEW, SkippedArray, TensorInfo, Value, as_stored, read_head

__all__ = [
    "MOST_LAYERS",
    "GgufMeta",
    "SkippedArray",
    "TensorInfo",
    "check_is_model",
    "check_vocabulary",
    "claims_wide_heads",
    "read_gguf",
    "shard_paths",
]

MOST_LAYERS = 512  # of the engine: LLAMA_MAX_LAYERS
_MOST_SHARDS = (1 << 16) - 1  # of a uint16

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_WIDTHS = ("attention.key_length", "attention.value_length")
_OTHER_FILES = {  # general.type: what it is, and what to do with it
    "adapter": ("a LoRA adapter", "name the model that it is for, and this file as lora_path"),
    "mmproj": ("the part of a model that looks at images", "name the model's own file"),
    "imatrix": ("an importance matrix", "it is for quantising a model: name the model's file"),
}


@dataclass(frozen=True)
class GgufMeta:
    """A model: one GGUF file, or all of its shards."""

    files: tuple[Path, ...]
    values: dict[str, Value]  # of the first file
    tensors: dict[str, TensorInfo]
    file_bytes: int  # all shards, without what is behind the last tensor of each
    types: dict[str, str] = field(default_factory=dict)  # of the values: "uint32", "string[]"

    @property
    def architecture(self) -> str:
        value = self.values.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: int = 0) -> int:
        """Whole number of "{architecture}.{key}"; the largest one where it is given per layer."""
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            return max((v for v in value if isinstance(v, int)), default=default)
        return int(value) if isinstance(value, int) else default

    def per_layer(self, key: str, n_layer: int, default: int = 0) -> list[int]:
        """Whole numbers of "{architecture}.{key}" for each layer, whether it is given once or per layer.

        n_layer: as a file says it; of more than the engine can have, that many.
        """
        n_layer = min(n_layer, MOST_LAYERS)
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and len(value) >= n_layer:
            return [int(v) if isinstance(v, int) else default for v in value[:n_layer]]
        return [self.number(key, default)] * n_layer

    @property
    def n_vocab(self) -> int:
        tokens = self.values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, SkippedArray):
            return tokens.length
        return len(tokens) if isinstance(tokens, list) else self.number("vocab_size")


def shard_paths(path: str | os.PathLike[str]) -> list[Path]:
    """All shards of the model whose first (or only) file is `path`, by their names.

    Raises:
        FlashFormatError: if a shard is missing, or `path` is not the first.
    """
    file = Path(path)
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match[3])
    if int(match[2]) != 1 or count < 1:
        raise _not_first(file, int(match[2]), count)
    shards = [file.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise FlashFormatError(f"{len(missing)} of {count} shards are missing, the first is {missing[0]}", file=file)
    return shards


def check_vocabulary(meta: GgufMeta, *, text: bool = True) -> None:
    """Refuses a model without a vocabulary, which the engine ends the process for.

    text: it is to take or give text; else only what the engine cannot even load is refused.

    Raises FlashFormatError.
    """
    file, kind = meta.files[0], meta.values.get("tokenizer.ggml.model")
    if kind is None:
        raise FlashFormatError(
            f"{file}: has no vocabulary (the key tokenizer.ggml.model is missing): the engine cannot load it; convert "
            "the model again, with its tokenizer"
        )
    if kind == "none" and text:
        raise FlashFormatError(
            f"{file}: has no vocabulary (tokenizer.ggml.model is none), so it takes tokens and no text; in Python "
            "Llama.eval and Llama.generate do that"
        )


def read_gguf(path: str | os.PathLike[str]) -> GgufMeta:
    """Reads key-values and tensor infos of the model that begins with file `path`.

    What only the engine can judge (whether it knows the architecture, whether all tensors are there) is not judged
    here: see planning.dry_run.check_model.

    Raises:
        FlashFormatError: not GGUF, no ordinary file, damaged, cut off within head or data, shards missing, or not the
            first shard.
        OSError: if a file cannot be read.
    """
    files = [Path(path)]
    values: dict[str, Value] = {}
    types: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    file_bytes = 0
    for index in range(_MOST_SHARDS):
        file = files[index]
        head = read_head(file)
        file_bytes += max((info.offset + info.size for info in head.tensors), default=head.file_bytes)
        if index == 0:
            values, types = head.values, head.types
            files = _shards(file, values)
        for info in head.tensors:
            if info.name in tensors and as_stored(info.name):
                raise FlashFormatError("is there twice", file=file, tensor=info.name, mend=GET_ANEW)
            tensors[info.name] = info
        if index + 1 == len(files):
            break
    return GgufMeta(tuple(files), values, tensors, file_bytes, types)


def check_is_model(meta: GgufMeta) -> None:
    """Refuses GGUF files that hold something else than a model.

    Raises:
        FlashFormatError: with what it is, and what it is for.
    """
    kind = meta.values.get("general.type", "model")
    if isinstance(kind, str) and kind in _OTHER_FILES and "token_embd.weight" not in meta.tensors:
        what, mend = _OTHER_FILES[kind]
        raise FlashFormatError(f"{meta.files[0]}: is no model but {what}", mend=mend)
    if not meta.tensors:
        raise FlashFormatError(
            f"{meta.files[0]}: holds no weights, a vocabulary at most",
            mend="name the model's file; Llama(vocab_only=True) loads this one for its vocabulary",
        )


def claims_wide_heads(meta: GgufMeta) -> bool:
    """Whether heads, one or all of a token, are said to be wider than any weight of a layer.

    A KV cache of that width can be enormous. Some architectures do not look at the keys; where they count, the engine
    allocates the cache before it finds that the weights do not fit.
    """
    widest = max((n for tensor in meta.tensors.values() if tensor.layer is not None for n in tensor.shape), default=0)
    n_head = max(1, meta.number("attention.head_count"))
    together = meta.number("attention.head_count_kv", n_head)
    default = meta.number("embedding_length") // n_head
    return any(max(1, together) * meta.number(key, default) > widest for key in _WIDTHS)


def _shards(file: Path, values: dict[str, Value]) -> list[Path]:
    """All shards of the model with that first file. As in the engine, the head decides about that, not the name."""
    count, number = values.get("split.count", 0), values.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or count <= 1:
        return [file]
    if number != 0:
        raise _not_first(file, number + 1, count)
    match = _SHARD.fullmatch(file.name)
    if match is None or int(match[3]) != count:
        raise FlashFormatError(
            f"{file}: is the first of {count} shards, but not named so (...-00001-of-{count:05d}.gguf)",
            mend="shards that were joined byte by byte, or renamed, cannot be loaded: keep them as they are, side by "
            "side, and name the first; gguf-split --merge joins them",
        )
    return shard_paths(file)


def _not_first(file: Path, number: int, count: int) -> FlashFormatError:
    match = _SHARD.fullmatch(file.name)
    first = (
        f"{match[1]}-00001-of-{match[3]}.gguf" if match else f"the one whose name ends in -00001-of-{count:05d}.gguf"
    )
    said = f"is shard {number} of {count}, not the first"
    return FlashFormatError(said, file=file, mend=f"load the first one: {first}")
