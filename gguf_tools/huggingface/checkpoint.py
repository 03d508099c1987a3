"""The weights of a checkpoint: which files hold them, and what is missing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from gguf_tools.errors import GgufToolsError
from gguf_tools.huggingface.config import read_json
from gguf_tools.huggingface.pickled import read_pickled
from gguf_tools.huggingface.safetensors import read_safetensors
from gguf_tools.source import SourceTensor


class Weight(Protocol):
    """A tensor of a checkpoint."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """The row length last."""
        ...

    def tensor(self, name: str) -> SourceTensor:
        """It as a SourceTensor of that name. Raises GgufToolsError if it is of a type that weights do not have."""
        ...


_Reader = Callable[[Path], Mapping[str, Weight]]
_FORMATS: tuple[tuple[str, _Reader], ...] = (
    ("model.safetensors", read_safetensors),
    ("pytorch_model.bin", read_pickled),
)


def read_weights(directory: Path) -> dict[str, Weight]:
    """The weights of a checkpoint, by name; none is read yet. Safetensors files go before pytorch_model.bin.

    Raises:
        GgufToolsError: there are no weights, files or tensors are missing or damaged.
        OSError: if a file cannot be opened.
    """
    for name, read in _FORMATS:
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read)
        if (directory / name).is_file():
            return dict(read(directory / name))
    if not directory.is_dir():
        raise GgufToolsError("is not a folder", file=directory)
    names = " or ".join(f"{name} or {name}.index.json" for name, _ in _FORMATS)
    raise GgufToolsError(f"holds no weights: there is no {names}", file=directory)


def _read_shards(index: Path, read: _Reader) -> dict[str, Weight]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) and _is_plain(name) for name in where.values()):
        raise GgufToolsError("has no weight_map from tensors to names of files", file=index)
    shards = sorted(set(where.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise GgufToolsError(f"{len(missing)} of {len(shards)} files are missing: {listed(missing)}", file=index)
    weights: dict[str, Weight] = {}
    for shard in shards:
        for name, weight in read(index.parent / shard).items():
            if where.get(name) != shard:
                raise GgufToolsError(f"is in {shard}, of which the index does not know", file=index, tensor=name)
            weights[name] = weight
    if absent := sorted(where.keys() - weights.keys()):
        raise GgufToolsError(f"tensors are in none of its files: {listed(absent)}", file=index)
    return weights


def _is_plain(name: str) -> bool:
    return bool(name) and name == Path(name).name


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
