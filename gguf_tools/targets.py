"""What decides whether the neurons of a layer are active, for each activation of docs/reference/format.md.

A neuron without a gate is active where up's output is positive, one with a gate where the gate's is: linear functions
of the block's input, known exactly. Where both have to be positive (drelu), the smaller of the two decides, each in
units of its deviation; its best linear approximation is fitted to the inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gguf_tools.observe import Floats
from gguf_tools.predictors import Moments, Target
from gguf_tools.sparse_model import SparseModel

_BLOCK = 1 << 22  # elements worked on at a time
_POWERS = {"relu": 1, "relu2": 2, "reglu": 1, "fatrelu": 1, "drelu": 2}


def target_of(model: SparseModel, il: int, norms: Floats, moments: Moments, inputs: npt.NDArray[np.float16]) -> Target:
    """norms: ||down_i||, [n_ff]. inputs: those that the moments are of, [tokens, n_embd]."""
    power = _POWERS[model.activation.name]
    up, up_bias = model.linear(il, "up")
    if "gate" not in model.layers[il].parts:
        return Target(up, up_bias, np.zeros_like(norms), norms, power)
    gate, gate_bias = model.linear(il, "gate")
    if model.activation.name == "drelu":
        return _smaller_of((gate, gate_bias), (up, up_bias), norms, moments, inputs)
    usual_up = np.sqrt(_variance(up, moments) + np.square(up @ moments.mean + up_bias))
    threshold = np.float32(model.activation.threshold or 0.0)
    return Target(gate, gate_bias - threshold, np.zeros_like(norms), norms * usual_up, power)


def _variance(weights: Floats, moments: Moments) -> Floats:
    """Of each output of a linear map: [n_ff]."""
    variance: Floats = ((weights @ moments.covariance) * weights).sum(axis=1)
    np.maximum(variance, np.finfo(np.float32).tiny, out=variance)
    return variance


def _smaller_of(
    gate: tuple[Floats, Floats],
    up: tuple[Floats, Floats],
    norms: Floats,
    moments: Moments,
    inputs: npt.NDArray[np.float16],
) -> Target:
    deviations = [np.sqrt(_variance(weights, moments)) for weights, _ in (gate, up)]
    (first, first_bias), (second, second_bias) = (
        (weights / deviation[:, None], bias / deviation)
        for (weights, bias), deviation in zip((gate, up), deviations, strict=True)
    )
    n_ff, n_embd = first.shape
    cross = np.zeros((n_ff, n_embd), np.float32)
    total, squares = np.zeros(n_ff), np.zeros(n_ff)
    step = max(1, _BLOCK // n_ff)
    for start in range(0, len(inputs), step):
        x = inputs[start : start + step].astype(np.float32)
        smaller = np.minimum(x @ first.T + first_bias, x @ second.T + second_bias)
        cross += smaller.T @ (x - moments.mean)
        total += smaller.sum(axis=0)
        squares += np.square(smaller).sum(axis=0)
    weights = np.linalg.solve(moments.covariance, cross.T / len(inputs)).T.astype(np.float32)
    mean = (total / len(inputs)).astype(np.float32)
    variance = (squares / len(inputs)).astype(np.float32) - np.square(mean)
    noise = np.maximum(variance - _variance(weights, moments), 0)
    return Target(weights, mean - weights @ moments.mean, noise, norms * deviations[0] * deviations[1], power=2)
