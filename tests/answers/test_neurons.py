"""Feed-forward blocks computed neuron by neuron: the resident function, and the same bits whatever is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import IO_ENGINES, Logits, logits_of, open_resident, tokens
from neurons import bundled, give_neurons, open_neurons, slots_of, some_active, with_predictors, write_model

from gguf_tools.format import Activation
from gguf_tools.unbundle import unbundle
from llama_flash import FlashError, FlashFormatError

PROMPT, DECODED = tokens(70, seed=1), tokens(24, seed=2)


@pytest.fixture(scope="module")
def ungated(model_folder: Path) -> Path:
    """Squared ReLU."""
    return write_model(model_folder, "arcee", "F32")


@pytest.fixture(scope="module")
def gated(model_folder: Path) -> Path:
    return write_model(model_folder, "llama", "F32", "reglu")


def assert_close(actual: Logits, expected: Logits, share: float) -> None:
    """Within `share` of the logits' range, and of logits that could have differed."""
    assert actual.shape == expected.shape and np.isfinite(expected).all() and np.isfinite(actual).all()
    assert len(np.unique(expected.argmax(axis=1))) > 4, "the same answer for every token"
    assert np.abs(actual - expected).max() <= share * np.ptp(expected)


def resident_logits(path: Path, **options: Any) -> Logits:
    with open_resident(path, **options) as llm:
        return logits_of(llm, PROMPT, DECODED)


# float32 throughout: nothing but the order of sums differs, though the KV cache rounds to half precision
@pytest.mark.parametrize("predictor", ["exact", "off"])
@pytest.mark.parametrize("form", ["ungated", "gated"])
def test_the_function_is_the_resident_runs(form: str, predictor: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(form)
    expected = resident_logits(path, type_k=0, type_v=0)
    with open_neurons(bundled(path), predictor=predictor, type_k=0, type_v=0) as llm:
        actual = logits_of(llm, PROMPT, DECODED)
        assert llm.flash.stats().total.bytes_read > 0
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("activation", ["relu2", "fatrelu", "drelu"])
def test_every_gated_activation_is_the_resident_runs(activation: str, model_folder: Path) -> None:
    path = write_model(model_folder, "llama", "F32", activation)
    expected = resident_logits(path, type_k=0, type_v=0)
    for predictor in ("exact", "off"):
        with open_neurons(bundled(path), predictor=predictor, type_k=0, type_v=0) as llm:
            assert_close(logits_of(llm, PROMPT, DECODED), expected, 1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("form", ["arcee", "llama"])
def test_quantised_bundles_are_close_to_their_resident_twin(form: str, kind: str, model_folder: Path) -> None:
    """The twin holds the same values; its kernels round activations in another place."""
    flash = bundled(write_model(model_folder, form, kind, "reglu" if form == "llama" else None))
    twin = flash.with_name(flash.stem + "-twin.gguf")
    unbundle(flash, twin, force=True)
    expected = resident_logits(twin)
    for predictor in ("exact", "off"):
        with open_neurons(flash, predictor=predictor) as llm:
            assert_close(logits_of(llm, PROMPT, DECODED), expected, 0.02)


def everything_active(layer: int, n_embd: int, n_ff: int) -> Any:
    return np.zeros((32, n_embd), np.float32), np.zeros((n_ff, 32), np.float32), np.ones(n_ff, np.float32)


@pytest.mark.parametrize("form", ["ungated", "gated"])
def test_a_predictor_that_wants_everything_changes_nothing(
    form: str, request: pytest.FixtureRequest, model_folder: Path
) -> None:
    path: Path = request.getfixturevalue(form)
    flash = with_predictors(bundled(path), model_folder / f"all-{form}.gguf", everything_active)
    expected = resident_logits(path, type_k=0, type_v=0)
    with open_neurons(flash, predictor="lowrank", type_k=0, type_v=0) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), expected, 1e-5)


def test_neurons_that_are_not_predicted_are_zero(ungated: Path, model_folder: Path) -> None:
    """The same as a model without them: their rows of up are zero."""

    def even(layer: int, n_embd: int, n_ff: int) -> Any:
        a, b, bias = everything_active(layer, n_embd, n_ff)
        bias[1::2] = -1
        return a, b, bias

    flash = with_predictors(bundled(ungated), model_folder / "even.gguf", even)
    without = model_folder / "without-odd.gguf"
    without.write_bytes(ungated.read_bytes())
    from gguf import GGUFReader

    reader = GGUFReader(without, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("ffn_up.weight"):
            tensor.data[1::2] = 0
    reader.data.flush()
    del reader
    options = {"type_k": 0, "type_v": 0}
    with open_resident(without, **options) as resident:
        expected = logits_of(resident, PROMPT[:1], DECODED)
    with open_neurons(flash, predictor="lowrank", **options) as llm:
        assert_close(logits_of(llm, PROMPT[:1], DECODED), expected, 1e-5)


def reference(path: Path, predictor: str) -> Logits:
    with open_neurons(path, predictor=predictor, share=2.0) as llm:
        return logits_of(llm, PROMPT, DECODED)


@pytest.fixture(scope="module")
def predicted(gated: Path, model_folder: Path) -> Path:
    return with_predictors(bundled(gated), model_folder / "some-gated.gguf", some_active)


@pytest.fixture(scope="module")
def predicted_ungated(ungated: Path, model_folder: Path) -> Path:
    return with_predictors(bundled(ungated), model_folder / "some-ungated.gguf", some_active)


OTHERWISE: dict[str, dict[str, Any]] = {
    "hardly a slot": {"share": 0.0},
    "few slots": {"share": 0.1},
    "half the slots": {"share": 0.5},
    "no window": {"window": 0},
    "window of 2": {"window": 2, "share": 0.5},
    "one thread": {"n_threads": 1},
    "three threads": {"n_threads": 3},
    "nothing read ahead": {"lookahead": False},
    **{f"I/O by {name}": {"io_engine": name} for name in IO_ENGINES},
}


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.sanitize) if how == "few slots" else how for how in OTHERWISE]
)
@pytest.mark.parametrize("predictor", ["exact", "lowrank", "off"])
@pytest.mark.parametrize("form", ["predicted", "predicted_ungated"])
def test_bits_do_not_depend_on_memory_window_threads_or_reads(
    form: str, predictor: str, how: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(form)
    expected = _REFERENCES.setdefault((path, predictor), reference(path, predictor))
    with open_neurons(path, predictor=predictor, **OTHERWISE[how]) as llm:
        actual = logits_of(llm, PROMPT, DECODED)
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


# 16 tokens are decoded, 17 are a prompt
@pytest.mark.parametrize("n_ubatch", [1, 5, 16, pytest.param(17, marks=pytest.mark.sanitize)])
@pytest.mark.parametrize("predictor", ["exact", "lowrank", "off"])
def test_bits_of_small_batches_do_not_depend_on_memory_or_threads(
    predictor: str, n_ubatch: int, predicted: Path
) -> None:
    logits = []
    for share, n_threads in ((2.0, 2), (0.05, 3)):
        with open_neurons(
            predicted, predictor=predictor, share=share, n_ubatch=n_ubatch, n_batch=64, n_threads=n_threads
        ) as llm:
            llm.eval(tokens(17, seed=7))
            llm.eval(tokens(16, seed=8))
            llm.eval(tokens(33, seed=9))
            logits.append(np.array(llm.scores[: llm.n_tokens]))
    assert np.isfinite(logits[0]).all()
    assert np.array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))


@pytest.mark.parametrize("predictor", ["exact", "lowrank", "off"])
def test_memory_may_change_between_tokens(predictor: str, predicted: Path) -> None:
    """What was read ahead for the next layer is still under way then."""
    expected = _REFERENCES.setdefault((predicted, predictor), reference(predicted, predictor))
    with open_neurons(predicted, predictor=predictor, share=0.3) as llm:
        llm.eval(PROMPT)
        for k, token in enumerate(DECODED):
            give_neurons(llm, (0.0, 0.6, 2.0)[k % 3])
            llm.eval([token])
        actual = np.array(llm.scores[: llm.n_tokens])
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


_REFERENCES: dict[tuple[Path, str], Logits] = {}


@pytest.mark.parametrize("predictor", ["exact", "lowrank", "off"])
def test_a_split_file_gives_the_bits_of_a_bundled_one(predictor: str, gated: Path, model_folder: Path) -> None:
    split = with_predictors(bundled(gated, layout="split"), model_folder / "some-split.gguf", some_active)
    whole = with_predictors(bundled(gated), model_folder / "some-whole.gguf", some_active)
    logits = []
    for path in (split, whole):
        with open_neurons(path, predictor=predictor) as llm:
            logits.append(logits_of(llm, PROMPT, DECODED))
    assert np.array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))


def test_a_long_prompt_reads_each_byte_once(predicted: Path) -> None:
    with open_neurons(predicted, predictor="lowrank", share=0.1) as llm:
        llm.eval(tokens(400, seed=3))
        prompt = llm.flash.stats().prompt
        neurons = llm.flash.plan.neuron_bytes
        assert prompt.layers_repeated == 0
        assert prompt.bytes_used <= neurons
        assert prompt.bytes_read <= 1.1 * neurons


def test_a_prompt_fills_empty_slots_so_that_decoding_starts_warm(predicted: Path) -> None:
    with open_neurons(predicted, predictor="lowrank", share=0.6) as llm:
        llm.eval(tokens(100, seed=3))
        before = llm.flash.stats().total
        llm.eval(tokens(1, seed=4))
        first = llm.flash.stats().last
        assert before.hits == before.misses == 0
        assert first.hits > first.misses


def test_a_window_of_none_reads_every_active_neuron_of_every_token(predicted: Path) -> None:
    with open_neurons(predicted, predictor="lowrank", share=2.0, window=0, lookahead=False) as llm:
        give_neurons(llm, 0.9)
        llm.eval(tokens(1))
        for token in tokens(12, seed=5):
            llm.eval([token])
        decode = llm.flash.stats().decode
        assert decode.neurons_active > 0
        # the gate's op finds what the last token left, nothing older
        assert decode.misses > 0.6 * decode.neurons_active


def test_all_neurons_in_memory_are_read_once_and_never_again(predicted: Path) -> None:
    for predictor in ("exact", "lowrank", "off"):
        with open_neurons(predicted, predictor=predictor, share=2.0) as llm:
            loaded = llm.flash.native.stats().bytes_read
            logits_of(llm, PROMPT, DECODED)
            assert llm.flash.native.stats().bytes_read == loaded > 0
            assert slots_of(llm) == 0


def test_a_draft_of_several_tokens_counts_as_decoding(predicted: Path) -> None:
    with open_neurons(predicted, predictor="lowrank", share=0.6) as llm:
        llm.eval(tokens(1))
        llm.eval(tokens(5, seed=6))
        last = llm.flash.stats().last
        assert last.hits + last.misses > 0 == last.panel_reads


def test_an_adapter_on_the_block_is_honoured_by_a_prompt(model_folder: Path) -> None:
    """The sums made in passing are not those of the adapted activations: the layer passes by again."""
    from lora import write_lora

    path = write_model(model_folder, "llama", "F32", "reglu")
    adapter = model_folder / "ffn-lora.gguf"
    write_lora(path, adapter, [f"blk.{layer}.ffn_{part}.weight" for layer in range(3) for part in ("up", "down")])
    options: dict[str, Any] = {"lora_path": str(adapter), "lora_scale": 1.0, "type_k": 0, "type_v": 0}
    plain = resident_logits(path, type_k=0, type_v=0)
    expected = resident_logits(path, **options)
    assert np.abs(plain - expected).max() > 0.01 * np.ptp(plain)
    with open_neurons(bundled(path), predictor="off", **options) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), expected, 1e-5)
        assert llm.flash.stats().prompt.layers_repeated > 0
    with open_neurons(bundled(path), **options) as llm:  # auto
        assert llm.flash.stats().predictor == "off"
        assert_close(logits_of(llm, PROMPT, DECODED), expected, 1e-5)
    with pytest.raises(FlashError, match=r"ffn-lora\.gguf changes the feed-forward block of layer 0"):
        open_neurons(bundled(path), predictor="exact", **options)
    elsewhere = model_folder / "down-lora.gguf"
    write_lora(path, elsewhere, ["blk.0.ffn_down.weight", "blk.1.attn_q.weight"])
    options["lora_path"] = str(elsewhere)
    expected = resident_logits(path, **options)
    with open_neurons(bundled(path), predictor="exact", **options) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), expected, 1e-5)


def test_lowrank_without_predictors_says_what_to_do(ungated: Path) -> None:
    with pytest.raises(FlashFormatError, match="calibrate"):
        open_neurons(bundled(ungated), predictor="lowrank")


def test_auto_is_exact_where_there_is_room_and_says_so(predicted: Path) -> None:
    with open_neurons(predicted) as llm:
        assert llm.flash.stats().predictor == "exact"
        assert "exact (gate resident)" in llm.flash.summary


def test_the_activation_of_the_file_is_read_by_both_packages(gated: Path) -> None:
    from gguf_tools.format import read_flash
    from gguf_tools.source import open_gguf
    from llama_flash.model.bundles import read_bundles
    from llama_flash.model.gguf import read_gguf

    path = bundled(gated)
    ours, theirs = read_bundles(read_gguf(path)), read_flash(open_gguf(path), path)
    assert ours is not None and theirs is not None
    assert isinstance(theirs.activation, Activation) and ours.format.activation == theirs.activation.name == "reglu"
    assert ours.format.record_bytes == theirs.bundle.record_bytes
