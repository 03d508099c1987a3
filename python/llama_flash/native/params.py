"""What the plugin is told of a model, in plain values, and the structures of the C interface that are made of it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..options import FlashOffload
from . import bindings

__all__ = ["ACTIVATIONS", "Bytes", "Memory", "Mode", "NeuronBundle", "NeuronPredictor", "Requirements", "neuron_params"]

Bytes = npt.NDArray[np.uint8]
Mode = Literal["exact", "lowrank", "off"]  # how the active neurons of bundles are found
Requirements = bindings.llama_flash_requirements  # what the flash tensors need
Memory = bindings.llama_flash_memory  # how it is divided

_MODES = {
    "exact": bindings.llama_flash_neuron_mode.LLAMA_FLASH_NEURONS_EXACT,
    "lowrank": bindings.llama_flash_neuron_mode.LLAMA_FLASH_NEURONS_LOWRANK,
    "off": bindings.llama_flash_neuron_mode.LLAMA_FLASH_NEURONS_OFF,
}
ACTIVATIONS = {
    "relu": bindings.llama_flash_activation.LLAMA_FLASH_RELU,
    "relu2": bindings.llama_flash_activation.LLAMA_FLASH_RELU2,
    "reglu": bindings.llama_flash_activation.LLAMA_FLASH_RELU,
    "fatrelu": bindings.llama_flash_activation.LLAMA_FLASH_FATRELU,
    "drelu": bindings.llama_flash_activation.LLAMA_FLASH_DRELU,
}
_NO_WINDOW = 0xFFFFFFFF
_MERGE_GAP = 1.0  # of a record: what a read may cover without need to reach the next neuron
_NO_PART = -1

_Floats = ctypes.POINTER(ctypes.c_float)


@dataclass(frozen=True)
class NeuronPredictor:
    """Of one layer's active neurons; the arrays are the tensors' bytes."""

    rank: int
    in_type: int  # enum ggml_type
    out_type: int
    matrix_in: Bytes
    matrix_out: Bytes
    bias: Bytes


@dataclass(frozen=True)
class NeuronBundle:
    """One layer's neuron bundles: a dense block's, or its experts'. The arrays are the tensors' bytes."""

    layer: int
    n_ff: int  # neurons, of one expert
    n_embd: int  # elements of a part
    activation: str  # of ACTIVATIONS
    threshold: float  # of fatrelu
    split: bool
    n_expert: int  # 0: a dense block
    n_expert_used: int
    record_bytes: int
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # gate, up, down: enum ggml_type, byte offset
    up_bias: Bytes | None = None
    gate_bias: Bytes | None = None
    predictor: NeuronPredictor | None = None

    def as_struct(self) -> bindings.llama_flash_bundle:
        """Points at the arrays: valid as long as this is."""
        raw = bindings.llama_flash_bundle(
            layer=self.layer,
            n_ff=self.n_ff,
            n_embd=self.n_embd,
            activation=ACTIVATIONS[self.activation],
            threshold=self.threshold,
            split=self.split,
            n_expert=self.n_expert,
            n_expert_used=self.n_expert_used,
            record_bytes=self.record_bytes,
        )
        raw.gate.type = _NO_PART
        for name, (kind, offset) in self.parts.items():
            part = getattr(raw, name)
            part.type, part.offset = kind, offset
        if self.up_bias is not None:
            raw.up_bias = _floats(self.up_bias)
        if self.gate_bias is not None:
            raw.gate_bias = _floats(self.gate_bias)
        if (predictor := self.predictor) is not None:
            raw.predictor_rank = predictor.rank
            raw.predictor_in_type, raw.predictor_out_type = predictor.in_type, predictor.out_type
            raw.predictor_in, raw.predictor_out = predictor.matrix_in.ctypes.data, predictor.matrix_out.ctypes.data
            raw.predictor_bias = _floats(predictor.bias)
        return raw


def neuron_params(
    mode: Mode, options: FlashOffload, record_bytes: int, n_ubatch: int
) -> bindings.llama_flash_neuron_params:
    """How bundles with records of so many bytes are computed."""
    return bindings.llama_flash_neuron_params(
        mode=_MODES[mode],
        window=_NO_WINDOW if options.window is None else options.window,
        n_ubatch=max(n_ubatch, 16),
        merge_gap=int(_MERGE_GAP * record_bytes),
        lookahead=bool(options.lookahead),
    )


def _floats(data: Bytes) -> Any:
    return data.ctypes.data_as(_Floats)
