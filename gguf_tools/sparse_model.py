"""A model whose feed-forward neurons can be skipped: a flash file, or an ordinary file that could become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_tools.bundle import plan_bundle
from gguf_tools.errors import GgufToolsError
from gguf_tools.format import Activation, BundleLayout, bias_name, read_flash, weight_name
from gguf_tools.neurons import Neurons, dense_layers
from gguf_tools.observe import Floats
from gguf_tools.predictors import Predictor
from gguf_tools.source import GgufSource, data_bytes, open_gguf, raw_row_bytes, row_blocks


@dataclass(frozen=True)
class SparseModel:
    """What is known of the model without reading its weights."""

    path: Path
    source: GgufSource
    layers: dict[int, Neurons]
    activation: Activation
    bundle: BundleLayout  # of an ordinary file: the one that it would get
    is_flash: bool

    @classmethod
    def open(cls, path: Path) -> SparseModel:
        """Raises GgufToolsError if the model is damaged, or its neurons cannot be skipped; OSError."""
        source = open_gguf(path)
        info = read_flash(source, path)
        if info is None:
            plan = plan_bundle(source, file=path)
            _refuse_experts(plan.n_expert, path)
            return cls(path, source, dense_layers(source, path), plan.activation, plan.layout, False)
        _refuse_experts(info.n_expert, path)
        layers = {il: neurons for il, neurons in dense_layers(source, path).items() if il in info.n_ff}
        return cls(path, source, layers, info.activation, info.bundle, True)

    def predictor(self, il: int) -> Predictor | None:
        """The predictor of a layer as the file holds it; None if it has none."""
        names = (weight_name(il, "predictor_in"), weight_name(il, "predictor_out"), bias_name(il, "predictor"))
        if names[0] not in self.source.tensors:
            return None
        first, second, bias = (self.source.tensors[name] for name in names)
        return Predictor(first.floats(0, first.shape[1]), second.floats(0, second.shape[1]), bias.floats(0, 1)[0])

    def predictor_bytes(self, il: int) -> int:
        """Bytes of a layer's predictor in the file."""
        names = (weight_name(il, "predictor_in"), weight_name(il, "predictor_out"), bias_name(il, "predictor"))
        return sum(data_bytes(self.source.tensors[name]) for name in names if name in self.source.tensors)

    def down_norms(self, il: int) -> Floats:
        """||down_i|| of each neuron: [n_ff]."""
        neurons = self.layers[il]
        down = neurons.parts["down"]
        norms = np.empty(neurons.n_ff, np.float32)
        for rows in row_blocks(neurons.n_ff, 4 * raw_row_bytes(down)):
            norms[rows] = np.linalg.norm(down.floats(rows.start, rows.stop), axis=1)
        return norms

    def linear(self, il: int, part: str) -> tuple[Floats, Floats]:
        """Weights [n_ff, n_embd] and bias [n_ff] of a layer's up or gate."""
        neurons = self.layers[il]
        bias = self.source.tensors.get(bias_name(il, part))
        weights = neurons.parts[part].floats(0, neurons.n_ff)
        return weights, np.zeros(neurons.n_ff, np.float32) if bias is None else bias.floats(0, 1)[0]


def _refuse_experts(n_expert: Mapping[int, int], path: Path) -> None:
    if n_expert:
        raise GgufToolsError(
            f"layer {min(n_expert)} is of experts: only the neurons of dense layers can be calibrated or reordered",
            file=path,
        )
