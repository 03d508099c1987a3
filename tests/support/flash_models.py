"""A small model in the flash format, in memory: bundles, predictors and an ordinary layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from dense_models import ArraySource, ArrayTensor, dense_model, raw_tensor, tensor
from gguf import GGMLQuantizationType as K

from gguf_tools import FLASH
from gguf_tools.format import BundleLayout, PredictorInfo, bias_name, weight_name

N_EMBD, N_FF, RANK = 64, 96, 8
RNG = np.random.default_rng(0)
F32 = np.float32


def flash_model() -> ArraySource:
    """Two layers in bundles with predictors and biases, the third one ordinary."""
    source = dense_model(n_layer=3, n_embd=N_EMBD, n_ff=N_FF, kind=K.Q8_0, biases=True)
    bundle = BundleLayout.of({"gate": K.Q8_0, "up": K.Q8_0, "down": K.Q4_0}, N_EMBD)
    source = replace(source, values=source.values | bundle.to_values() | PredictorInfo((RANK, 0, 0), 0.99).to_values())
    for il in range(2):
        source = source.without(*(weight_name(il, part) for part in ("gate", "up", "down")))
        source = source.with_tensors(raw_tensor(weight_name(il, "bundle"), (bundle.record_bytes, N_FF), FLASH, RNG))
    return source.with_tensors(*predictor(0))


def predictor(il: int, n_embd: int = N_EMBD, rank: int = RANK, n_ff: int = N_FF, kind: K = K.F16) -> list[ArrayTensor]:
    return [
        tensor(weight_name(il, "predictor_in"), np.zeros((rank, n_embd), F32), kind),
        tensor(weight_name(il, "predictor_out"), np.zeros((n_ff, rank), F32), K.F32),
        tensor(bias_name(il, "predictor"), np.zeros(n_ff, F32)),
    ]
