"""What the tests of predictors share: layers whose activations are computed here, and text to run models on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
from dense_models import ArraySource, dense_model, tensor
from gguf import GGMLQuantizationType as K
from gguf import GGUFValueType as V

from gguf_tools.activations import LayerActivations
from gguf_tools.bundle import bundle
from gguf_tools.format import bias_name, weight_name
from gguf_tools.observe import Observation
from gguf_tools.source import KeyValue
from gguf_tools.sparse_model import SparseModel

Floats = npt.NDArray[np.float32]

SEQUENCE = 64
THRESHOLD = 0.25  # of fatrelu


def planted_model(
    folder: Path, activation: str, *, gated: bool, n_embd: int = 128, n_ff: int = 512, rank: int = 0
) -> SparseModel:
    """A bundle file of one layer with sparse neurons. rank: of the matrix that decides; 0: full."""
    rng = np.random.default_rng(1)
    source: ArraySource = dense_model(
        n_layer=1, n_embd=n_embd, n_ff=n_ff, gated=gated, biases=True, activation=activation
    )
    if activation == "fatrelu":
        source = source.with_values(
            llama__feed_forward_activation_threshold=KeyValue(THRESHOLD, V.FLOAT32),
        )
    weights = rng.standard_normal((n_ff, n_embd), np.float32)
    if rank:
        weights = rng.standard_normal((n_ff, rank), np.float32) @ rng.standard_normal((rank, n_embd), np.float32)
    weights *= (1 / np.linalg.norm(weights, axis=1))[:, None]
    bias = rng.uniform(-2.5, -1.0, n_ff).astype(np.float32)
    for part in ("gate", "up") if gated else ("up",):
        decides = part == ("gate" if gated else "up")
        matrix = weights if decides else rng.standard_normal((n_ff, n_embd), np.float32) / np.float32(n_embd**0.5)
        source = source.with_tensors(
            tensor(weight_name(0, part), matrix),
            tensor(bias_name(0, part), bias if decides else np.zeros(n_ff, np.float32)),
        )
    path = source.save(folder / f"planted-{activation}-{gated}-{rank}.gguf")
    bundled = path.with_suffix(".bundled.gguf")
    bundle(path, bundled, kind=K.F32, force=True)
    return SparseModel.open(bundled)


def drawn_inputs(n_tokens: int, n_embd: int, seed: int) -> Floats:
    """Correlated between dimensions, as those of real layers are, with a mean that is not zero."""
    rng = np.random.default_rng([seed, 7])
    spread = np.float32(1) / np.sqrt(np.arange(1, n_embd + 1, dtype=np.float32))
    spread *= np.sqrt(n_embd / np.square(spread).sum())
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((n_embd, n_embd)))[0].astype(np.float32)
    inputs: Floats = (rng.standard_normal((n_tokens, n_embd), np.float32) * spread + 0.3) @ turn
    return inputs


def computed_activations(model: SparseModel, inputs: Floats) -> LayerActivations:
    """What a recording of layer 0 holds."""
    x = inputs.astype(np.float16).astype(np.float32)
    up_weights, up_bias = model.linear(0, "up")
    up = x @ up_weights.T + up_bias
    if "gate" not in model.layers[0].parts:
        neurons = np.maximum(up, 0) ** (2 if model.activation.name == "relu2" else 1)
        return LayerActivations.of(Observation(x, neurons))
    gate_weights, gate_bias = model.linear(0, "gate")
    gate = x @ gate_weights.T + gate_bias
    neurons = {
        "relu2": np.maximum(gate, 0) ** 2 * up,
        "reglu": np.maximum(gate, 0) * up,
        "fatrelu": np.where(gate > THRESHOLD, gate, 0) * up,
        "drelu": np.maximum(gate, 0) * np.maximum(up, 0),
    }[model.activation.name]
    return LayerActivations.of(Observation(x, neurons.astype(np.float32)))


def library_text(folder: Path) -> tuple[Path, Path]:
    """The begins of all files of Python's standard library, every other one of them, in two files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    out = folder / "library-a.txt", folder / "library-b.txt"
    for path, half in zip(out, (files[::2], files[1::2]), strict=True):
        path.write_bytes(b"\n".join(file.read_bytes()[:8192] for file in half))
    return out
