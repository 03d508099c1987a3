"""The large models that are measured, written when they are needed and deleted afterwards.

Synthetic ones have the shape of a real model and random weights; inflated ones have a small real model's answers.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import realmodel
from gguf import GGMLQuantizationType

from gguf_tools.progress import byte_progress
from gguf_tools.synthetic import PRESETS, SKEWED, SyntheticModel, inflate, types_named, write
from gguf_tools.synthetic.codes import token_stream
from gguf_tools.synthetic.opt import OptModel
from gguf_tools.synthetic.opt_cli import OPT_PRESETS
from gguf_tools.synthetic.opt_writer import opt_bytes, write_opt


@dataclass(frozen=True)
class Files:
    """What is written of a model."""

    flash: Path  # for flash offload
    stock: Path  # for naive and resident runs; caps are shares of its size
    stream: Path | None = None  # tokens to decode, or prompts

    def remove(self) -> None:
        for path in {self.flash, self.stock, self.stream} - {None}:
            path.unlink(missing_ok=True)  # type: ignore[union-attr]


class BenchModel(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def is_moe(self) -> bool: ...
    def n_bytes(self, layers: int | None = None) -> int:
        """Bytes of the stock file, but for its head."""
        ...

    def missing_bytes(self, folder: Path, layers: int | None = None) -> int:
        """Bytes that `ensure` would write."""
        ...

    def ensure(self, folder: Path, layers: int | None = None) -> Files:
        """Writes the files unless they are there: `layers` of them; an inflated model is small then.

        Raises OSError or GgufToolsError when the disk has no room.
        """
        ...


@dataclass(frozen=True)
class OrdinaryModel:
    name: str
    title: str
    preset: str
    popularity: float = 0.0
    quantisation: str = ""  # of all matrices; "": the preset's

    def synthetic(self, layers: int | None = None) -> SyntheticModel:
        model = PRESETS[self.preset]
        shape = replace(model.shape, n_layer=layers or model.shape.n_layer)
        types = model.types
        if self.quantisation:
            kind = GGMLQuantizationType[self.quantisation]
            types = replace(types_named(self.quantisation), attn=kind, embd=kind, output=kind)
        return replace(model, shape=shape, types=types, popularity=self.popularity)

    @property
    def is_moe(self) -> bool:
        return bool(self.synthetic().shape.is_moe)

    def n_bytes(self, layers: int | None = None) -> int:
        return self.synthetic(layers).n_bytes

    def _path(self, folder: Path, layers: int | None) -> Path:
        return folder / f"{self.name}-{self.synthetic(layers).shape.n_layer}l.gguf"

    def missing_bytes(self, folder: Path, layers: int | None = None) -> int:
        return 0 if self._path(folder, layers).exists() else self.n_bytes(layers)

    def ensure(self, folder: Path, layers: int | None = None) -> Files:
        model, path = self.synthetic(layers), self._path(folder, layers)
        if not path.exists():
            with byte_progress(f"writing {path.name}", model.n_bytes) as advance:
                write(model, path, progress=advance)
        return Files(path, path)


@dataclass(frozen=True)
class ReluModel:
    """OPT with planted statistics: bundles with predictors, co-active neurons side by side; and as stock reads it."""

    name: str
    title: str
    kind: GGMLQuantizationType
    n_layer: int = 8
    n_vocab: int = 12568  # a quarter: with 8 of 32 layers, all parts keep their shares

    is_moe = False

    def synthetic(self, layers: int | None = None) -> OptModel:
        preset = OPT_PRESETS["opt-6.7b-slice"]
        shape = replace(preset.shape, n_layer=layers or self.n_layer, n_vocab=self.n_vocab)
        return replace(preset, shape=shape, kind=self.kind, coactive=True)

    def n_bytes(self, layers: int | None = None) -> int:
        return opt_bytes(self.synthetic(layers), "plain")

    def _files(self, folder: Path, layers: int | None) -> Files:
        base = f"{self.name}-{layers or self.n_layer}l"
        return Files(folder / f"{base}-flash.gguf", folder / f"{base}.gguf", folder / f"{base}.stream.json")

    def missing_bytes(self, folder: Path, layers: int | None = None) -> int:
        model, files = self.synthetic(layers), self._files(folder, layers)
        flash = 0 if files.flash.exists() else opt_bytes(model, "bundled")
        return flash + (0 if files.stock.exists() else opt_bytes(model, "plain"))

    def ensure(self, folder: Path, layers: int | None = None) -> Files:
        model, files = self.synthetic(layers), self._files(folder, layers)
        if not files.flash.exists():
            write_opt(model, files.flash, "bundled", progress=f"writing {files.flash.name}")
        if not files.stock.exists():
            write_opt(model, files.stock, "plain", progress=f"writing {files.stock.name}")
        assert files.stream is not None
        files.stream.write_text(json.dumps(token_stream(model.shape.n_ctx, self.n_vocab)))
        return files


@dataclass(frozen=True)
class InflatedModel:
    """A real model, with neurons that say nothing: its text and its routing, and the bytes of a larger one."""

    name: str
    title: str
    is_moe: bool
    source: Callable[[], Path]
    prompts: Callable[[], list[str]]
    size: int = 4 * 10**9  # bytes

    def n_bytes(self, layers: int | None = None) -> int:
        return self.size if layers is None else _INFLATED_QUICK

    def _files(self, folder: Path, layers: int | None) -> Files:
        base = f"{self.name}-{self.n_bytes(layers) // 10**6}mb"
        return Files(folder / f"{base}.gguf", folder / f"{base}.gguf", folder / f"{base}.prompts.json")

    def missing_bytes(self, folder: Path, layers: int | None = None) -> int:
        return 0 if self._files(folder, layers).flash.exists() else self.n_bytes(layers)

    def ensure(self, folder: Path, layers: int | None = None) -> Files:
        files = self._files(folder, layers)
        folder.mkdir(parents=True, exist_ok=True)
        if not files.flash.exists():
            inflate(self.source(), files.flash, self.n_bytes(layers), progress=f"writing {files.flash.name}")
        assert files.stream is not None
        files.stream.write_text(json.dumps(self.prompts()))
        return files

    @property
    def text(self) -> str:
        """What it is asked."""
        return "\n".join(self.prompts())


def check_room(models: Sequence[BenchModel], folder: Path, layers: int | None, *, keep: bool) -> None:
    """Before anything is written. Models are written one after the other, and deleted in between unless kept.

    Raises OSError where the disk has no room for them.
    """
    missing = [model.missing_bytes(folder, layers) for model in models]
    needed = sum(missing) if keep else max(missing, default=0)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed and free < needed + _SPARE:
        raise OSError(
            f"{folder}: the models need {needed / 1e9:.1f} GB and {_SPARE >> 30} GiB to spare, "
            f"but the disk has {free / 1e9:.1f} GB free; --models takes another folder"
        )


def _code() -> list[str]:
    """Beginnings of functions, of the standard library's modules that the shipped model was not trained on."""
    prompts = []
    for name in ("ast", "base64", "fileinput", "random", "traceback"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text()
        begin = source.index("\ndef ", len(source) // 4) + 1
        prompts.append(source[begin : begin + 240])
    return prompts


def _chat() -> list[str]:
    """Questions in SmolLM2's chat template."""
    return [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in _QUESTIONS]


_INFLATED_QUICK = 10**9  # bytes
_SPARE = 1 << 30  # bytes of the disk that are left alone
_SHIPPED_MOE = Path(__file__).resolve().parents[3] / "python/llama_flash/models/stdlib-moe-q8_0.gguf"
_QUESTIONS = (
    "How does a bicycle stay upright?",
    "Write a short letter to a friend about a week at the sea.",
    "What is the difference between a virus and a bacterium?",
    "Explain to a child why the sky is blue.",
    "Give me a recipe for a simple tomato soup.",
    "Why did the Roman Empire fall?",
)


def _moe(name: str, popularity: float, routing: str, quantisation: str = "") -> OrdinaryModel:
    title = f"12 layers of Qwen3-30B-A3B's shape, {quantisation or 'Q4_0'}, {routing} routing"
    return OrdinaryModel(name, title, "qwen3-30b-a3b-12l", popularity, quantisation)


_OPT = "8 of 32 layers of OPT 6.7B's shape"
MOE_SKEWED = _moe("moe-skewed", SKEWED, "skewed")
MOE_UNIFORM = _moe("moe-uniform", 0.0, "uniform")
MOE_K_SKEWED = _moe("moe-k-skewed", SKEWED, "skewed", "Q4_K")
MOE_K_UNIFORM = _moe("moe-k-uniform", 0.0, "uniform", "Q4_K")
DENSE = OrdinaryModel("dense-silu", "18 layers of Llama-2-7B's shape, Q8_0", "llama2-7b-18l")
DENSE_Q4 = OrdinaryModel("dense-q4", "18 layers of Llama-2-7B's shape, Q4_0", "llama2-7b-18l", 0.0, "Q4_0")
DENSE_GQA = OrdinaryModel("dense-gqa", "16 layers of Llama-3-8B's shape, Q4_0", "llama3-8b-16l", 0.0, "Q4_0")
MOE_REAL = InflatedModel(
    "moe-real", "the shipped mixture (3 layers, 4 of 32 experts, Q8_0), inflated", True, lambda: _SHIPPED_MOE, _code
)
MOE_REAL_16 = replace(MOE_REAL, name="moe-real-16", size=16 * 10**9)
QWEN3_30B = OrdinaryModel("qwen3-30b-a3b", "Qwen3-30B-A3B's shape, Q4_K_M, skewed routing", "qwen3-30b-a3b", SKEWED)
GPT_OSS_120B = OrdinaryModel("gpt-oss-120b", "gpt-oss-120b's shape, MXFP4, skewed routing", "gpt-oss-120b", SKEWED)
DENSE_REAL = InflatedModel("dense-real", "SmolLM2 135M (30 layers, Q4_1), inflated", False, realmodel.ensure, _chat)
RELU = ReluModel("relu-f16", f"{_OPT}, f16", GGMLQuantizationType.F16)
RELU_WHOLE = ReluModel("relu-f16-whole", "OPT 6.7B's shape, f16", GGMLQuantizationType.F16, 32, 50272)
RELU_Q8 = ReluModel("relu-q8", f"{_OPT}, Q8_0", GGMLQuantizationType.Q8_0)
