"""Predictors of single layers: what they are fitted to is found again, and the recall that was asked for is kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as K
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sparse_models import SEQUENCE, computed_activations, drawn_inputs, planted_model

from gguf_tools.activations import unpacked
from gguf_tools.errors import GgufToolsError
from gguf_tools.fitting import Settings, fit
from gguf_tools.measure import layer_report
from gguf_tools.predictors import Factors, Moments, Predictor, _log_expectation, bound_for, ranks_up_to, recalibrated
from gguf_tools.targets import target_of
from gguf_tools.windows import newly_active, newly_active_sets, reads_within, window_curve

KINDS = [("relu", False), ("relu2", False), ("reglu", True), ("relu2", True), ("fatrelu", True), ("drelu", True)]


def fitted_and_fresh(model, settings=None, n_embd=128):
    """A predictor, and the report on tokens that it has not seen."""
    fitted, thresholds, fresh = (
        computed_activations(model, drawn_inputs(n_tokens, n_embd, seed))
        for seed, n_tokens in enumerate((64 * SEQUENCE, 32 * SEQUENCE, 16 * SEQUENCE))
    )
    stored = fit(model, 0, fitted, thresholds, settings or Settings(), sequence=SEQUENCE)
    report = layer_report(
        0,
        fresh,
        model.down_norms(0),
        stored and stored.predictor,
        sequence=SEQUENCE,
        record_bytes=model.bundle.record_bytes,
        predictor_bytes=stored.n_bytes if stored else 0,
    )
    return stored, report, fresh


@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_the_recall_is_kept_on_other_tokens(activation: str, gated: bool, tmp_path: Path) -> None:
    model = planted_model(tmp_path, activation, gated=gated)
    stored, report, fresh = fitted_and_fresh(model)
    assert 0.01 < report.active_share < 0.3
    assert stored is not None and report.rank == stored.predictor.rank
    assert abs(report.mass_recall - 0.99) < 0.01
    assert report.predicted_share < 0.7, "hardly a choice"
    predicted = stored.predictor.margins(fresh.inputs) > 0
    active = unpacked(fresh.active, fresh.n_ff)
    assert report.predicted_share == pytest.approx(predicted.mean())
    assert report.count_recall == pytest.approx((predicted & active).sum() / active.sum())
    assert report.false_positives == pytest.approx((predicted & ~active).mean())
    assert report.false_negatives == pytest.approx((~predicted & active).mean())


def test_a_planted_matrix_of_rank_32_is_recovered(tmp_path: Path) -> None:
    model = planted_model(tmp_path, "relu", gated=False, rank=32)
    _, report, fresh = fitted_and_fresh(model, Settings(kind=K.F16, refine=False))
    assert report.rank == 32
    norms = model.down_norms(0)
    mass = fresh.magnitudes(np.arange(fresh.n_tokens)) * norms
    least = np.mean([np.searchsorted(np.cumsum(np.sort(row)[::-1]), 0.99 * row.sum()) + 1 for row in mass]) / len(norms)
    assert least < report.predicted_share < 1.1 * report.active_share
    assert abs(report.mass_recall - 0.99) < 0.005


def test_the_factors_leave_nothing_over_of_a_planted_matrix(tmp_path: Path) -> None:
    model = planted_model(tmp_path, "relu", gated=False, rank=32)
    layer = computed_activations(model, drawn_inputs(2048, 128, 0))
    norms, moments = model.down_norms(0), Moments.of(layer.inputs)
    target = target_of(model, 0, norms, moments, layer.inputs)
    factors = Factors.of(target, moments, 64)
    spread = np.sqrt(factors.variance)
    assert (factors.deviation(32) < 0.01 * spread).all()
    assert (factors.deviation(24) > 0.01 * spread).mean() > 0.9
    exact = layer.inputs.astype(np.float32) @ target.weights.T + target.bias
    projected = (layer.inputs.astype(np.float32) - factors.mean) @ factors.input[:32].T
    np.testing.assert_allclose(projected @ factors.output[:, :32].T + factors.centre, exact, atol=0.02)
    np.testing.assert_allclose(np.cov(projected.T), np.eye(32), atol=0.15)


def test_what_is_left_over_is_predicted_from_the_matrices(tmp_path: Path) -> None:
    model = planted_model(tmp_path, "relu2", gated=False)
    layer, fresh = (computed_activations(model, drawn_inputs(8192, 128, seed)) for seed in (0, 1))
    moments = Moments.of(layer.inputs)
    target = target_of(model, 0, model.down_norms(0), moments, layer.inputs)
    factors = Factors.of(target, moments, 64)
    x = fresh.inputs.astype(np.float32)
    scores = ((x - factors.mean) @ factors.input[:48].T) @ factors.output[:, :48].T + factors.centre
    measured = (x @ target.weights.T + target.bias - scores).std(axis=0)
    np.testing.assert_allclose(factors.deviation(48), measured, rtol=0.1)


def test_more_rank_predicts_fewer_neurons(tmp_path: Path) -> None:
    model = planted_model(tmp_path, "relu2", gated=False)
    shares = {}
    for rank in (32, 64):
        _, report, _ = fitted_and_fresh(model, Settings(max_rank=rank, refine=False))
        assert report.rank == rank
        shares[rank] = report.predicted_share
    assert shares[64] < 0.9 * shares[32]


def test_descent_only_goes_where_it_costs_less(tmp_path: Path) -> None:
    model = planted_model(tmp_path, "relu2", gated=False)
    reports = {refine: fitted_and_fresh(model, Settings(max_rank=32, refine=refine))[1] for refine in (False, True)}
    # normal inputs are what the closed form is made for: there is nothing to be gained, and nothing may be lost
    assert reports[True].predicted_share < 1.1 * reports[False].predicted_share
    assert reports[True].mass_recall > reports[False].mass_recall - 0.005


def test_a_layer_whose_neurons_are_all_needed_gets_no_predictor(tmp_path: Path) -> None:
    model = planted_model(tmp_path, "relu", gated=False)
    inputs = drawn_inputs(16 * SEQUENCE, 128, 0)
    layer = computed_activations(model, inputs)
    always = type(layer)(
        layer.inputs, np.full_like(layer.active, 255), np.full(512 * len(inputs), 0x3F80, np.uint16), 512
    )
    assert fit(model, 0, always, always, Settings(), sequence=SEQUENCE) is None


def test_a_layer_that_is_never_active_predicts_nothing(tmp_path: Path) -> None:
    model = planted_model(tmp_path, "relu", gated=False)
    layer = computed_activations(model, drawn_inputs(16 * SEQUENCE, 128, 0))
    never = type(layer)(layer.inputs, np.zeros_like(layer.active), np.zeros(0, np.uint16), 512)
    stored = fit(model, 0, never, never, Settings(), sequence=SEQUENCE)
    assert stored is not None and np.isfinite(stored.bias).all()
    assert not (stored.predictor.margins(layer.inputs) > 0).any()


@pytest.mark.parametrize("power", [1, 2])
def test_the_expected_power_of_a_rectified_normal_variable(power: int) -> None:
    z, log_f = _log_expectation(power)
    draws = np.random.default_rng(0).standard_normal(400_000)
    for value in (-2.0, -0.5, 0.0, 1.0, 4.0, 20.0):
        expected = (np.maximum(value + draws, 0) ** power).mean()
        assert math.exp(np.interp(value, z, log_f)) == pytest.approx(expected, rel=0.03)
    assert (np.diff(log_f) >= 0).all() and (np.diff(z) > 0).all()
    assert np.abs(np.diff(log_f[z < 9])).max() < 0.7, "a jump where two formulas meet"


@given(
    st.lists(st.tuples(st.floats(-5, 5, width=32), st.floats(0.125, 1, width=32)), min_size=1, max_size=40),
    st.floats(0.5, 0.999),
)
def test_the_bound_keeps_the_recall_with_the_fewest(entries: list[tuple[float, float]], recall: float) -> None:
    scores, weights = (np.array(column, np.float32) for column in zip(*entries, strict=True))
    above = scores > bound_for(scores, weights, recall)
    total = weights.sum(dtype=np.float64)
    assert weights[above].sum(dtype=np.float64) >= recall * total * (1 - 1e-6)
    lowest = above & (scores == scores[above].min())
    assert weights[above & ~lowest].sum(dtype=np.float64) < recall * total * (1 + 1e-6)


def test_calibrating_again_only_shifts_thresholds() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((500, 64)).astype(np.float16)
    predictor = Predictor(*(rng.standard_normal(shape).astype(np.float32) for shape in ((32, 64), (96, 32), (96,))))
    mass = np.maximum(predictor.margins(inputs) + 3 * rng.standard_normal((500, 96)), 0).astype(np.float32)
    shifted = recalibrated(predictor, inputs, mass, 0.95)
    assert np.ptp(shifted.bias - predictor.bias) < 1e-4
    kept = (mass * (shifted.margins(inputs) > 0)).sum(axis=1) / mass.sum(axis=1)
    assert kept.mean() == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize("wrong", [{"recall": 1.0}, {"recall": 0.2}, {"max_rank": 16}, {"kind": K.Q4_0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(GgufToolsError):
        Settings(**wrong)


def test_ranks() -> None:
    assert ranks_up_to(1024) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert ranks_up_to(100) == [32, 64, 96]
    assert ranks_up_to(32) == [32]


SETS = arrays.arrays(np.bool_, st.tuples(st.just(3), st.integers(4, 9), st.integers(1, 20)))


@given(SETS, st.integers(0, 6))
def test_windows_hold_what_their_tokens_use(sets: np.ndarray, window: int) -> None:
    n_sequences, sequence, n_ff = sets.shape
    packed = np.packbits(sets.reshape(-1, n_ff), axis=1)
    longest = min(window, sequence - 1)
    curve = window_curve(packed, sequence, n_ff, longest=window)
    assert len(curve) == longest + 1
    places = [(s, t) for s in range(n_sequences) for t in range(longest, sequence)]
    for k, share in enumerate(curve):
        assert share == pytest.approx(np.mean([sets[s, t - k : t + 1].any(axis=0).mean() for s, t in places]))
    new = unpacked(newly_active_sets(packed, sequence, window), n_ff).reshape(sets.shape)
    for s in range(n_sequences):
        for t in range(sequence):
            before = sets[s, max(0, t - window) : t].any(axis=0)
            assert (new[s, t] == (sets[s, t] & ~before)).all()
    if window < sequence:
        assert newly_active(packed, sequence, n_ff, window) == pytest.approx(new[:, window:].mean())


def test_reads_fall_with_the_room_for_a_window() -> None:
    curve = [0.1, 0.15, 0.18, 0.2]
    assert reads_within(curve, 0.0) == reads_within(curve, -1.0) == 0.1
    assert reads_within(curve, 0.1) == pytest.approx(0.05)
    assert reads_within(curve, 0.15) == pytest.approx(0.03)
    assert reads_within(curve, 0.125) == pytest.approx(0.04)
    assert reads_within(curve, 0.9) == pytest.approx(0.02)
    assert reads_within([1.0] * 17, 0.5) == pytest.approx(0.5)
