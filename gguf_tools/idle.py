"""Neurons that say nothing: those behind a model's own whose columns of down are zero, as an inflated model has them.

What lives here: where two models differ by nothing but such neurons, and the wider one without them. What makes them is
in synthetic/inflate.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from gguf_tools import ggml
from gguf_tools.source import Bytes, Floats, SourceTensor, raw_row_bytes, row_blocks, row_count
from gguf_tools.types import fits, row_bytes

# a layer's feed-forward block, or its experts: 1 layer, 2 part, 3 which kind of block, 4 what of the part
FFN = re.compile(r"(blk\.\d+)\.ffn_(gate_up|gate|up|down)(_exps|_shexp|_chexps|)\.(weight|bias|scale|input_scale)")

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class LeadingRows:
    """The first `n` of each `wide` rows of a matrix: gate or up without the neurons behind."""

    tensor: SourceTensor
    n: int
    wide: int

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[0], self.tensor.shape[1] // self.wide * self.n, *self.tensor.shape[2:])

    @property
    def kind(self) -> GGMLQuantizationType:
        return self.tensor.kind

    def raw(self, start: int, stop: int) -> Bytes:
        runs = [np.empty((0, raw_row_bytes(self)), np.uint8)]
        while start < stop:
            matrix, row = divmod(start, self.n)
            end = min(stop, (matrix + 1) * self.n)
            first = matrix * self.wide + row
            runs.append(self.tensor.raw(first, first + end - start))
            start = end
        return np.concatenate(runs)

    def floats(self, start: int, stop: int) -> Floats:
        return ggml.dequantize(self.raw(start, stop), self.kind)


@dataclass(frozen=True)
class LeadingColumns:
    """The first `n` of each `wide` elements of all rows: down, or a bias, without the neurons behind."""

    tensor: SourceTensor
    n: int
    wide: int

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[0] // self.wide * self.n, *self.tensor.shape[1:])

    @property
    def kind(self) -> GGMLQuantizationType:
        return self.tensor.kind

    def raw(self, start: int, stop: int) -> Bytes:
        rows = self.tensor.raw(start, stop)
        parts = rows.reshape(len(rows), self.tensor.shape[0] // self.wide, -1)
        return parts[:, :, : row_bytes(self.kind, self.n)].reshape(len(rows), -1)

    def floats(self, start: int, stop: int) -> Floats:
        return ggml.dequantize(self.raw(start, stop), self.kind)


@dataclass(frozen=True)
class Widened:
    """What of the wider model is to be seen in place of its tensors, and by how much it is wider."""

    tensors: dict[str, SourceTensor]
    n_ff: int  # of the narrower model
    wide: int
    down: str  # name


def widened(narrow: Mapping[str, SourceTensor], wide: Mapping[str, SourceTensor]) -> list[Widened]:
    """The feed-forward blocks of which `wide` has more neurons, all those behind with columns of zeros in down.

    Raises GgufToolsError if a file is cut off.
    """
    blocks: dict[tuple[str, str], list[str]] = {}
    for name in wide:
        if match := FFN.fullmatch(name):
            blocks.setdefault((match[1], match[3]), []).append(name)
    found = []
    for (layer, suffix), names in blocks.items():
        name = f"{layer}.ffn_down{suffix}.weight"
        down, other = wide.get(name), narrow.get(name)
        if down is None or other is None or down.shape[1:] != other.shape[1:] or down.shape[0] <= other.shape[0]:
            continue
        n, n_wide = other.shape[0], down.shape[0]
        if fits(down.kind, n) and _says_nothing_from(down, n):
            found.append(Widened(_without(wide, names, n, n_wide), n, n_wide, name))
    return found


def _without(tensors: Mapping[str, SourceTensor], names: Sequence[str], n: int, wide: int) -> dict[str, SourceTensor]:
    views: dict[str, SourceTensor] = {}
    for name in names:
        tensor, match = tensors[name], FFN.fullmatch(name)
        assert match
        if match[2] == "down":
            if match[4] == "weight":
                views[name] = LeadingColumns(tensor, n, wide)
        elif match[4] == "weight" and tensor.shape[1] % wide == 0:
            views[name] = LeadingRows(tensor, n, wide)
        elif match[4] == "bias" and tensor.shape[0] % wide == 0:
            views[name] = LeadingColumns(tensor, n, wide)
    return views


def _says_nothing_from(down: SourceTensor, first: int) -> bool:
    runs = row_blocks(row_count(down), _FLOAT * down.shape[0])
    return not any(down.floats(rows.start, rows.stop)[:, first:].any() for rows in runs)
