"""pytorch_model.bin files: tensors that torch maps into memory. Needs torch, which is not otherwise needed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from gguf_tools import ggml
from gguf_tools.errors import GgufToolsError
from gguf_tools.source import Bytes, Floats, SourceTensor
from gguf_tools.types import row_bytes

_TYPES = {
    "torch.float32": GGMLQuantizationType.F32,
    "torch.float16": GGMLQuantizationType.F16,
    "torch.bfloat16": GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class PickledTensor:
    """A SourceTensor that is a torch tensor."""

    name: str
    kind: GGMLQuantizationType
    data: Any  # torch.Tensor of two dimensions or less

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self.data.shape))

    def raw(self, start: int, stop: int) -> Bytes:
        rows = self.data.reshape(-1, self.data.shape[-1])[start:stop]
        return _bytes_of(rows, row_bytes(self.kind, self.shape[0]))

    def floats(self, start: int, stop: int) -> Floats:
        return ggml.dequantize(self.raw(start, stop), self.kind)

    def raw_columns(self, start: int, stop: int) -> Bytes:
        columns = self.data.reshape(-1, self.data.shape[-1])[:, start:stop]
        return _bytes_of(columns, row_bytes(self.kind, stop - start))


def _bytes_of(rows: Any, n_bytes: int) -> Bytes:
    torch = importlib.import_module("torch")
    out: Bytes = rows.contiguous().view(torch.uint8).numpy()
    return out.reshape(len(rows), n_bytes)


@dataclass(frozen=True)
class PickledWeight:
    """A `Weight` (checkpoint.py) in a pytorch_model.bin."""

    name: str
    data: Any  # torch.Tensor
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.data.shape)

    def tensor(self, name: str) -> SourceTensor:
        kind = _TYPES.get(str(self.data.dtype))
        if kind is None:
            raise GgufToolsError(f"is of type {self.data.dtype}", file=self.file, tensor=self.name)
        return PickledTensor(name, kind, self.data)


def read_pickled(path: Path) -> dict[str, PickledWeight]:
    """The tensors of a file, by name; none is read yet. Nothing but tensors is unpickled.

    Raises:
        GgufToolsError: torch is not installed, or cannot read the file.
        OSError: if the file cannot be opened.
    """
    path.open("rb").close()
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise GgufToolsError(
            "needs torch to be read, which is not installed (pip install torch); "
            "a checkpoint in safetensors files needs nothing",
            file=path,
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        said = str(error).partition("\n")[0]
        raise GgufToolsError(f"torch cannot read it: {said}", file=path) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise GgufToolsError("does not hold tensors by name", file=path)
    return {str(name): PickledWeight(str(name), data.detach(), path) for name, data in state.items()}
