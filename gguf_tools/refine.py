"""Improves a predictor by gradient descent.

The loss is what a wrong decision costs. To predict a neuron costs a read; to leave it out costs its share of the
token's mass, in units of the share that is worth a read. So a neuron is wanted where that *worth* is above 1, and its
logistic loss is weighted with the difference that the decision makes. Deja Vu's loss (Liu et al. 2023: positives weigh
1, negatives the share of positives) counts every active neuron alike, however little it contributes: started from the
closed form, it ends with more neurons for the same mass. The predictor is two matrices: the gradient is written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.activations import LayerActivations
from gguf_tools.observe import Floats
from gguf_tools.predictors import Predictor, per_token

EPOCHS = 6
_BATCH = 512  # tokens
_RATE = 0.02  # of each matrix's root mean square; falls linearly to 0
_HEAVIEST = 1000.0  # weight of a single decision
_SEED = 0


def refined(start: Predictor, layer: LayerActivations, norms: Floats, bound: float, epochs: int = EPOCHS) -> Predictor:
    """Adam on the layer's tokens, from `start` on.

    norms: ||down_i||, [n_ff]. bound: the share of a token's mass that is worth predicting a neuron. The thresholds that
    come out are near those for any recall, not at them: calibrate them again.
    """
    matrices = [start.input.copy(), start.output.copy(), start.bias.copy()]
    first, second, bias = matrices
    rates = [_RATE * float(np.sqrt(np.square(matrix).mean())) for matrix in (first, second)] + [_RATE]
    adam = [_Adam(matrix, rate) for matrix, rate in zip(matrices, rates, strict=True)]
    batches = -(-layer.n_tokens // _BATCH)
    random = np.random.default_rng(_SEED)
    for epoch in range(epochs):
        for number, tokens in enumerate(np.array_split(random.permutation(layer.n_tokens), batches)):
            inputs = layer.inputs[tokens].astype(np.float32)
            projected = inputs @ first.T
            error = _error(projected @ second.T + bias, per_token(layer.magnitudes(tokens) * norms) / bound)
            gradients = [(error @ second).T @ inputs, error.T @ projected, error.sum(axis=0)]
            left = 1 - (epoch * batches + number) / (epochs * batches)
            for one, gradient in zip(adam, gradients, strict=True):
                one.step(gradient, left)
    return Predictor(first, second, bias)


def _error(margins: Floats, worth: Floats) -> Floats:
    """The loss's gradient with respect to the margins: [tokens, n_ff]."""
    gain = np.clip(worth - 1, -1, _HEAVIEST)
    probability = 0.5 * (1 + np.tanh(0.5 * margins))
    error: Floats = np.abs(gain) * probability - np.maximum(gain, 0)
    error /= np.float32(len(margins))
    return error


@dataclass
class _Adam:
    """Kingma and Ba 2015. Changes the matrix in place."""

    matrix: Floats
    rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        self._mean = np.zeros_like(self.matrix)
        self._square = np.zeros_like(self.matrix)
        self._steps = 0

    def step(self, gradient: npt.NDArray[np.float32], left: float) -> None:
        """left: share of the rate that is in force."""
        self._steps += 1
        self._mean += (1 - self.beta1) * (gradient - self._mean)
        self._square += (1 - self.beta2) * (np.square(gradient) - self._square)
        mean = self._mean / (1 - self.beta1**self._steps)
        deviation = np.sqrt(self._square / (1 - self.beta2**self._steps)) + self.epsilon
        self.matrix -= self.rate * left * mean / deviation
