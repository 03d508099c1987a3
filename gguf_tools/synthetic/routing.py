"""Plants routing statistics into a synthetic mixture of experts.

Uniform: router rows are random, so each token picks its experts alike. Skewed: all embeddings share a component, and
the router's rows have a random share of it, so that some experts are popular in every context and the rest depends on
the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_tools import ggml
from gguf_tools.synthetic.weights import rng_for

COMMON_SHARE = 0.5  # norm of the shared component, as a share of the rest of an embedding


@dataclass(frozen=True)
class Skew:
    popularity: float  # standard deviation of the experts' popularity, in units of the token-dependent part
    width: int  # columns that carry the shared component: one block of the embedding's type

    def pattern(self, n_embd: int) -> npt.NDArray[np.float32]:
        """The component that all embeddings share: [width]."""
        signs = np.where(np.arange(self.width) % 3 == 0, -1, 1)
        return np.asarray(signs * COMMON_SHARE * (n_embd / self.width) ** 0.5, np.float32)

    def plant_embedding(self, rows: npt.NDArray[np.uint8], n_embd: int, kind: GGMLQuantizationType) -> None:
        """Overwrites the first block of each embedding row, in place."""
        block = ggml.quantize(self.pattern(n_embd)[None, :], kind)[0]
        rows[:, : len(block)] = block

    def plant_router(self, rows: npt.NDArray[np.float32], il: int, seed: int, growth: float) -> None:
        """Gives each expert its popularity, in place. growth: what a layer adds to the residual stream's variance."""
        n_expert, n_embd = rows.shape
        pattern = self.pattern(n_embd)
        variance = 1 + COMMON_SHARE**2 + growth * (il + 0.5)
        # the normed hidden state's inner product with the pattern
        strength = float(pattern @ pattern) / variance**0.5
        popularity = rng_for(seed, f"popularity {il}").standard_normal(n_expert) * self.popularity
        rows[:, : self.width] = np.outer(popularity / strength, pattern)
