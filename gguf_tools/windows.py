"""How much of a layer the last tokens use: what a sliding window over active sets would hold and load.

Windows count the tokens before the current one. Sets are packed bits, [tokens, ceil(n_ff / 8)], of sequences that lie
one after the other and are equally long; no window reaches over the begin of a sequence.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from gguf_tools.activations import Bits, count_bits

LONGEST = 16


def window_curve(active: Bits, sequence: int, n_ff: int, longest: int = LONGEST) -> list[float]:
    """s_agg(k) for k = 0 to `longest`: distinct neurons of a token and the k before it, as a share of all."""
    union = active.reshape(-1, sequence, active.shape[1]).copy()
    longest = min(longest, sequence - 1)
    curve = []
    for k in range(longest + 1):
        if k:
            union[:, k:] |= active.reshape(union.shape)[:, : sequence - k]
        curve.append(_share(union[:, longest:], n_ff))
    return curve


def reads_within(curve: list[float], room: float) -> float:
    """Share of the neurons that a token loads where slots hold a share `room` of them. curve: s_agg(0), s_agg(1), ...

    The k tokens before the current one take s_agg(k - 1) of the slots, and s_agg(k) - s_agg(k - 1) is to be loaded; in
    between, and below one token's own neurons, linear.
    """
    held = [0.0, *curve[:-1]]
    loaded = [curve[0], *(after - before for before, after in pairwise(curve))]
    return float(np.interp(max(room, 0.0), held, loaded))


def newly_active(active: Bits, sequence: int, n_ff: int, window: int) -> float:
    """Share of a layer's neurons that a token uses and none of the `window` tokens before it does."""
    return _share(newly_active_sets(active, sequence, window).reshape(-1, sequence, active.shape[1])[:, window:], n_ff)


def newly_active_sets(active: Bits, sequence: int, window: int) -> Bits:
    """Of each token, the neurons that none of the `window` tokens before it uses: packed like `active`."""
    sets = active.reshape(-1, sequence, active.shape[1])
    before = np.zeros_like(sets)
    for k in range(1, min(window, sequence - 1) + 1):
        before[:, k:] |= sets[:, : sequence - k]
    return (sets & ~before).reshape(active.shape)


def _share(sets: Bits, n_ff: int) -> float:
    return int(count_bits(sets).sum(dtype=np.int64)) / int(sets.shape[0] * sets.shape[1] * n_ff)
