"""The synthetic OPT: its activation statistics are those stated, and its three layouts are one model."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from engines import logits_of, open_resident
from gguf import GGMLQuantizationType, GGUFReader

from gguf_tools.synthetic.__main__ import main
from gguf_tools.synthetic.activity import LayerActivity, aggregated, layer_activity, newly_used
from gguf_tools.synthetic.codes import Codes, token_stream
from gguf_tools.synthetic.opt import OptShape
from gguf_tools.synthetic.opt_cli import OPT_PRESETS, mean_activity
from gguf_tools.synthetic.opt_forward import OptFile, logits, measure_activity, trace
from gguf_tools.synthetic.opt_writer import opt_bytes, write_opt

TINY = OPT_PRESETS["opt-tiny"]
OptFiles = Callable[..., Path]


@pytest.fixture(scope="module")
def opt_file() -> Iterator[OptFiles]:
    """opt_file(layout, kind="F16", coactive=False): path of the tiny preset in that form."""
    with tempfile.TemporaryDirectory(prefix="llama-flash-test-") as folder:

        @cache
        def make(layout: str, kind: str = "F16", coactive: bool = False) -> Path:
            model = replace(TINY, kind=GGMLQuantizationType[kind], coactive=coactive)
            return write_opt(model, Path(folder) / f"{layout}-{kind}-{coactive}.gguf", layout)  # type: ignore[arg-type]

        yield make


@pytest.fixture(scope="module")
def activity(opt_file: OptFiles) -> list[LayerActivity]:
    """Of the tiny preset on 600 tokens, through attention and all."""
    return measure_activity(opt_file("bundled"), token_stream(600, TINY.shape.n_vocab))


def test_the_planted_shares_of_neurons_fire(activity: list[LayerActivity]) -> None:
    shares = [layer.active for layer in activity]
    assert shares == sorted(shares), "fewest in the first layer, most in the last"
    for il, share in enumerate(shares):
        assert share == pytest.approx(TINY.sparsity.active_share(il, TINY.shape.n_layer), rel=0.15)


def test_the_predictor_finds_99_percent_of_the_mass_and_predicts_few_in_vain(
    activity: list[LayerActivity],
) -> None:
    for layer in activity:
        assert layer.recall is not None and layer.recall_of_mass is not None and layer.predicted is not None
        assert layer.recall > 0.92 and layer.recall_of_mass > 0.985
        assert layer.active < layer.predicted < 1.5 * layer.active
    mean = mean_activity(activity)
    assert mean.recall is not None and mean.recall > 0.93
    assert mean.recall_of_mass is not None and mean.recall_of_mass > 0.989


def test_a_window_of_five_tokens_leaves_about_the_papers_share_to_be_loaded(activity: list[LayerActivity]) -> None:
    mean = mean_activity(activity)
    assert mean.newly_predicted is not None and mean.aggregated_predicted is not None and mean.predicted is not None
    assert 0.07 < mean.predicted < 0.12
    assert 0.020 < mean.newly_predicted[5] < 0.029
    assert 0.20 < mean.aggregated_predicted[4] < 0.29
    assert list(mean.newly_predicted) == sorted(mean.newly_predicted, reverse=True), "longer windows leave less"


def test_few_neurons_are_hot_and_most_are_cold(opt_file: OptFiles) -> None:
    for layer in trace(OptFile(opt_file("plain")), token_stream(600, TINY.shape.n_vocab)):
        rates = np.sort((layer.values > 0).mean(axis=0))[::-1]
        assert rates[0] > 0.8
        assert np.median(rates) < rates.mean() / 1.5
        quarter = rates[: len(rates) // 4].sum() / rates.sum()
        assert 0.5 < quarter < 0.9, "a quarter of the neurons makes most activations"


def test_the_up_matrices_are_not_of_low_rank(opt_file: OptFiles) -> None:
    up, _ = OptFile(opt_file("plain")).feed_forward(0)
    singular = np.linalg.svd(up, compute_uv=False)
    assert singular[-1] > 0.02 * singular[0]
    assert (singular[64:] ** 2).sum() > 0.05 * (singular**2).sum()


def test_a_stream_stays_with_a_subject(opt_file: OptFiles) -> None:
    file = OptFile(opt_file("plain"))
    stream = token_stream(300, TINY.shape.n_vocab)
    shuffled = [int(token) for token in np.random.default_rng(0).permutation(stream)]
    newly = [
        np.mean([newly_used(layer.values > 0, skip=16)[1] for layer in trace(file, tokens)])
        for tokens in (stream, shuffled)
    ]
    assert newly[0] < 0.87 * newly[1]


def test_streams_depend_on_their_seed_only() -> None:
    assert token_stream(50, 4096, 3) == token_stream(100, 4096, 3)[:50] != token_stream(50, 4096, 4)
    stream = token_stream(500, 300)
    assert min(stream) >= 0 and max(stream) < 300
    assert all(here != there for here, there in itertools.pairwise(stream))


def test_near_tokens_have_similar_codes() -> None:
    codes = Codes(20000, seed=0).matrix()
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    stream = token_stream(300, 20000)
    similar = [codes[a] @ codes[b] for a, b in itertools.pairwise(stream)]
    assert np.median(similar) > 0.4
    assert np.abs(codes[:200] @ codes[10000]).mean() < 0.2


@pytest.mark.parametrize("layout", ["bundled", "split"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_flash_layouts_hold_the_plain_files_weights(opt_file: OptFiles, layout: str, kind: str) -> None:
    plain, flash = OptFile(opt_file("plain", kind)), OptFile(opt_file(layout, kind))
    for name in _names(opt_file("plain", kind)):
        if ".ffn_up.weight" not in name and ".ffn_down.weight" not in name:
            assert np.array_equal(plain.tensor(name), flash.tensor(name)), name
    for il in range(TINY.shape.n_layer):
        (up, down), (flash_up, flash_down) = plain.feed_forward(il), flash.feed_forward(il)
        assert np.array_equal(up, flash_up)
        if kind == "F16":
            assert np.array_equal(down, flash_down)
        else:  # quantised along the other side
            assert np.abs(down - flash_down).max() < 0.02 * np.abs(down).max()


def test_split_and_bundled_files_hold_the_same_bits(opt_file: OptFiles) -> None:
    bundled, split = (
        {tensor.name: np.ascontiguousarray(tensor.data).view(np.uint8) for tensor in GGUFReader(path).tensors}
        for path in (opt_file("bundled", "Q8_0"), opt_file("split", "Q8_0"))
    )
    record = 2 * TINY.shape.n_embd // 32 * 34
    for name, data in bundled.items():
        if name.endswith("ffn_bundle.weight"):
            parts = split[name].reshape(2, TINY.shape.n_ff, record // 2)
            assert np.array_equal(data.reshape(TINY.shape.n_ff, record), np.concatenate(list(parts), axis=1))
        else:
            assert np.array_equal(data, split[name]), name


def test_neurons_laid_out_by_coactivity_are_the_same_model(opt_file: OptFiles) -> None:
    tokens = token_stream(40, TINY.shape.n_vocab)
    one, other = (logits(OptFile(opt_file("bundled", "F16", coactive)), tokens) for coactive in (False, True))
    assert np.allclose(one, other, atol=1e-4)
    runs = []
    for coactive in (False, True):
        layers = trace(OptFile(opt_file("bundled", "F16", coactive)), token_stream(200, TINY.shape.n_vocab))
        predicted = np.concatenate([layer.predicted for layer in layers if layer.predicted is not None])
        starts = predicted & ~np.roll(predicted, 1, axis=1)
        runs.append(predicted.sum() / starts.sum())
    assert runs[1] > 1.3 * runs[0], "fewer, longer runs to read"


def test_the_head_of_a_flash_file_is_as_documented(opt_file: OptFiles) -> None:
    reader = GGUFReader(opt_file("bundled"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    n_embd, n_ff, n_layer = TINY.shape.n_embd, TINY.shape.n_ff, TINY.shape.n_layer
    assert fields["general.architecture"] == "opt" and fields["general.alignment"] == 4096
    assert fields["opt.position_offset"] == 2 and fields["opt.feed_forward_activation"] == "relu"
    assert fields["flash.version"] == 1 and fields["flash.bundle.parts"] == ["up", "down"]
    assert fields["flash.bundle.types"] == [1, 1] and fields["flash.bundle.row_lengths"] == [n_embd, n_embd]
    assert fields["flash.bundle.offsets"] == [0, 2 * n_embd] and fields["flash.bundle.record_bytes"] == 4 * n_embd
    assert fields["flash.predictor.ranks"] == [64] * n_layer
    bundles = [tensor for tensor in reader.tensors if tensor.name.endswith("ffn_bundle.weight")]
    assert len(bundles) == n_layer
    for tensor in bundles:
        assert int(tensor.tensor_type) == 17996
        assert [int(n) for n in tensor.shape] == [4 * n_embd, n_ff]
        assert tensor.data_offset % 4096 == 0


def test_the_same_seed_gives_the_same_file_and_another_one_another(tmp_path: Path) -> None:
    contents = [
        write_opt(replace(TINY, seed=seed), tmp_path / f"{i}.gguf", "bundled").read_bytes()
        for i, seed in enumerate((5, 5, 6))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_logits_are_no_copy_of_the_input(opt_file: OptFiles) -> None:
    tokens = token_stream(100, TINY.shape.n_vocab)
    out = logits(OptFile(opt_file("plain")), tokens)
    assert np.isfinite(out).all() and 1 < out.std() < 10
    chosen = out.argmax(axis=1)
    assert len(np.unique(chosen)) > 30
    assert (chosen == np.array(tokens)).mean() < 0.2


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_the_engine_and_numpy_agree(opt_file: OptFiles, kind: str) -> None:
    tokens = token_stream(72, TINY.shape.n_vocab)
    expected = logits(OptFile(opt_file("plain", kind)), tokens)
    with open_resident(opt_file("plain", kind)) as llm:
        actual = logits_of(llm, tokens[:64], tokens[64:])
    assert np.abs(actual - expected).max() < (0.02 if kind == "F16" else 0.5)
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9


def test_the_slice_has_the_size_of_its_layers() -> None:
    model = OPT_PRESETS["opt-6.7b-slice"]
    assert 3.6e9 < opt_bytes(model) < 3.8e9
    whole = replace(model, shape=replace(model.shape, n_layer=32))
    assert 13.2e9 < opt_bytes(whole) < 13.5e9
    assert opt_bytes(model, "bundled") == opt_bytes(model, "split") > opt_bytes(model)


def test_too_small_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="n_embd"):
        OptShape(n_embd=64, n_head=4)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    arguments = ["opt-tiny", str(out), "--layers", "2", "--vocab", "600", "--type", "q8_0", "--layout", "bundled"]
    assert main([*arguments, "--measure", "64"]) == 0
    printed = capsys.readouterr().out
    assert "mean" in printed and out.name in printed
    beside = json.loads((tmp_path / "model.gguf.stream.json").read_text())
    assert beside["tokens"][:10] == token_stream(10, 600)
    assert len(beside["activity"]) == 2
    assert OptFile(out).n_layer == 2


def test_newly_used_neurons_are_counted_as_defined() -> None:
    rng = np.random.default_rng(0)
    used = rng.random((30, 40)) < 0.3
    for window, share in enumerate(newly_used(used, windows=4, skip=7)):
        counts = [(used[i] & ~used[i - window : i].any(axis=0)).mean() for i in range(7, 30)]
        assert share == pytest.approx(np.mean(counts))


def test_aggregated_use_grows_by_what_is_new() -> None:
    assert aggregated((0.1, 0.05, 0.02)) == pytest.approx((0.1, 0.15, 0.17))
    layer = layer_activity(np.maximum(np.random.default_rng(0).standard_normal((40, 50), np.float32), 0), None)
    assert layer.predicted is None and layer.recall is None
    assert layer.aggregated[0] == pytest.approx(layer.active)


def test_a_model_with_q8_weights_has_the_same_statistics(opt_file: OptFiles, activity: list[LayerActivity]) -> None:
    quantised = measure_activity(opt_file("bundled", "Q8_0"), token_stream(600, TINY.shape.n_vocab))
    for one, other in zip(activity, quantised, strict=True):
        assert other.active == pytest.approx(one.active, rel=0.03)


def _names(path: Path) -> list[str]:
    return [tensor.name for tensor in GGUFReader(path).tensors]
