"""Neurons in another order: the same function, fewer reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dense_models import ArraySource, contents, dense_model, read_everything
from engines import Logits, logits_of, open_resident, tokens
from gguf import GGMLQuantizationType as K
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from neurons import bundled, open_neurons, some_active, with_predictors, write_model
from sparse_models import library_text

from gguf_tools import order as ordering
from gguf_tools.activations import record
from gguf_tools.bundle import bundle
from gguf_tools.calibrate import calibrate
from gguf_tools.cli import main
from gguf_tools.errors import GgufToolsError
from gguf_tools.fitting import Settings
from gguf_tools.order import Reads, count_reads, order_by_coactivation
from gguf_tools.reorder import reorder, write_reordered
from gguf_tools.source import open_gguf
from gguf_tools.sparse_model import SparseModel
from gguf_tools.synthetic import tiny, write
from gguf_tools.verify import verify

FEW = 4096  # tokens: eight sequences, the least that works
PROMPT, DECODED = tokens(70, seed=1), tokens(12, seed=2)
SETS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 40)))


# ---- the order


@given(SETS)
def test_an_order_has_every_neuron_once_and_those_never_needed_last(sets: np.ndarray) -> None:
    order = order_by_coactivation(np.packbits(sets, axis=1), sets.shape[1])
    assert np.array_equal(np.sort(order), np.arange(sets.shape[1]))
    needed = sets.any(axis=0)[order]
    assert not needed[needed.sum() :].any()


@given(SETS, st.randoms(use_true_random=False))
def test_reads_are_counted_as_they_are_made(sets: np.ndarray, random) -> None:
    n_ff = sets.shape[1]
    order = np.array(random.sample(range(n_ff), n_ff))
    reads = count_reads(np.packbits(sets, axis=1), n_ff, order)
    runs = merged = 0
    for row in sets:
        places = np.flatnonzero(row[order])
        runs += bool(len(places)) + int((np.diff(places) > 1).sum())
        merged += bool(len(places)) + int((np.diff(places) > 2).sum())
    assert reads == Reads(sets.sum() / len(sets), runs / len(sets), merged / len(sets))


def planted_groups(n_ff: int, size: int, n_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sets in which groups of neurons, scattered over the layer, are needed together: with a few exceptions."""
    rng = np.random.default_rng(seed)
    group = np.random.default_rng(99).permutation(n_ff) // size
    chosen = rng.random((n_tokens, n_ff // size)) < 0.05
    sets = chosen[:, group] & (rng.random((n_tokens, n_ff)) < 0.95)
    return sets | (rng.random((n_tokens, n_ff)) < 0.002), group


def test_groups_that_are_needed_together_become_neighbours() -> None:
    n_ff, size = 512, 8
    sets, group = planted_groups(n_ff, size, 1500)
    other, _ = planted_groups(n_ff, size, 500, seed=1)
    order = order_by_coactivation(np.packbits(sets, axis=1), n_ff)
    assert (np.diff(group[order]) == 0).mean() > 0.95 * (1 - 1 / size)
    before, after = (count_reads(np.packbits(other, axis=1), n_ff, o) for o in (None, order))
    assert before.neurons == after.neurons and before.run_length < 1.3
    assert after.run_length > 4 and after.merged_run_length > 5
    assert after.reads < before.reads / 3


def test_a_hot_neuron_does_not_break_groups_apart() -> None:
    sets, group = planted_groups(256, 8, 1500)
    sets[:, 7] = True
    order = order_by_coactivation(np.packbits(sets, axis=1), 256)
    assert (np.diff(group[order]) == 0).mean() > 0.9 * (1 - 1 / 8)


def test_the_order_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sets, _ = planted_groups(256, 8, 600)
    packed = np.packbits(sets, axis=1)
    at_once, counted = order_by_coactivation(packed, 256), count_reads(packed, 256)
    monkeypatch.setattr(ordering, "_ELEMENTS", 1000)
    assert np.array_equal(order_by_coactivation(packed, 256), at_once)
    assert count_reads(packed, 256) == counted


def test_a_wide_layer_takes_a_sample_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sets, group = planted_groups(256, 8, 3000)
    monkeypatch.setattr(ordering, "_OPERATIONS", 0)
    monkeypatch.setattr(ordering, "_FEWEST_TOKENS", 700)
    order = order_by_coactivation(np.packbits(sets, axis=1), 256)
    assert (np.diff(group[order]) == 0).mean() > 0.9 * (1 - 1 / 8)


# ---- files


def shuffled(model: SparseModel, seed: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {il: rng.permutation(neurons.n_ff) for il, neurons in model.layers.items()}


def bundle_of(source: ArraySource, folder: Path, layout: str, kind: K) -> Path:
    path = source.save(folder / "ordinary.gguf")
    out = folder / f"{layout}.gguf"
    bundle(path, out, layout=layout, kind=kind, force=True)
    return out


@settings(max_examples=12, deadline=None)
@given(
    gated=st.booleans(),
    layout=st.sampled_from(["bundled", "split", "ordinary"]),
    kind=st.sampled_from([K.F32, K.F16, K.Q8_0, K.Q4_0]),
    biases=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_reordered_file_is_the_same_function_and_can_be_undone(
    tmp_path_factory: pytest.TempPathFactory, gated: bool, layout: str, kind: K, biases: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("reorder")
    plain = layout == "ordinary"
    source = dense_model(
        gated=gated, biases=biases, kind=kind, down=K.F16 if plain else K.F32, activation="reglu" if gated else "relu"
    )
    path = source.save(folder / "in.gguf") if plain else bundle_of(source, folder, layout, kind)
    model = SparseModel.open(path)
    orders = shuffled(model, seed)
    write_reordered(model, folder / "out.gguf", orders)
    assert (folder / "out.gguf").read_bytes() != path.read_bytes()
    result = verify(path, folder / "out.gguf")
    assert result.same and result.counts()["reordered"] == 2 * (2 + gated + biases * (1 + gated))
    for il, neurons in SparseModel.open(folder / "out.gguf").layers.items():
        for part, rows in neurons.parts.items():
            before = model.layers[il].parts[part].floats(0, neurons.n_ff)
            assert np.array_equal(rows.floats(0, neurons.n_ff), before[orders[il]])
    inverse = {il: np.argsort(order) for il, order in orders.items()}
    write_reordered(SparseModel.open(folder / "out.gguf"), folder / "back.gguf", inverse)
    assert (folder / "back.gguf").read_bytes() == path.read_bytes()


def test_predictors_follow_their_neurons(model_folder: Path, tmp_path: Path) -> None:
    plain = bundled(write_model(model_folder, "arcee", "F32"))
    path = with_predictors(plain, tmp_path / "in.gguf", some_active, K.Q8_0)
    model = SparseModel.open(path)
    orders = shuffled(model, 3)
    write_reordered(model, tmp_path / "out.gguf", orders)
    inputs = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float16)
    for il, order in orders.items():
        before, after = (SparseModel.open(p).predictor(il) for p in (path, tmp_path / "out.gguf"))
        assert before is not None and after is not None
        np.testing.assert_allclose(after.margins(inputs), before.margins(inputs)[:, order], atol=1e-5)
    others = {name: t for name, t in contents(open_gguf(path).tensors).items() if ".ffn_" not in name}
    assert others.items() <= contents(open_gguf(tmp_path / "out.gguf").tensors).items()


def test_nothing_else_changes_but_the_layers_that_are_named(tmp_path: Path) -> None:
    path = bundle_of(dense_model(n_layer=3, gated=False, activation="relu"), tmp_path, "bundled", K.F16)
    model = SparseModel.open(path)
    write_reordered(model, tmp_path / "out.gguf", {1: np.arange(model.layers[1].n_ff)[::-1].copy()})
    before, after = (contents(open_gguf(p).tensors) for p in (path, tmp_path / "out.gguf"))
    assert [name for name in before if before[name] != after[name]] == ["blk.1.ffn_bundle.weight"]
    assert read_everything(open_gguf(path).tensors) == read_everything(open_gguf(tmp_path / "out.gguf").tensors)


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1], [1, 2, 3]])
def test_what_is_no_order_is_refused(order: list[int], tmp_path: Path) -> None:
    path = dense_model(n_layer=1, n_ff=3, gated=False, activation="relu").save(tmp_path / "in.gguf")
    with pytest.raises(GgufToolsError, match="not an order"):
        write_reordered(SparseModel.open(path), tmp_path / "out.gguf", {0: np.array(order)})
    assert not (tmp_path / "out.gguf").exists()


def test_an_ordinary_file_with_a_quantised_down_is_refused(tmp_path: Path) -> None:
    path = dense_model(n_layer=1, kind=K.Q8_0).save(tmp_path / "in.gguf")
    with pytest.raises(GgufToolsError, match="bundle the model first"):
        reorder(path, tmp_path / "out.gguf", text=path)


# ---- the engine


def logits_resident(path: Path) -> Logits:
    with open_resident(path, n_threads=1, type_k=0, type_v=0) as llm:
        return logits_of(llm, PROMPT, DECODED)


def assert_same_up_to_order(actual: Logits, expected: Logits) -> None:
    assert len(np.unique(expected.argmax(axis=1))) > 4, "the same answer for every token"
    assert (actual != expected).any(), "the very same sums"
    assert np.abs(actual - expected).max() <= 1e-5 * np.ptp(expected)


def test_ordinary_files_give_the_same_logits(model_folder: Path, tmp_path: Path) -> None:
    path = write_model(model_folder, "arcee", "F32")
    model = SparseModel.open(path)
    write_reordered(model, tmp_path / "out.gguf", shuffled(model, 1))
    assert_same_up_to_order(logits_resident(tmp_path / "out.gguf"), logits_resident(path))


@pytest.mark.parametrize("predictor", ["exact", "lowrank"])
def test_flash_files_give_the_same_logits(predictor: str, model_folder: Path, tmp_path: Path) -> None:
    path = with_predictors(bundled(write_model(model_folder, "arcee", "F32")), tmp_path / "in.gguf", some_active)
    model = SparseModel.open(path)
    write_reordered(model, tmp_path / "out.gguf", shuffled(model, 2))
    logits = []
    for file in (path, tmp_path / "out.gguf"):
        with open_neurons(file, predictor=predictor, share=0.5, n_threads=1, type_k=0, type_v=0) as llm:
            logits.append(logits_of(llm, PROMPT, DECODED))
    assert_same_up_to_order(logits[1], logits[0])


# ---- the whole way


@pytest.fixture(scope="module")
def worked(model_folder: Path) -> tuple[Path, Path, Path]:
    """A flash file with predictors, the text they were fitted to, and the folder of activations."""
    text, _ = library_text(model_folder)
    (plain,) = write(tiny("arcee", "F16", n_layer=2), model_folder / "reorder-arcee.gguf")
    path, work = model_folder / "reorder-predictors.gguf", model_folder / "reorder-work"
    quick = Settings(max_rank=32, refine=False)
    calibrate(bundled(plain), text, path, n_tokens=FEW, settings=quick, work=work, n_threads=1)
    return path, text, work


def test_reads_become_fewer_on_tokens_held_out(worked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, _, work = worked
    out = tmp_path / "out.gguf"
    layers = reorder(path, out, activations=work, window=0)
    for layer in layers:
        assert layer.all_before == layer.new_before and layer.all_after == layer.new_after, "there is no window"
        assert layer.all_after.neurons == layer.all_before.neurons > 0
        assert layer.all_after.reads < layer.all_before.reads
        assert layer.all_after.merged_reads < layer.all_before.merged_reads
    assert verify(path, out).same
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    with pytest.raises(GgufToolsError, match="another model"):
        reorder(out, tmp_path / "again.gguf", activations=work)


def test_the_command(worked: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text, _ = worked
    out = tmp_path / "out.gguf"
    options = ["--text", str(text), "--tokens", str(FEW), "--threads", "1"]
    for more in ([], ["--json", "--force"]):
        with pytest.raises(SystemExit) as stopped:
            main(["reorder", str(path), str(out), *options, *more])
        assert stopped.value.code == 0
    lines, _, report = capsys.readouterr().out.partition("{\n")
    assert "held out" in lines
    report = json.loads("{" + report)
    assert report["window"] == 5 and [layer["layer"] for layer in report["layers"]] == [0, 1]
    with pytest.raises(SystemExit) as stopped:
        main(["reorder", str(path), str(out), *options])
    assert stopped.value.code == 1 and "already there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["reorder", str(path), str(tmp_path / "other.gguf")])
    assert stopped.value.code == 1 and "a text or a recording" in capsys.readouterr().err


def test_without_predictors_the_active_neurons_count(worked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, text, _ = worked
    plain = bundled(path.with_name("reorder-arcee.gguf"))
    recording = record(plain, text, tmp_path / "work", n_tokens=FEW, n_threads=1)
    layers = reorder(plain, tmp_path / "out.gguf", activations=tmp_path / "work")
    active, n_ff = recording.active(0)
    held_out = active[recording.sequence_of_token % 8 == 7]
    assert layers[0].all_before == count_reads(held_out, n_ff)
