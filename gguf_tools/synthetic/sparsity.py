"""Plants activation statistics into the feed-forward layers of a synthetic ReLU model.

A neuron fires when its input's code lies in its direction, beyond its threshold, up to noise that no code explains:

    u_i(x) = signal * (direction_i . code(x)) + noise * (noise_i . x) - threshold_i        with variance 1

How often each neuron fires follows a power law: few hot neurons, many cold ones. A predictor that knows the directions
has the rank of the codes; its thresholds are lower by a margin, which buys recall with neurons predicted in vain.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from gguf_tools.source import Floats
from gguf_tools.synthetic.codes import WIDTH
from gguf_tools.synthetic.weights import rng_for

_NORMAL = NormalDist()
_GROUP = 64  # neurons that share a part of their direction, and so tend to fire together


@dataclass(frozen=True)
class Sparsity:
    """What is planted. The defaults follow OPT 6.7B in "LLM in a flash" (arXiv 2312.11514v3, B.1 and C.1)."""

    first: float = 0.03  # share of the neurons that fire, in the first layer
    last: float = 0.10  # and in the last one
    power: float = 0.8  # a neuron's rate falls with its rank to this power
    hottest: float = 0.95  # highest rate of a neuron
    noise: float = 0.2  # standard deviation of the part that the predictor cannot know
    margin: float = 0.8  # of the predictor, in units of the noise: misses 5 % of what fires, 1 % of its mass
    together: float = 0.9  # share of a direction's variance that a group of neurons has in common

    def __post_init__(self) -> None:
        if not (0 < self.first < self.hottest and 0 < self.last < self.hottest < 1):
            raise ValueError(f"need 0 < first, last < hottest < 1, got {self.first}, {self.last}, {self.hottest}")

    def active_share(self, il: int, n_layer: int) -> float:
        """Rises slowly at first: most layers are nearer to the first than to the last."""
        depth = il / max(n_layer - 1, 1)
        return float(self.first * (self.last / self.first) ** depth**2)


@dataclass(frozen=True)
class Plan:
    """Neurons of one layer, in their order in the file."""

    rates: Floats  # [n_ff]: share of the tokens for which each fires
    directions: Floats  # [n_ff, WIDTH], of length 1
    thresholds: Floats  # [n_ff]
    order: npt.NDArray[np.int64]  # [n_ff]: which neuron of the seed's own order is where

    @property
    def output_power(self) -> float:
        """Expected sum of the neurons' squared values."""
        t = self.thresholds.astype(np.float64)
        density = np.exp(-(t**2) / 2) / (2 * np.pi) ** 0.5
        return float(((1 + t**2) * self.rates - t * density).sum())


def plan(sparsity: Sparsity, il: int, n_layer: int, n_ff: int, seed: int, *, coactive: bool) -> Plan:
    """coactive: neurons that fire together lie together, hot ones first; else their order is random."""
    rng = rng_for(seed, f"neurons {il}")
    rates = rng.permutation(_power_law(n_ff, sparsity.active_share(il, n_layer), sparsity.power, sparsity.hottest))
    group = rng.integers(0, max(n_ff // _GROUP, 1), n_ff)
    centres = rng.standard_normal((int(group.max()) + 1, WIDTH), dtype=np.float32)
    directions = sparsity.together**0.5 * centres[group]
    directions += (1 - sparsity.together) ** 0.5 * rng.standard_normal(directions.shape, dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    order = _by_coactivity(rates, group, centres) if coactive else np.arange(n_ff)
    rates, directions = rates[order], directions[order]
    thresholds = np.array([-_NORMAL.inv_cdf(rate) for rate in rates])
    return Plan(rates.astype(np.float32), directions.astype(np.float32), thresholds.astype(np.float32), order)


def _power_law(n: int, mean: float, power: float, highest: float) -> npt.NDArray[np.float64]:
    """`n` rates that fall with their rank, cut off at `highest`, with the given mean."""
    by_rank = ((np.arange(n) + 0.5) / n) ** -power
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.minimum(highest, middle * by_rank).mean() > mean:
            high = middle
        else:
            low = middle
    return np.minimum(highest, low * by_rank)


def _by_coactivity(
    rates: npt.NDArray[np.float64], group: npt.NDArray[np.int64], centres: Floats
) -> npt.NDArray[np.int64]:
    """Hot neurons first, which fire with everything; then group after group, each followed by the most alike."""
    unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    rank = np.empty(len(unit), np.int64)
    left = np.ones(len(unit), bool)
    here = 0
    for position in range(len(unit)):
        rank[here], left[here] = position, False
        here = int(np.where(left, unit @ unit[here], -2.0).argmax())
    hot = rates > 0.25
    return np.lexsort((-rates, np.where(hot, -1, rank[group])))
