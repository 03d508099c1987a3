"""Recordings of activations, and flash files that get their predictors from them."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from engines import logits_of, open_resident
from neurons import bundled, open_neurons, write_model
from sparse_models import library_text

import gguf_tools.activations
import gguf_tools.calibrate
from gguf_tools.activations import LayerActivations, fingerprint, open_recording, record, unpacked
from gguf_tools.bundle import bundle
from gguf_tools.calibrate import CalibrationReport, calibrate
from gguf_tools.cli import main
from gguf_tools.errors import GgufToolsError
from gguf_tools.fitting import Settings
from gguf_tools.format import read_flash
from gguf_tools.measure import measure
from gguf_tools.observe import Observation, Observer
from gguf_tools.source import open_gguf
from gguf_tools.sparse_model import SparseModel
from gguf_tools.synthetic import tiny, write
from gguf_tools.verify import verify

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-arcee-q8_0.gguf"))
QUICK = Settings(max_rank=64, refine=False)
FEW = 4096  # tokens: eight sequences, the least that works
MANY = 8192


@pytest.fixture(scope="module")
def texts(model_folder: Path) -> tuple[Path, Path]:
    return library_text(model_folder)


@pytest.fixture(scope="module")
def calibrated(synthetic: Path, texts: tuple[Path, Path], model_folder: Path) -> Path:
    """The same with predictors, made at once."""
    out = model_folder / "calibrated.gguf"
    calibrate(synthetic, texts[0], out, n_tokens=FEW, settings=QUICK, n_threads=1)
    return out


@pytest.fixture(scope="module")
def synthetic(model_folder: Path) -> Path:
    """Random weights: half of the neurons are active."""
    (path,) = write(tiny("arcee", "F32", n_layer=2), model_folder / "calibrate-arcee.gguf")
    return bundled(path)


class _Stop(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, where: object, name: str, calls: int) -> None:
    """Lets a function fail from a number of calls on."""
    real, left = getattr(where, name), [calls]

    def counted(*arguments: object, **options: object) -> object:
        if not left[0]:
            raise _Stop
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(where, name, counted)


# ---- the shipped model: real weights, real sparsity


@pytest.fixture(scope="module")
def shipped(model_folder: Path, texts: tuple[Path, Path]) -> tuple[Path, CalibrationReport]:
    """The shipped model with predictors."""
    plain, out = model_folder / "shipped.gguf", model_folder / "shipped-predictors.gguf"
    bundle(SHIPPED, plain)
    work = model_folder / "shipped-work"
    report = calibrate(plain, texts[0], out, n_tokens=MANY, settings=Settings(max_rank=64), work=work, n_threads=1)
    return out, report


@pytest.fixture(scope="module")
def shipped_quickly(model_folder: Path, texts: tuple[Path, Path]) -> tuple[Path, CalibrationReport]:
    """The same from half of the text, in closed form alone."""
    plain, out = model_folder / "shipped-quick.gguf", model_folder / "shipped-quick-predictors.gguf"
    bundle(SHIPPED, plain)
    return out, calibrate(plain, texts[0], out, n_tokens=FEW, settings=QUICK, n_threads=1)


@pytest.fixture(params=["shipped_quickly", pytest.param("shipped", marks=pytest.mark.full)])
def found(request: pytest.FixtureRequest) -> tuple[Path, CalibrationReport]:
    """Path and report of the shipped model with predictors, of either kind."""
    made: tuple[Path, CalibrationReport] = request.getfixturevalue(request.param)
    return made


@pytest.mark.full
def test_predictors_keep_the_recall_on_a_text_they_have_not_seen(
    shipped: tuple[Path, CalibrationReport], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    path, report = shipped
    record(path, texts[1], tmp_path / "other", n_tokens=FEW, n_threads=1)
    layers = measure(path, tmp_path / "other")
    assert len(layers) == 6
    for held_out, layer in zip(report.layers, layers, strict=True):
        assert abs(layer.mass_recall - 0.99) < 0.01
        assert abs(held_out.mass_recall - 0.99) < 0.01
        assert abs(layer.predicted_share - held_out.predicted_share) < 0.05
        assert layer.rank == held_out.rank > 0
        assert layer.predictor_bytes == held_out.predictor_bytes
        assert 0.05 < layer.active_share < 0.5
        assert layer.predicted_share < 0.6
        assert len(layer.active_window) == 17 and layer.active_window == sorted(layer.active_window)
        assert 0 < layer.newly_active < layer.active_share
    assert any(layer.refined for layer in report.layers), "descent helps the real model"


def test_the_file_says_what_was_found(found: tuple[Path, CalibrationReport]) -> None:
    path, report = found
    source = open_gguf(path)
    info = read_flash(source, path)
    assert info is not None and info.predictor is not None
    assert info.predictor.ranks == tuple(layer.rank for layer in report.layers)
    assert info.predictor.recall == pytest.approx(0.99)
    for key, name in (
        ("active_share", "active_share"),
        ("predicted_share", "predicted_share"),
        ("measured_recall", "mass_recall"),
    ):
        stored = source.values[f"flash.predictor.{key}"].value
        assert stored == pytest.approx([getattr(layer, name) for layer in report.layers])
    assert verify(path, SHIPPED).within(0.02), "predictors do not belong to the function"


def test_the_engine_agrees_with_itself_with_and_without_predictors(found: tuple[Path, CalibrationReport]) -> None:
    path, _ = found
    text = b"class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n        self._init()\n"
    logits = {}
    for predictor in ("exact", "lowrank"):
        with open_neurons(path, predictor=predictor, share=0.5, n_threads=1) as llm:
            tokens = llm.tokenize(text * 3)
            logits[predictor] = logits_of(llm, tokens[:2], tokens[2:])
            active = llm.flash.stats().decode
            assert active.bytes_read > 0
    exact, lowrank = logits["exact"], logits["lowrank"]
    assert (exact != lowrank).any()
    assert (exact.argmax(axis=1) == lowrank.argmax(axis=1)).mean() > 0.9


@pytest.mark.full
def test_closed_form_alone_needs_more_neurons(
    shipped: tuple[Path, CalibrationReport], texts: tuple[Path, Path], model_folder: Path
) -> None:
    path, report = shipped
    work = model_folder / "shipped-work"
    closed = calibrate(path, texts[0], n_tokens=MANY, settings=QUICK, write=False, work=work, n_threads=1)
    better = [a.predicted_share < b.predicted_share for a, b in zip(report.layers, closed.layers, strict=True)]
    assert sum(better) >= 4


# ---- recordings


def test_a_recording_holds_what_the_weights_say(texts: tuple[Path, Path], tmp_path: Path) -> None:
    recording = record(SHIPPED, texts[0], tmp_path, n_tokens=FEW, n_threads=1)
    assert recording.n_tokens == FEW and recording.layers == tuple(range(6))
    model = SparseModel.open(SHIPPED)
    for il in (0, 3, 5):
        layer = recording.layer(il)
        weights, bias = model.linear(il, "up")
        some = np.arange(0, FEW, 37)
        expected = np.maximum(layer.inputs[some].astype(np.float32) @ weights.T + bias, 0) ** 2
        actual = layer.magnitudes(some)
        # the engine quantises what it multiplies with
        assert np.abs(actual - expected).max() < 0.02 * expected.max()
        assert ((actual > 0) == (expected > 0)).mean() > 0.99
        assert (unpacked(layer.active[some], layer.n_ff) == (actual > 0)).all()
        chosen = np.zeros(FEW, np.bool_)
        chosen[some] = True
        assert (layer.select(chosen).magnitudes(np.arange(len(some))) == actual).all()
        assert (recording.active(il)[0] == layer.active).all()


def test_bundled_and_ordinary_files_see_the_same(synthetic: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    ordinary = synthetic.with_name("calibrate-arcee.gguf")
    recordings = [
        record(path, texts[0], tmp_path / path.stem, n_tokens=FEW, n_threads=1) for path in (ordinary, synthetic)
    ]
    assert recordings[0].model != recordings[1].model
    for il in range(2):
        a, b = (recording.layer(il) for recording in recordings)
        np.testing.assert_allclose(a.inputs, b.inputs, rtol=0.01, atol=0.01)
        assert (a.active == b.active).mean() > 0.99


def test_magnitudes_survive_being_stored() -> None:
    neurons = np.array([[0, 1e-30, -2.5, 3e38, 0], [1e-45, 0, 0, 7, -1e30]], np.float32)
    layer = LayerActivations.of(Observation(np.full((2, 3), 1e6, np.float32), neurons))
    stored = layer.magnitudes(np.array([0, 1]))
    assert ((stored != 0) == (neurons != 0)).all()
    np.testing.assert_allclose(stored[neurons > 1e-38], neurons[neurons > 1e-38], rtol=2**-6)
    assert np.isfinite(layer.inputs).all()


def test_sequences_come_from_all_over_the_text(
    synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"".join(b"%05d " % i for i in range(20_000)))  # a byte is a token
    ran: list[list[int]] = []
    real = Observer.run
    monkeypatch.setattr(Observer, "run", lambda self, tokens: ran.append(list(tokens)) or real(self, tokens))
    record(synthetic, text, tmp_path / "a", n_tokens=FEW, n_threads=1)
    assert len(ran) == 8 and {len(tokens) for tokens in ran} == {512}
    with open_resident(synthetic.with_name("calibrate-arcee.gguf"), n_threads=1) as llm:
        firsts = [int(llm.detokenize(tokens[:20]).split()[1]) for tokens in ran]
    assert firsts == sorted(firsts) and firsts[0] < 100 and firsts[-1] > 15_000


def test_of_a_long_text_there_are_excerpts(synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tools.activations, "_LONGEST_TEXT", 1 << 16)
    text = tmp_path / "text"
    text.write_bytes(b"".join(b"%07d\n" % i for i in range(100_000)))
    lines = gguf_tools.activations._excerpts(text).split(b"\n")
    numbers = [int(line) for line in lines]
    assert numbers == sorted(set(numbers)) and numbers[0] < 1000 and numbers[-1] > 98_000
    assert all(len(line) == 7 for line in lines) and len(lines) * 8 <= 1 << 16


# ---- going on after an interruption


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        pytest.param(Observer, "run", 3, marks=pytest.mark.full),
        (gguf_tools.calibrate, "fit", 1),
        pytest.param(gguf_tools.calibrate, "write_gguf", 0, marks=pytest.mark.full),
    ],
    ids=["recording", "fitting", "writing"],
)
def test_an_interrupted_run_goes_on_to_the_same_file(
    where: object,
    name: str,
    calls: int,
    synthetic: Path,
    calibrated: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_two = tmp_path / "in-two.gguf"
    with monkeypatch.context() as patched, pytest.raises(_Stop):
        stop_after(patched, where, name, calls)
        calibrate(synthetic, texts[0], in_two, n_tokens=FEW, settings=QUICK, n_threads=1)
    assert not in_two.exists()
    with monkeypatch.context() as patched:
        total = {"run": 8, "fit": 2, "write_gguf": 1}[name]
        stop_after(patched, where, name, total - calls)  # what was done is not done again
        calibrate(synthetic, texts[0], in_two, n_tokens=FEW, settings=QUICK, n_threads=1)
    assert in_two.read_bytes() == calibrated.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["in-two.gguf"]


def test_a_kept_folder_saves_recording_again(
    synthetic: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "out.gguf"
    first = calibrate(synthetic, texts[0], out, n_tokens=FEW, settings=QUICK, n_threads=1, work=work)
    stop_after(monkeypatch, Observer, "run", 0)
    with monkeypatch.context() as patched:
        stop_after(patched, gguf_tools.calibrate, "fit", 0)
        again = calibrate(synthetic, texts[0], out, n_tokens=FEW, settings=QUICK, n_threads=1, work=work, force=True)
    assert again == first
    lower = Settings(recall=0.9, max_rank=64, refine=False)
    other = calibrate(synthetic, texts[0], out, n_tokens=FEW, settings=lower, n_threads=1, work=work, force=True)
    assert all(a.predicted_share < b.predicted_share for a, b in zip(other.layers, first.layers, strict=True))
    with pytest.raises(GgufToolsError, match="another model or text"):
        calibrate(synthetic, texts[1], out, n_tokens=FEW, settings=QUICK, n_threads=1, work=work, force=True)


# ---- files


def test_in_place_the_predictors_are_replaced(synthetic: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(synthetic, path)
    before = fingerprint(open_gguf(path))
    ranks = []
    for max_rank in (64, 32):
        report = calibrate(
            path, texts[0], n_tokens=FEW, settings=Settings(max_rank=max_rank, refine=False), n_threads=1
        )
        info = read_flash(open_gguf(path), path)
        assert info is not None and info.predictor is not None
        assert info.predictor.ranks == tuple(layer.rank for layer in report.layers)
        ranks.append(info.predictor.ranks)
    assert ranks[0] != ranks[1] and max(ranks[1]) == 32
    assert fingerprint(open_gguf(path)) == before, "activations do not depend on predictors"
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert verify(path, synthetic).same


def test_an_ordinary_file_is_only_reported_on(texts: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "arcee.gguf"
    write(tiny("arcee", n_layer=1), path)
    with pytest.raises(GgufToolsError, match="bundle it first"):
        calibrate(path, texts[0], tmp_path / "out.gguf", n_tokens=FEW, n_threads=1)
    report = calibrate(path, texts[0], n_tokens=FEW, settings=QUICK, write=False, n_threads=1)
    assert report.activation == "relu2" and 0.3 < report.layers[0].active_share < 0.7
    assert [file.name for file in tmp_path.iterdir()] == ["arcee.gguf"]


def test_gated_models_are_calibrated_too(model_folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    path = bundled(write_model(model_folder, "llama", "F32", "fatrelu"))
    report = calibrate(path, texts[0], tmp_path / "out.gguf", n_tokens=MANY, settings=QUICK, n_threads=1)
    assert report.activation.startswith("fatrelu")
    for layer in report.layers:
        assert 0 < layer.active_share < 0.6
        assert abs(layer.mass_recall - 0.99) < 0.02  # few tokens, and a vocabulary of bytes


@pytest.mark.parametrize("what", ["silu", "short text", "there", "no folder", "settings"])
def test_what_cannot_work_is_said_at_once(
    what: str, synthetic: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, out, more = synthetic, texts[0], tmp_path / "out.gguf", []
    if what == "silu":
        (model,) = write(tiny("llama", n_layer=1), tmp_path / "llama.gguf")
        more = ["--report"]
    if what == "short text":
        text = tmp_path / "text"
        text.write_text("import this\n" * 20)
    if what == "there":
        out.touch()
    if what == "no folder":
        out = tmp_path / "nowhere" / "out.gguf"
    if what == "settings":
        more = ["--recall", "1.5"]
    expected = {
        "silu": "not known to be ReLU-like",
        "short text": "too few",
        "there": "already there",
        "no folder": "does not exist",
        "settings": "cannot be aimed at",
    }
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", str(model), str(out), "--text", str(text), *more])
    message = capsys.readouterr().err
    assert stopped.value.code == 1
    assert message.startswith("error: ") and message.count("\n") == 1 and expected[what] in message


def test_the_command(
    synthetic: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    options = ["--text", str(texts[0]), "--tokens", str(FEW), "--max-rank", "32", "--no-refine", "--type", "f16"]
    for more in ([], ["--json", "--force"]):
        with pytest.raises(SystemExit) as stopped:
            main(["calibrate", str(synthetic), str(out), *options, "--work", str(work), *more])
        assert stopped.value.code == 0
    lines, _, report = capsys.readouterr().out.partition("{\n")
    assert "recall" in lines and "k=16" in lines
    layers = json.loads("{" + report)["layers"]
    assert [layer["rank"] for layer in layers] == [32, 32]
    assert open_gguf(out).tensors["blk.0.ffn_predictor_in.weight"].kind.name == "F16"
    assert open_recording(work).n_tokens == FEW


def test_a_calibrated_file_runs(synthetic: Path, calibrated: Path, texts: tuple[Path, Path]) -> None:
    tokens = list(texts[1].read_bytes()[:80])
    with open_resident(synthetic.with_name("calibrate-arcee.gguf"), n_threads=1) as llm:
        expected = logits_of(llm, tokens[:8], tokens[8:])
    with open_neurons(calibrated, predictor="lowrank", share=0.5, n_threads=1) as llm:
        actual = logits_of(llm, tokens[:8], tokens[8:])
    similarity = (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected)
    assert similarity > 0.98
