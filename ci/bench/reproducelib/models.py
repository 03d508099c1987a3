"""The model of the reproduction: layers of OPT 6.7B's shape with planted statistics, in the layouts that rungs need."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gguf_tools.synthetic.codes import token_stream
from gguf_tools.synthetic.opt import OptModel
from gguf_tools.synthetic.opt_cli import OPT_PRESETS
from gguf_tools.synthetic.opt_writer import Layout, opt_bytes, write_opt

WHOLE_LAYERS, WHOLE_VOCAB = 32, 50272  # of OPT 6.7B
File = Literal["plain", "split", "bundled", "reordered"]  # reordered: bundled, co-active neurons side by side
FILES: tuple[File, ...] = ("plain", "split", "bundled", "reordered")
_SPARE = 2 << 30  # bytes of disk left alone when several layouts are kept at once


@dataclass(frozen=True)
class ReproducedModel:
    n_layer: int
    n_vocab: int
    folder: Path

    @property
    def model(self) -> OptModel:
        preset = OPT_PRESETS["opt-6.7b-slice"]
        return replace(preset, shape=replace(preset.shape, n_layer=self.n_layer, n_vocab=self.n_vocab))

    @property
    def title(self) -> str:
        layers = f"{self.n_layer} of {WHOLE_LAYERS} layers"
        return f"OPT 6.7B's shape, {layers}, vocabulary {self.n_vocab}, f16, {self.n_bytes / 1e9:.2f} GB, synthetic"

    @property
    def n_bytes(self) -> int:
        return opt_bytes(self.model)

    def path(self, file: File) -> Path:
        return self.folder / f"opt-{self.n_layer}l-{self.n_vocab}v-{file}.gguf"

    def ensure(self, file: File) -> Path:
        """Writes the file unless it is there. Raises GgufToolsError when the disk has no room."""
        path = self.path(file)
        if not path.exists():
            layout: Layout = "bundled" if file == "reordered" else file
            model = replace(self.model, coactive=file == "reordered")
            write_opt(model, path, layout, progress=f"writing {path.name}")
        return path

    def remove(self, file: File) -> None:
        self.path(file).unlink(missing_ok=True)

    def has_room_for_all(self) -> bool:
        """Whether the disk can hold all files at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = sum(not self.path(file).exists() for file in FILES)
        return shutil.disk_usage(self.folder).free > missing * opt_bytes(self.model, "bundled") + _SPARE

    def stream_file(self, folder: Path) -> Path:
        """Tokens to decode, the same for all runs."""
        path = folder / "stream.json"
        path.write_text(json.dumps(token_stream(self.model.shape.n_ctx, self.n_vocab)))
        return path
