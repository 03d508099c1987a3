"""Which neurons tokens use: how many, how many in a longer window, how many new ones, and what a predictor sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.source import Floats

Active = npt.NDArray[np.bool_]  # [tokens, n_ff]

WINDOWS = 8  # longest window, in previous tokens


@dataclass(frozen=True)
class LayerActivity:
    """Of one layer over a stream of tokens. Shares are of the layer's neurons, means over the tokens."""

    active: float
    newly_active: tuple[float, ...]  # by window 0, 1, ...: used by a token and by none of so many tokens before it
    predicted: float | None  # None: the layer has no predictor, nor what follows
    newly_predicted: tuple[float, ...] | None
    recall: float | None  # share of the active neurons that were predicted
    recall_of_mass: float | None  # the same, each weighted with its value

    @property
    def aggregated(self) -> tuple[float, ...]:
        """s_agg(k) for k = 1, 2, ...: share of the neurons that k tokens in a row use."""
        return aggregated(self.newly_active)

    @property
    def aggregated_predicted(self) -> tuple[float, ...] | None:
        return aggregated(self.newly_predicted) if self.newly_predicted is not None else None


def layer_activity(values: Floats, predicted: Active | None, *, skip: int = 16) -> LayerActivity:
    """values: what the activation function gives, [tokens, n_ff]. skip: first tokens that do not count."""
    active = values != 0
    kept = slice(skip, None)
    newly = newly_used(active, skip=skip)
    if predicted is None:
        return LayerActivity(float(active[kept].mean()), newly, None, None, None, None)
    found = active[kept] & predicted[kept]
    mass = values[kept].sum(dtype=np.float64)
    return LayerActivity(
        active=float(active[kept].mean()),
        newly_active=newly,
        predicted=float(predicted[kept].mean()),
        newly_predicted=newly_used(predicted, skip=skip),
        recall=float(found.sum() / max(active[kept].sum(), 1)),
        recall_of_mass=float((values[kept] * found).sum(dtype=np.float64) / max(mass, 1e-30)),
    )


def newly_used(used: Active, *, windows: int = WINDOWS, skip: int = 0) -> tuple[float, ...]:
    """For windows of 0 to `windows` previous tokens: the share of neurons that a token uses and none in the window did.

    The first `skip` tokens, and at least as many as the longest window has, fill the windows only.
    """
    n_tokens, n_ff = used.shape
    skip = max(skip, windows)
    if n_tokens <= skip:
        raise ValueError(f"{n_tokens} tokens are too few: the first {skip} do not count")
    last = np.full(n_ff, -(1 << 30))
    counts = np.zeros(windows + 1)
    for i, neurons in enumerate(used):
        if i >= skip:
            before = i - 1 - last[neurons]  # tokens in between
            counts += (np.minimum(before, windows)[:, None] >= np.arange(windows + 1)).sum(axis=0)
        last[neurons] = i
    return tuple(float(count) for count in counts / (n_ff * (n_tokens - skip)))


def aggregated(newly: tuple[float, ...]) -> tuple[float, ...]:
    """s_agg(k), k = 1, 2, ...: a token adds to the window before it what is new to it (the paper's section 3.1)."""
    return tuple(float(total) for total in np.cumsum(newly))
