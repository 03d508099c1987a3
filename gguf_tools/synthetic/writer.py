"""Writes a synthetic model: one GGUF file, or shards under llama.cpp's split naming."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from gguf_tools import ggml
from gguf_tools.synthetic import forms
from gguf_tools.synthetic.forms import Shape, Tensor
from gguf_tools.synthetic.routing import Skew
from gguf_tools.synthetic.tokenizer import add_tokenizer
from gguf_tools.synthetic.types import Types
from gguf_tools.synthetic.weights import BlockPool, rng_for
from gguf_tools.types import block_of
from llama_flash.whole_files import remove_abandoned, temporary_folder

_RESERVE = 256 << 20  # disk space left alone
_GROWTH = 0.35  # variance that a layer of these weights adds to the residual stream, measured

Progress = Callable[[int], None]  # bytes written since the last call


@dataclass(frozen=True)
class SyntheticModel:
    shape: Shape
    types: Types
    seed: int = 0
    popularity: float = 0.0  # 0: uniform routing; see Skew

    def tensor_bytes(self, tensor: Tensor) -> int:
        return int(np.prod(_byte_shape(tensor, self.types)))

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensor_bytes(tensor) for tensor in forms.tensors(self.shape))


def write(model: SyntheticModel, path: Path, *, n_shards: int = 1, progress: Progress | None = None) -> list[Path]:
    """Writes the model and returns its files, the first one to be loaded first.

    The files appear under their names only when they are complete. Raises OSError when the disk has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    free = shutil.disk_usage(path.parent).free
    if free < model.n_bytes + _RESERVE:
        raise OSError(
            f"{path}: needs {model.n_bytes / 1e9:.2f} GB and {_RESERVE >> 20} MiB to spare, "
            f"but {path.parent} has {free / 1e9:.2f} GB free"
        )
    todo = list(forms.tensors(model.shape))
    pool = BlockPool(model.seed, elements=1 << (18 if model.n_bytes < 64 << 20 else 21))
    with temporary_folder(path) as partial, _quiet_gguf():
        writer = gguf.GGUFWriter(
            partial / path.name,
            model.shape.arch,
            split_max_tensors=-(-len(todo) // n_shards) if n_shards > 1 else 0,
        )
        writer.add_name(f"synthetic {model.shape.form}")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        forms.add_metadata(writer, model.shape)
        add_tokenizer(writer, model.shape.n_vocab)
        for tensor in todo:
            writer.add_tensor_info(
                tensor.name,
                _byte_shape(tensor, model.types),
                np.dtype(np.uint8),
                model.tensor_bytes(tensor),
                raw_dtype=model.types.of(tensor),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in todo:
            data = _tensor_data(model, pool, tensor)
            writer.write_tensor_data(data)
            if progress:
                progress(data.nbytes)
        writer.close()
        written = sorted(partial.iterdir())
        return [file.replace(path.parent / file.name) for file in written]


def _byte_shape(tensor: Tensor, types: Types) -> tuple[int, ...]:
    elements, size = block_of(types.of(tensor))
    return (*tensor.shape[:-1], tensor.shape[-1] // elements * size)


def _tensor_data(model: SyntheticModel, pool: BlockPool, tensor: Tensor) -> npt.NDArray[np.uint8]:
    kind = model.types.of(tensor)
    if tensor.group == "f32":
        return _small_tensor(model, tensor).view(np.uint8)
    data = pool.tensor(tensor.name, tensor.shape, kind, tensor.gain / tensor.shape[-1] ** 0.5)
    if model.popularity and tensor.group == "embd":
        _skew(model, tensor).plant_embedding(data, model.shape.n_embd, kind)
    return data


def _small_tensor(model: SyntheticModel, tensor: Tensor) -> npt.NDArray[np.float32]:
    values = rng_for(model.seed, tensor.name).standard_normal(tensor.shape, dtype=np.float32)
    if not tensor.name.endswith("ffn_gate_inp.weight"):
        return np.asarray(tensor.mean + tensor.spread * values, np.float32)
    values /= np.float32(tensor.shape[-1] ** 0.5)
    if model.popularity:
        _skew(model, tensor).plant_router(values, tensor.layer, model.seed, _GROWTH)
    return values


def _skew(model: SyntheticModel, tensor: Tensor) -> Skew:
    return Skew(model.popularity, width=ggml.block_layout(model.types.embd)[0])


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    logger = logging.getLogger("gguf.gguf_writer")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
