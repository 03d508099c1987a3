"""Measures the sparsity of a layer, and what a predictor makes of it, on recorded activations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_tools.activations import Bits, LayerActivations, count_bits, fingerprint, open_recording
from gguf_tools.errors import GgufToolsError
from gguf_tools.observe import Floats
from gguf_tools.predictors import Predictor, per_token
from gguf_tools.sparse_model import SparseModel
from gguf_tools.windows import newly_active, window_curve

WINDOW = 5  # tokens before the current one, for the share of newly active neurons
_TOKENS = 256  # worked on at a time


@dataclass(frozen=True)
class LayerReport:
    """A layer. Shares are of its neurons, means over the tokens."""

    layer: int
    neurons: int
    rank: int  # 0: no predictor, every neuron counts as predicted
    active_share: float
    predicted_share: float
    mass_recall: float  # share of a token's activation mass, |value| * ||down||, that its predicted neurons hold
    count_recall: float  # share of the active neurons that are predicted
    false_positives: float  # share of neurons: predicted, not active
    false_negatives: float  # share of neurons: active, not predicted
    predictor_bytes: int
    record_bytes: int  # of all neurons
    active_window: list[float]  # s_agg(k): distinct neurons of a token and the k before it, k = 0 to 16
    predicted_window: list[float]
    newly_active: float  # used by the token and by none of the 5 before it
    newly_predicted: float
    refined: bool = False  # the predictor was improved by descent


def measure(model: str | os.PathLike[str], activations: str | os.PathLike[str]) -> list[LayerReport]:
    """Each layer of a file as it is, with the predictors that it has, on all tokens of a recording of it.

    Raises GgufToolsError if the recording is of another model, or the model's neurons cannot be skipped.
    """
    subject, recording = SparseModel.open(Path(model)), open_recording(Path(activations))
    if recording.model != fingerprint(subject.source):
        raise GgufToolsError("holds the activations of another model", file=recording.folder)
    reports = []
    for il in subject.layers:
        layer, norms = recording.layer(il), subject.down_norms(il)
        reports.append(
            layer_report(
                il,
                layer,
                norms,
                subject.predictor(il),
                sequence=recording.sequence,
                record_bytes=subject.bundle.record_bytes,
                predictor_bytes=subject.predictor_bytes(il),
            )
        )
    return reports


def layer_report(
    il: int,
    layer: LayerActivations,
    norms: Floats,
    predictor: Predictor | None,
    *,
    sequence: int,
    record_bytes: int,
    predictor_bytes: int,
) -> LayerReport:
    """norms: ||down_i||, [n_ff]. sequence: tokens of a sequence. record_bytes: of one neuron."""
    n_ff = layer.n_ff
    predicted, recall = predict(layer, norms, predictor)
    active_share, predicted_share = share_of(layer.active, n_ff), share_of(predicted, n_ff)
    hits = share_of(predicted & layer.active, n_ff)
    return LayerReport(
        layer=il,
        neurons=n_ff,
        rank=0 if predictor is None else predictor.rank,
        active_share=active_share,
        predicted_share=predicted_share,
        mass_recall=recall,
        count_recall=hits / active_share if active_share else 1.0,
        false_positives=predicted_share - hits,
        false_negatives=active_share - hits,
        predictor_bytes=predictor_bytes,
        record_bytes=record_bytes * n_ff,
        active_window=window_curve(layer.active, sequence, n_ff),
        predicted_window=window_curve(predicted, sequence, n_ff),
        newly_active=newly_active(layer.active, sequence, n_ff, WINDOW),
        newly_predicted=newly_active(predicted, sequence, n_ff, WINDOW),
    )


def predict(layer: LayerActivations, norms: Floats, predictor: Predictor | None) -> tuple[Bits, float]:
    """The predicted sets, packed like the active ones, and the share of the mass that they hold, mean over tokens."""
    predicted = np.empty_like(layer.active)
    kept = 0.0
    for start in range(0, layer.n_tokens, _TOKENS):
        tokens = np.arange(start, min(start + _TOKENS, layer.n_tokens))
        mass = per_token(layer.magnitudes(tokens) * norms)
        sets = np.ones(mass.shape, np.bool_) if predictor is None else predictor.margins(layer.inputs[tokens]) > 0
        predicted[tokens] = np.packbits(sets, axis=1)
        nothing_to_miss = int(np.count_nonzero(mass.sum(axis=1) == 0))
        kept += float(mass[sets].sum(dtype=np.float64)) + nothing_to_miss
    return predicted, kept / layer.n_tokens


def share_of(sets: Bits, n_ff: int) -> float:
    """Mean share of the neurons that are in a token's set. sets: [tokens, ceil(n_ff / 8)]."""
    return float(count_bits(sets).sum(dtype=np.int64)) / (len(sets) * n_ff)
