"""Finds the predictor of one layer: its rank, its matrices, its thresholds.

The rank is the one with the least cost, counted in bytes that are read from memory for a token, one from flash being
worth 15 of them (35 GB/s against 2.4 GB/s):

    predictor's bytes + bytes of the predicted neurons + 15 * bytes of those that are not in memory

Half of the layer's bytes are taken to fit into memory. The predictor is there for good; the window of the last tokens'
neurons has the rest, and what it lacks follows from the predicted sets of successive tokens. So a layer gets more rank
where that makes fewer neurons predicted, the window longer and the reads fewer by more than the matrices take. To read
all neurons, without a predictor, is one of the choices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_tools import ggml
from gguf_tools.activations import Bits, LayerActivations, Numbers
from gguf_tools.errors import GgufToolsError
from gguf_tools.observe import Floats
from gguf_tools.predictors import (
    Factors,
    Moments,
    Predictor,
    Tradeoff,
    ranks_up_to,
    recalibrated,
    tradeoffs,
)
from gguf_tools.refine import refined
from gguf_tools.source import Bytes
from gguf_tools.sparse_model import SparseModel
from gguf_tools.targets import target_of
from gguf_tools.types import fits, row_bytes
from gguf_tools.windows import reads_within, window_curve

RECALL = 0.99
KINDS = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16)

_FLASH_COST = 15  # of a byte read from flash, in bytes read from memory
_IN_MEMORY = 0.5  # share of a layer's bytes
_MAX_RANK = 1024
_MIN_RANK = 32
_ELEMENTS = 1 << 25  # neurons times tokens that thresholds are set on
_F16 = GGMLQuantizationType.F16


@dataclass(frozen=True)
class Settings:
    """How predictors are fitted. Raises GgufToolsError for values that make no sense."""

    recall: float = RECALL  # share of a token's activation mass, |value| * ||down||, that its predicted neurons hold
    max_rank: int | None = None  # None: half of n_embd, at most 1024
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0
    refine: bool = True

    def __post_init__(self) -> None:
        if not 0.5 <= self.recall < 1:
            raise GgufToolsError(f"a recall of {self.recall:g} cannot be aimed at: from 0.5 to below 1")
        if self.max_rank is not None and self.max_rank < _MIN_RANK:
            raise GgufToolsError(f"the largest rank must be at least {_MIN_RANK}: {self.max_rank}")
        if self.kind not in KINDS:
            names = ", ".join(kind.name.lower() for kind in KINDS)
            raise GgufToolsError(f"predictors cannot be {self.kind.name.lower()}: {names}")


@dataclass(frozen=True)
class StoredPredictor:
    """A layer's predictor as a file holds it."""

    input: Bytes  # [rank, bytes]
    output: Bytes  # [n_ff, bytes]
    bias: Floats  # [n_ff]
    input_kind: GGMLQuantizationType
    output_kind: GGMLQuantizationType
    refined: bool = False

    @classmethod
    def of(cls, predictor: Predictor, kind: GGMLQuantizationType) -> StoredPredictor:
        """Matrices whose rows do not fit the type become F16."""
        input_kind, output_kind = (_fitting(kind, matrix.shape[1]) for matrix in (predictor.input, predictor.output))
        first, second = ggml.quantize(predictor.input, input_kind), ggml.quantize(predictor.output, output_kind)
        return cls(first, second, predictor.bias, input_kind, output_kind)

    @property
    def predictor(self) -> Predictor:
        """As the engine sees it."""
        first, second = ggml.dequantize(self.input, self.input_kind), ggml.dequantize(self.output, self.output_kind)
        return Predictor(first, second, self.bias)

    @property
    def n_bytes(self) -> int:
        return self.input.nbytes + self.output.nbytes + self.bias.nbytes


def _fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    return kind if fits(kind, columns) else _F16


def fit(
    model: SparseModel,
    il: int,
    fitted: LayerActivations,
    thresholds: LayerActivations,
    settings: Settings,
    *,
    sequence: int,
) -> StoredPredictor | None:
    """The predictor of least cost; None if none is worth its bytes.

    fitted: what matrices are fitted to. thresholds: what sets thresholds and decides, in sequences of so many tokens.
    """
    search = _Search.of(model, il, fitted, thresholds, settings, sequence)
    candidates = search.closed_forms()
    best = search.stored(candidates[-1].predictor)
    if settings.refine:
        # descent helps small ranks more: a smaller one than the closed form's may become the best
        for steps_down, candidate in enumerate(reversed(candidates)):
            trial = search.stored(refined(candidate.predictor, fitted, search.norms, candidate.bound))
            if search.cost(trial) < search.cost(best):
                best = replace(trial, refined=True)
            elif steps_down:
                break
    return best if search.cost(best) < search.cost(None) else None


@dataclass(frozen=True)
class _Candidate:
    """A predictor in closed form, before it is quantised."""

    predictor: Predictor
    bound: float  # share of a token's mass that is worth predicting a neuron


@dataclass(frozen=True)
class _Search:
    factors: Factors
    norms: Floats  # ||down_i||, [n_ff]
    inputs: npt.NDArray[np.float16]  # [tokens, n_embd], of those that set the thresholds
    mass: Floats  # [tokens, n_ff], theirs
    sequence: int
    layer_bytes: int  # of all records
    settings: Settings

    @classmethod
    def of(
        cls,
        model: SparseModel,
        il: int,
        fitted: LayerActivations,
        thresholds: LayerActivations,
        settings: Settings,
        sequence: int,
    ) -> _Search:
        norms, moments = model.down_norms(il), Moments.of(fitted.inputs)
        n_ff, n_embd = fitted.n_ff, fitted.inputs.shape[1]
        max_rank = min(settings.max_rank or min(_MAX_RANK, max(_MIN_RANK, n_embd // 2)), n_embd)
        tokens = _whole_sequences(thresholds.n_tokens, sequence, _ELEMENTS // n_ff)
        return cls(
            factors=Factors.of(target_of(model, il, norms, moments, fitted.inputs), moments, max_rank),
            norms=norms,
            inputs=thresholds.inputs[tokens],
            mass=thresholds.magnitudes(tokens) * norms,
            sequence=sequence,
            layer_bytes=model.bundle.record_bytes * n_ff,
            settings=settings,
        )

    def closed_forms(self) -> list[_Candidate]:
        """Of every rank up to the best one."""
        ranks = ranks_up_to(len(self.factors.input))
        found, costs = [], []
        for one in tradeoffs(self.factors, self.inputs, self.mass, self.settings.recall, ranks):
            found.append(self._candidate(one))
            costs.append(self._cost(self._bytes(one.rank), one.predicted))
        return found[: int(np.argmin(costs)) + 1]

    def stored(self, predictor: Predictor) -> StoredPredictor:
        """Quantised, with the thresholds for what it is then."""
        stored = StoredPredictor.of(predictor, self.settings.kind)
        return replace(stored, bias=recalibrated(stored.predictor, self.inputs, self.mass, self.settings.recall).bias)

    def cost(self, stored: StoredPredictor | None) -> float:
        """None: no predictor."""
        if stored is None:
            return self.layer_bytes * (1 + _FLASH_COST * (1 - _IN_MEMORY))
        return self._cost(stored.n_bytes, np.packbits(stored.predictor.margins(self.inputs) > 0, axis=1))

    def _cost(self, predictor_bytes: int, predicted: Bits) -> float:
        curve = window_curve(predicted, self.sequence, self.mass.shape[1])
        loaded = reads_within(curve, _IN_MEMORY - predictor_bytes / self.layer_bytes)
        return predictor_bytes + self.layer_bytes * (curve[0] + _FLASH_COST * loaded)

    def _candidate(self, one: Tradeoff) -> _Candidate:
        totals = self.mass.sum(axis=1, dtype=np.float64)
        usual = 1 / float(np.mean(1 / totals[totals > 0])) if totals.any() else 1.0
        return _Candidate(self.factors.predictor(one.rank, one.log_bound), float(np.exp(one.log_bound)) / usual)

    def _bytes(self, rank: int) -> int:
        n_ff, n_embd = self.factors.target.weights.shape
        kinds = [_fitting(self.settings.kind, columns) for columns in (n_embd, rank)]
        return int(rank * row_bytes(kinds[0], n_embd) + n_ff * (row_bytes(kinds[1], rank) + 4))


def _whole_sequences(n_tokens: int, sequence: int, most: int) -> Numbers:
    """Numbers of the tokens of some sequences, equally spaced: at most so many tokens, at least one sequence."""
    count = n_tokens // sequence
    chosen = np.unique(np.linspace(0, count - 1, max(1, min(count, most // sequence))).astype(np.int64))
    return (chosen[:, None] * sequence + np.arange(sequence)).reshape(-1)
