"""An order of neurons in which those that are needed together lie together, and what it saves.

Neighbours in a file are read at once. A token that needs m neurons, p pairs of which are neighbours, makes m - p reads,
so the best order is the path through all neurons whose edges, weighted with how often their ends are needed together,
weigh most. It is built greedily, as Ripple does (Wang et al. 2024): heaviest edge first, unless an end has two already
or a circle would close; only each neuron's strongest partners are looked at, and of the paths that come out, the ends
again, until no two ends are needed together. Nothing here knows files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.activations import Bits, Numbers, unpacked

_PARTNERS = 64  # of each neuron
_OPERATIONS = 2e12  # of the products that count co-activations; more tokens are left out
_FEWEST_TOKENS = 2048
_ELEMENTS = 1 << 24  # worked on at a time


@dataclass(frozen=True)
class Reads:
    """What tokens read from a file, means per token."""

    neurons: float
    reads: float  # runs of neighbours
    merged_reads: float  # where a run may have gaps of one neuron, which is read too

    @property
    def run_length(self) -> float:
        """Neurons of a read."""
        return self.neurons / self.reads if self.reads else 0.0

    @property
    def merged_run_length(self) -> float:
        """Needed neurons of a merged read."""
        return self.neurons / self.merged_reads if self.merged_reads else 0.0


def order_by_coactivation(sets: Bits, n_ff: int) -> Numbers:
    """The neuron that comes first, second, ...: [n_ff]. Neurons that are never needed come last.

    sets: what is needed at the same time, [tokens, ceil(n_ff / 8)].
    """
    most = max(_FEWEST_TOKENS, int(_OPERATIONS / (2 * n_ff**2)))
    chosen = np.unique(np.linspace(0, len(sets) - 1, min(len(sets), most)).astype(np.int64))
    needed = unpacked(sets[chosen], n_ff)
    chain = _Chain(n_ff)
    ends = np.flatnonzero(needed.any(axis=0))
    while len(ends) > 1 and chain.join(*_strongest_pairs(needed[:, ends].astype(np.float32), ends)):
        ends = ends[chain.n_partners[ends] < 2]
    return chain.order(needed.sum(axis=0))


def count_reads(sets: Bits, n_ff: int, order: Numbers | None = None) -> Reads:
    """order: of the neurons in the file; None: that of the sets. sets: [tokens, ceil(n_ff / 8)]."""
    neurons = reads = merged = 0
    step = max(1, _ELEMENTS // n_ff)
    for start in range(0, len(sets), step):
        needed = unpacked(sets[start : start + step], n_ff)
        if order is not None:
            needed = needed[:, order]
        neurons += int(np.count_nonzero(needed))
        begins = needed.copy()
        begins[:, 1:] &= ~needed[:, :-1]
        reads += int(np.count_nonzero(begins))
        begins[:, 2:] &= ~needed[:, :-2]
        merged += int(np.count_nonzero(begins))
    return Reads(neurons / len(sets), reads / len(sets), merged / len(sets))


def _strongest_pairs(needed: npt.NDArray[np.float32], names: Numbers) -> tuple[Numbers, Numbers]:
    """Pairs of neurons that are needed together, the most frequent ones first. needed: [tokens, len(names)]."""
    count = needed.shape[1]
    kept = min(_PARTNERS, count - 1)
    firsts, seconds, weights = [], [], []
    step = max(1, _ELEMENTS // count)
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count))
        together = needed[:, rows].T @ needed
        together[np.arange(len(rows)), rows] = 0
        partners = np.argpartition(together, count - kept, axis=1)[:, count - kept :]
        strength = np.take_along_axis(together, partners, axis=1)
        firsts.append(np.repeat(rows, kept)[strength.ravel() > 0])
        seconds.append(partners.ravel()[strength.ravel() > 0])
        weights.append(strength[strength > 0])
    first, second, weight = np.concatenate(firsts), np.concatenate(seconds), np.concatenate(weights)
    low, high = np.minimum(first, second), np.maximum(first, second)
    best = np.lexsort((high, low, -weight))  # ties in the order of the neurons, so that it is always the same one
    return names[low[best]], names[high[best]]


class _Chain:
    """Neurons joined to paths."""

    def __init__(self, n: int) -> None:
        self.n_partners: npt.NDArray[np.int8] = np.zeros(n, np.int8)
        self._partners: list[list[int]] = [[] for _ in range(n)]
        self._other_end = list(range(n))  # of a path, at its ends

    def join(self, firsts: Numbers, seconds: Numbers) -> int:
        """Joins the pairs in their order where both are ends of different paths. Returns how many it joined."""
        joined = 0
        n_partners, partners, other_end = self.n_partners, self._partners, self._other_end
        for a, b in zip(firsts.tolist(), seconds.tolist(), strict=True):
            if len(partners[a]) == 2 or len(partners[b]) == 2 or other_end[a] == b:
                continue
            partners[a].append(b)
            partners[b].append(a)
            n_partners[a] += 1
            n_partners[b] += 1
            left, right = other_end[a], other_end[b]
            other_end[left], other_end[right] = right, left
            joined += 1
        return joined

    def order(self, popularity: npt.NDArray[np.int64]) -> Numbers:
        """All paths one after the other, those of popular neurons first."""
        ends = [n for n in range(len(self._partners)) if len(self._partners[n]) < 2 and n <= self._other_end[n]]
        paths = [self._walk(end) for end in ends]
        paths.sort(key=lambda path: -float(popularity[path].mean()))
        return np.array([neuron for path in paths for neuron in path], np.int64)

    def _walk(self, end: int) -> list[int]:
        path, before = [end], -1
        while True:
            following = [n for n in self._partners[path[-1]] if n != before]
            if not following:
                return path
            before = path[-1]
            path.append(following[0])
