"""Low-rank predictors of the neurons that a token needs, in closed form.

What lives here: the arithmetic on arrays. Not here: which rank is worth it (fitting.py), descent (refine.py).

The number whose sign decides about a neuron is (nearly) linear in the block's input x: t = w . x + b. Its best
approximation of rank r, in the mean square over the inputs seen, is the truncated singular value decomposition of
W C^(1/2), C being the covariance of x; the mean of x goes into the bias and costs no rank. What is left over of neuron
i has the standard deviation sigma_i, and for all the predictor knows, t is drawn from a normal distribution around the
score s_i. So the *mass* that the neuron contributes, |value| * ||down_i||, is to be expected as

    E_i = scale_i * sigma_i^p * f_p(s_i / sigma_i),    f_p(z) = E[max(z + N(0, 1), 0)^p],    p = 1 (relu) or 2 (relu2),

and a neuron is predicted active where E_i exceeds one bound per layer: no other rule keeps as much mass with as few
neurons. The bound is the one that keeps the wanted share of the mass on tokens that were not fitted. Every token counts
the same: mass is divided by the token's own, or a few tokens with huge activations would decide alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LOGIT = 1.702  # the logistic function of 1.702 z is close to the normal distribution's at z
_SMALLEST_DEVIATION = 1e-3  # of a neuron's own: float16 inputs and quantised products are no better
_BLOCK = 1 << 22  # elements worked on at a time
_NOTHING = 80.0  # a bound, as margin or logarithm, that nothing exceeds


@dataclass(frozen=True)
class Target:
    """What decides whether the neurons of a layer are active: t = weights x + bias, up to `noise`."""

    weights: Floats  # [n_ff, n_embd]
    bias: Floats  # [n_ff]
    noise: Floats  # [n_ff]: variance that a linear function does not explain
    scale: Floats  # [n_ff]: mass of the neuron where t = 1
    power: int  # the mass grows as this power of t: 1 or 2


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a layer's inputs."""

    mean: Floats  # [n_embd]
    covariance: Floats  # [n_embd, n_embd], shrunk

    @classmethod
    def of(cls, inputs: npt.NDArray[np.float16]) -> Moments:
        """inputs: [tokens, n_embd]. The covariance is shrunk to a multiple of the identity (Ledoit and Wolf 2004)."""
        n_tokens, n_embd = inputs.shape
        mean = inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
        total = np.zeros((n_embd, n_embd), np.float64)
        fourth = 0.0
        for rows in _runs(n_tokens, n_embd):
            centred = inputs[rows].astype(np.float32) - mean
            total += centred.T @ centred
            fourth += float((np.square(centred).sum(axis=1, dtype=np.float64) ** 2).sum())
        covariance = total / n_tokens
        level = float(np.trace(covariance)) / n_embd
        spread = float(np.square(covariance).sum()) - n_embd * level**2
        error = (fourth / n_tokens - float(np.square(covariance).sum())) / n_tokens
        shrinkage = min(1.0, max(1e-4, error / spread)) if spread > 0 else 1.0
        covariance *= 1 - shrinkage
        covariance[np.diag_indices(n_embd)] += shrinkage * level + np.finfo(np.float32).tiny
        return cls(mean, covariance.astype(np.float32))


@dataclass(frozen=True)
class Predictor:
    """Neuron i is predicted active where margin_i = output_i . (input x) + bias_i > 0."""

    input: Floats  # [rank, n_embd]
    output: Floats  # [n_ff, rank]
    bias: Floats  # [n_ff]

    @property
    def rank(self) -> int:
        return len(self.input)

    def margins(self, inputs: npt.NDArray[np.float16]) -> Floats:
        """inputs: [tokens, n_embd]; returns [tokens, n_ff]."""
        scores: Floats = (inputs.astype(np.float32) @ self.input.T) @ self.output.T
        scores += self.bias
        return scores

    def shifted(self, margin: float) -> Predictor:
        """The predictor that predicts what this one has margins above `margin` for."""
        return Predictor(self.input, self.output, self.bias - np.float32(margin))


@dataclass(frozen=True)
class Factors:
    """The best approximations of a target of every rank up to the largest: the first r columns, rows are rank r's."""

    target: Target
    mean: Floats  # [n_embd]
    input: Floats  # [rank, n_embd]: makes x - mean uncorrelated numbers of variance 1
    output: Floats  # [n_ff, rank]
    centre: Floats  # [n_ff]: mean of t
    variance: Floats  # [n_ff]: of t

    @classmethod
    def of(cls, target: Target, moments: Moments, max_rank: int) -> Factors:
        lower = np.linalg.cholesky(moments.covariance.astype(np.float64))
        whitened = target.weights @ lower.astype(np.float32)  # [n_ff, n_embd]
        _, vectors = np.linalg.eigh(whitened.T @ whitened)
        vectors = np.ascontiguousarray(vectors[:, ::-1][:, :max_rank])
        return cls(
            target=target,
            mean=moments.mean,
            input=np.linalg.solve(lower.T, vectors).T.astype(np.float32),
            output=whitened @ vectors,
            centre=target.weights @ moments.mean + target.bias,
            variance=np.square(whitened).sum(axis=1) + target.noise,
        )

    def deviation(self, rank: int) -> Floats:
        """[n_ff]: standard deviation of what rank `rank` leaves over."""
        left = self.variance - np.square(self.output[:, :rank]).sum(axis=1)
        floor = _SMALLEST_DEVIATION**2 * self.variance + np.finfo(np.float32).tiny
        deviation: Floats = np.sqrt(np.maximum(left, floor))
        return deviation

    def log_mass(self, scores: Floats, neurons: npt.NDArray[np.int64], rank: int) -> Floats:
        """Logarithms of the mass to be expected of neurons with these scores. scores, neurons: [entries]."""
        deviation = self.deviation(rank)
        z, log_f = _log_expectation(self.target.power)
        expected: Floats = np.interp(scores / deviation[neurons], z, log_f).astype(np.float32)
        expected += self._log_unit(deviation)[neurons]
        return expected

    def thresholds(self, rank: int, log_bound: float) -> Floats:
        """[n_ff]: the scores above which more mass than the bound is to be expected."""
        deviation = self.deviation(rank)
        z, log_f = _log_expectation(self.target.power)
        scores: Floats = (np.interp(log_bound - self._log_unit(deviation), log_f, z) * deviation).astype(np.float32)
        return scores

    def predictor(self, rank: int, log_bound: float) -> Predictor:
        """Predicts the neurons of which more mass than the bound is to be expected. Margins are logits."""
        slope = LOGIT / self.deviation(rank)
        output = self.output[:, :rank] * slope[:, None]
        bias = slope * (self.centre - self.thresholds(rank, log_bound)) - output @ (self.input[:rank] @ self.mean)
        return Predictor(np.ascontiguousarray(self.input[:rank]), output, bias.astype(np.float32))

    def _log_unit(self, deviation: Floats) -> Floats:
        scale = np.maximum(self.target.scale, np.finfo(np.float32).tiny)
        unit: Floats = np.log(scale) + self.target.power * np.log(deviation)
        return unit


@dataclass(frozen=True)
class Tradeoff:
    """What the closed form of some rank makes of tokens that it was not fitted to."""

    rank: int
    log_bound: float  # of the mass to be expected, so that the wanted share is kept
    predicted: npt.NDArray[np.uint8]  # [tokens, ceil(n_ff / 8)]: the predicted neurons, packed


def ranks_up_to(max_rank: int) -> list[int]:
    """Multiples of 32 in steps of a third to a half: 32, 64, 96, 128, 192, 256, 384, ..."""
    ranks = [32, 64, 96]
    while ranks[-1] < max_rank:
        ranks.append(ranks[-2] * 2)
    return [rank for rank in ranks if rank <= max_rank]


def tradeoffs(
    factors: Factors, inputs: npt.NDArray[np.float16], mass: Floats, recall: float, ranks: Sequence[int]
) -> Iterator[Tradeoff]:
    """For each rank, in rising order, the neurons that have to be predicted. mass: [tokens, n_ff]."""
    projected = (inputs.astype(np.float32) - factors.mean) @ factors.input.T
    active = mass > 0
    weights, neurons = per_token(mass)[active], np.nonzero(active)[1]
    scores = np.tile(factors.centre, (len(inputs), 1))
    done = 0
    for rank in ranks:
        scores += projected[:, done:rank] @ factors.output[:, done:rank].T
        done = rank
        bound = bound_for(factors.log_mass(scores[active], neurons, rank), weights, recall)
        yield Tradeoff(rank, bound, np.packbits(scores > factors.thresholds(rank, bound), axis=1))


def recalibrated(predictor: Predictor, inputs: npt.NDArray[np.float16], mass: Floats, recall: float) -> Predictor:
    """Shifts all thresholds alike so that the wanted share of the mass is kept. mass: [tokens, n_ff]."""
    margins, active = predictor.margins(inputs), mass > 0
    return predictor.shifted(bound_for(margins[active], per_token(mass)[active], recall))


def bound_for(scores: Floats, weights: Floats, recall: float) -> float:
    """The largest number that is below scores of `recall` of the weight. scores, weights: [entries]."""
    if not len(scores):
        return _NOTHING
    order = np.argsort(scores)[::-1]
    kept = np.cumsum(weights[order], dtype=np.float64)
    last = min(int(np.searchsorted(kept, recall * kept[-1])), len(order) - 1)
    return float(np.nextafter(scores[order[last]], np.float32(-np.inf)))


def per_token(mass: Floats) -> Floats:
    """Each token's mass as a share of its own: [tokens, n_ff]."""
    totals = mass.sum(axis=1, keepdims=True)
    shares: Floats = np.divide(mass, totals, out=np.zeros_like(mass), where=totals > 0)
    return shares


@cache
def _log_expectation(power: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A table of z and log f_p(z), rising."""
    low, middle, high = np.arange(-30, -8, 0.02), np.arange(-8, 8, 0.005), np.geomspace(8, 1e8, 400)
    density = np.exp(-(middle**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in middle])
    # the first terms of the asymptotic series: f_1 ~ density / z^2, f_2 ~ 2 density / |z|^3
    log_density = -(low**2) / 2 - math.log(2 * math.pi) / 2
    if power == 1:
        tail = log_density - 2 * np.log(-low)
        values = density + middle * below
    else:
        tail = log_density + math.log(2) - 3 * np.log(-low)
        values = (middle**2 + 1) * below + middle * density
    log_f = np.maximum.accumulate(np.concatenate([tail, np.log(values), power * np.log(high)]))
    return np.concatenate([low, middle, high]), log_f


def _runs(n_rows: int, columns: int) -> list[slice]:
    step = max(1, _BLOCK // columns)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
