"""Random weights of any ggml type, at disk speed.

A pool of blocks is quantised once per type and scale with ggml's own code; a tensor is a random draw of blocks from it.
So every row, expert and tensor differs, all types look as ggml writes them, and nothing is quantised twice.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_tools import ggml

Bytes = npt.NDArray[np.uint8]


def rng_for(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each tensor, so that a tensor does not depend on the ones before it."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


@dataclass
class BlockPool:
    seed: int
    elements: int  # floats quantised per pool
    _pools: dict[tuple[GGMLQuantizationType, float], Bytes] = field(default_factory=dict)

    def blocks(self, kind: GGMLQuantizationType, sigma: float) -> Bytes:
        """[blocks, bytes per block] of N(0, sigma^2)."""
        key = (kind, float(f"{sigma:.4g}"))
        if key not in self._pools:
            per_block, _ = ggml.block_layout(kind)
            values = rng_for(self.seed, f"{kind.name} {sigma:.4g}").standard_normal(
                (max(self.elements // per_block, 1024), per_block), dtype=np.float32
            )
            self._pools[key] = ggml.quantize(values * np.float32(sigma), kind)
        return self._pools[key]

    def tensor(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, sigma: float) -> Bytes:
        """Bytes of a tensor, [..., bytes per row]; shape's last dimension is the row."""
        per_block, size = ggml.block_layout(kind)
        blocks = self.blocks(kind, sigma)
        n_rows, per_row = int(np.prod(shape[:-1])), shape[-1] // per_block
        out = np.empty((n_rows * per_row, size), np.uint8)
        rng = rng_for(self.seed, name)
        whole = np.dtype((np.void, size))  # a block as one item is copied two to four times as fast as its bytes
        pool, drawn = blocks.view(whole)[:, 0], out.view(whole)[:, 0]
        step = 1 << 20  # bounds the index array
        for start in range(0, len(drawn), step):
            part = drawn[start : start + step]
            np.take(pool, rng.integers(0, len(pool), len(part)), out=part, mode="clip")
        return out.reshape(*shape[:-1], per_row * size)
