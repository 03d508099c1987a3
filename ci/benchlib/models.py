"""The large synthetic models that are measured, written when they are needed and deleted afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gguf_tools.progress import byte_progress
from gguf_tools.synthetic import PRESETS, SKEWED, SyntheticModel, write


@dataclass(frozen=True)
class BenchModel:
    name: str
    title: str
    preset: str
    popularity: float = 0.0

    def synthetic(self, layers: int | None = None) -> SyntheticModel:
        model = PRESETS[self.preset]
        shape = replace(model.shape, n_layer=layers or model.shape.n_layer)
        return replace(model, shape=shape, popularity=self.popularity)

    def ensure(self, folder: Path, layers: int | None = None) -> Path:
        """Writes the model unless it is there. Raises OSError when the disk has no room."""
        model = self.synthetic(layers)
        path = folder / f"{self.name}-{model.shape.n_layer}l.gguf"
        if not path.exists():
            with byte_progress(f"writing {path.name}", model.n_bytes) as advance:
                write(model, path, progress=advance)
        return path


MOE_SKEWED = BenchModel(
    "moe-skewed", "12 layers of Qwen3-30B-A3B's shape, Q4_0, skewed routing", "qwen3-30b-a3b-12l", SKEWED
)
MOE_UNIFORM = BenchModel(
    "moe-uniform", "12 layers of Qwen3-30B-A3B's shape, Q4_0, uniform routing", "qwen3-30b-a3b-12l"
)
DENSE = BenchModel("dense-silu", "18 layers of Llama-2-7B's shape, Q8_0", "llama2-7b-18l")
