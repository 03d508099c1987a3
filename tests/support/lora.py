"""A random LoRA adapter for a model, as llama.cpp reads it (src/llama-adapter.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np


def write_lora(model: Path, adapter: Path, names: Sequence[str], rank: int = 4) -> None:
    """Adapts the named tensors of `model`. A tensor of experts gets a pair of matrices per expert."""
    reader = gguf.GGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(adapter, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for tensor in reader.tensors:
        if tensor.name in names:
            n_in, n_out, *experts = (int(n) for n in tensor.shape)
            for suffix, shape in (("lora_a", (*experts, rank, n_in)), ("lora_b", (*experts, n_out, rank))):
                values = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
                writer.add_tensor(f"{tensor.name}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
