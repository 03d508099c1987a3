"""Experts whose neurons are read one by one: the resident function, and the same bits whatever is in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from bundled_experts import ARCH, FLASH, Tensors, TinyExperts, V, write
from caps import require_caps
from engines import IO_ENGINES, Logits, logits_of, open_resident, tokens
from gguf import GGMLQuantizationType as K
from llama_cpp._internals import LlamaModel
from llama_cpp._logger import set_verbose
from neurons import give_neurons, open_neurons, slots_of
from test_neurons import DECODED, OTHERWISE, PROMPT, assert_close

from llama_flash import FlashFormatError, run_capped

MODES = ("exact", "off")
F32_CACHE: dict[str, Any] = {"type_k": 0, "type_v": 0}


def written(folder: Path, model: TinyExperts) -> tuple[Path, Path]:
    """The ordinary file and the one with bundles."""
    name = f"experts-{model.kind.name}-{model.n_layer}-{model.n_ff}-{model.n_expert}-{model.n_expert_used}"
    plain, flash = folder / f"{name}.gguf", folder / f"{name}-bundled.gguf"
    if not flash.exists():
        model.write(plain)
        model.write_bundled(flash)
    return plain, flash


@pytest.fixture(scope="module")
def files(model_folder: Path) -> tuple[Path, Path]:
    return written(model_folder, TinyExperts())


@pytest.fixture(scope="module")
def flash(files: tuple[Path, Path]) -> Path:
    return files[1]


def assert_same_bits(actual: Logits, expected: Logits) -> None:
    assert np.isfinite(expected).all() and len(np.unique(expected.argmax(axis=1))) > 4
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


# 16 tokens are decoded, 17 are a prompt; the last one of 200 is longer than any ubatch of a decode
@pytest.mark.parametrize("n_prompt", [1, 17, 200])
@pytest.mark.parametrize("predictor", MODES)
def test_the_function_is_the_resident_runs(predictor: str, n_prompt: int, files: tuple[Path, Path]) -> None:
    prompt = tokens(n_prompt, seed=1)
    with open_resident(files[0], **F32_CACHE) as llm:
        expected = logits_of(llm, prompt, DECODED)
    with open_neurons(files[1], predictor=predictor, **F32_CACHE) as llm:
        actual = logits_of(llm, prompt, DECODED)
        total = llm.flash.stats().total
    assert total.bytes_read > 0 == total.layers_repeated
    assert_close(actual, expected, 1e-5)
    assert np.array_equal(actual.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize("model", [TinyExperts(n_expert_used=1), TinyExperts(n_expert=1, n_expert_used=1, n_ff=40)])
@pytest.mark.parametrize("predictor", MODES)
def test_one_expert_of_a_token_is_the_resident_runs(predictor: str, model: TinyExperts, model_folder: Path) -> None:
    plain, flash = written(model_folder, model)
    with open_resident(plain, **F32_CACHE) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    with open_neurons(flash, predictor=predictor, **F32_CACHE) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), expected, 1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_quantised_experts_are_close_to_their_resident_twin(kind: str, model_folder: Path) -> None:
    plain, flash = written(model_folder, TinyExperts(K[kind]))
    with open_resident(plain) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    for predictor in MODES:
        with open_neurons(flash, predictor=predictor) as llm:
            assert_close(logits_of(llm, PROMPT, DECODED), expected, 0.02)


_REFERENCES: dict[str, Logits] = {}


def reference(flash: Path, predictor: str) -> Logits:
    if predictor not in _REFERENCES:
        with open_neurons(flash, predictor=predictor, share=2.0) as llm:
            _REFERENCES[predictor] = logits_of(llm, PROMPT, DECODED)
    return _REFERENCES[predictor]


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.sanitize) if how == "few slots" else how for how in OTHERWISE]
)
@pytest.mark.parametrize("predictor", MODES)
def test_bits_do_not_depend_on_memory_window_threads_or_reads(predictor: str, how: str, flash: Path) -> None:
    with open_neurons(flash, predictor=predictor, **OTHERWISE[how]) as llm:
        actual = logits_of(llm, PROMPT, DECODED)
    assert_same_bits(actual, reference(flash, predictor))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("predictor", MODES)
def test_bits_of_repacked_experts_do_not_depend_on_memory_or_threads(
    predictor: str, kind: str, model_folder: Path
) -> None:
    _, path = written(model_folder, TinyExperts(K[kind]))
    logits = []
    for share, n_threads, io_engine in ((2.0, 2, "auto"), (0.05, 3, IO_ENGINES[-1]), (0.6, 1, "auto")):
        with open_neurons(path, predictor=predictor, share=share, n_threads=n_threads, io_engine=io_engine) as llm:
            logits.append(logits_of(llm, PROMPT, DECODED))
    assert_same_bits(logits[1], logits[0])
    assert_same_bits(logits[2], logits[0])


@pytest.mark.parametrize("n_ubatch", [1, 5, 16, pytest.param(17, marks=pytest.mark.sanitize)])
@pytest.mark.parametrize("predictor", MODES)
def test_bits_of_small_batches_do_not_depend_on_memory_or_threads(predictor: str, n_ubatch: int, flash: Path) -> None:
    logits = []
    for share, n_threads in ((2.0, 2), (0.05, 3), (0.9, 1)):
        with open_neurons(
            flash, predictor=predictor, share=share, n_ubatch=n_ubatch, n_batch=64, n_threads=n_threads
        ) as llm:
            for n, seed in ((17, 7), (16, 8), (33, 9)):
                llm.eval(tokens(n, seed=seed))
            logits.append(np.array(llm.scores[: llm.n_tokens]))
    assert_same_bits(logits[1], logits[0])
    assert_same_bits(logits[2], logits[0])


@pytest.mark.parametrize("predictor", MODES)
def test_memory_may_change_between_tokens(predictor: str, flash: Path) -> None:
    with open_neurons(flash, predictor=predictor, share=0.3) as llm:
        llm.eval(PROMPT)
        for k, token in enumerate(DECODED):
            give_neurons(llm, (0.0, 0.6, 2.0, 0.9)[k % 4])
            llm.eval([token])
        actual = np.array(llm.scores[: llm.n_tokens])
    assert_same_bits(actual, reference(flash, predictor))


@pytest.mark.parametrize("predictor", MODES)
def test_several_sequences_at_once_are_the_resident_runs(predictor: str, files: tuple[Path, Path]) -> None:
    texts = ["three", "sequences of different", "lengths, " * 20]
    options: dict[str, Any] = {"embedding": True, "logits_all": False, **F32_CACHE}
    with open_resident(files[0], **options) as llm:
        expected = llm.embed(texts)
    found = []
    for share in (0.1, 2.0):
        with open_neurons(files[1], predictor=predictor, share=share, **options) as llm:
            found.append(llm.embed(texts))
    for one, other, resident in zip(*found, expected, strict=True):
        assert np.array_equal(one, other)
        assert np.abs(np.subtract(one, resident)).max() <= 1e-5 * np.ptp(resident)


# what is read

ONE_LAYER = TinyExperts(n_layer=1)  # whose experts follow from the token alone


def read_so_far(llm: Any) -> npt.NDArray[np.uint64]:
    """Bytes of records, and with what was read beside them; what the load read of the gates is among them."""
    raw = llm.flash.native.stats()
    return np.array([raw.bytes_used, raw.bytes_read], np.uint64)


@pytest.mark.parametrize("predictor", MODES)
def test_a_long_prompt_reads_each_byte_once(predictor: str, flash: Path) -> None:
    with open_neurons(flash, predictor=predictor, share=0.1) as llm:
        before = read_so_far(llm)
        llm.eval(tokens(400, seed=3))
        used, read = read_so_far(llm) - before
        neurons = llm.flash.plan.neuron_bytes
        assert llm.flash.stats().prompt.layers_repeated == 0
    assert used == neurons
    assert read <= 1.1 * neurons


@pytest.mark.parametrize("predictor", MODES)
def test_a_prompt_reads_only_the_experts_that_it_uses(predictor: str, model_folder: Path) -> None:
    _, path = written(model_folder, ONE_LAYER)
    with open_neurons(path, predictor=predictor, share=0.1) as llm:
        before = read_so_far(llm)
        llm.eval([7] * 40)
        assert (read_so_far(llm) - before)[0] == llm.flash.plan.neuron_bytes * 3 // 8


def test_a_token_reads_the_experts_that_it_uses_and_of_them_what_is_open(model_folder: Path) -> None:
    _, path = written(model_folder, ONE_LAYER)
    misses = {}
    for predictor in MODES:
        with open_neurons(path, predictor=predictor, share=0.9) as llm:
            llm.eval([7])
            last = llm.flash.stats().last
            assert last.hits == 0
            misses[predictor] = last.misses
    assert misses["off"] == 3 * ONE_LAYER.n_ff
    assert 0.3 * misses["off"] < misses["exact"] < 0.7 * misses["off"]  # half of random gates are open


def test_experts_too_large_for_the_slots_are_read_once_for_each_token(model_folder: Path) -> None:
    _, path = written(model_folder, ONE_LAYER)
    with open_neurons(path, predictor="off", share=0.0) as llm:
        before = read_so_far(llm)
        llm.eval([7])
        assert (read_so_far(llm) - before)[0] == llm.flash.plan.neuron_bytes * 3 // 8


@pytest.mark.parametrize("predictor", MODES)
def test_a_prompt_fills_empty_slots_so_that_decoding_starts_warm(predictor: str, flash: Path) -> None:
    with open_neurons(flash, predictor=predictor, share=0.6) as llm:
        llm.eval(tokens(100, seed=3))
        assert llm.flash.stats().total.hits == llm.flash.stats().total.misses == 0
        llm.eval(tokens(1, seed=4))
        first = llm.flash.stats().last
        assert first.hits > first.misses


def test_all_experts_in_memory_are_read_once_and_never_again(flash: Path) -> None:
    for predictor in MODES:
        with open_neurons(flash, predictor=predictor, share=2.0) as llm:
            loaded = llm.flash.native.stats().bytes_read
            logits_of(llm, PROMPT, DECODED)
            assert llm.flash.native.stats().bytes_read == loaded > 0
            assert slots_of(llm) == 0


# how the active neurons are found


def test_lowrank_is_refused(flash: Path) -> None:
    with pytest.raises(FlashFormatError, match="experts have no predictors"):
        open_neurons(flash, predictor="lowrank")


def test_auto_is_exact_where_the_gates_leave_room_else_whole_experts_and_says_so(flash: Path) -> None:
    with open_neurons(flash) as llm:
        session = llm.flash
        assert session.stats().predictor == "exact" and "exact (gate resident)" in session.summary
        least = session.native.requirements().min_memory
        needs = session._load.choose_predictor(least + (1 << 20))
        assert session.predictor == "off" and "whole experts are read" in session._load.line()
        assert needs.min_memory < least


# a real cap

LARGE = TinyExperts(K.Q8_0, n_layer=4, n_embd=1024, n_ff=512, n_expert=48, n_expert_used=4, n_head=8)
_CHILD = """
import json, sys
import llama_cpp, llama_flash
import numpy as np

path, flash, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
try:
    llm = llama_cpp.Llama(path, n_ctx=256, n_batch=64, n_ubatch=64, n_threads=2, verbose=False, flash_offload=flash)
except llama_flash.FlashBudgetError as error:
    open(out, "w").write(json.dumps({"smallest": error.smallest}))
    sys.exit(1)
rng = np.random.default_rng(1)
llm.eval(rng.integers(0, llm.n_vocab(), 100).tolist())
tokens = []
for _ in range(24):
    tokens.append(int(llm.sample(temp=0.0)))
    llm.eval([tokens[-1]])
open(out, "w").write(json.dumps({"tokens": tokens, "flash": llm.flash.stats().as_dict()}))
"""


@pytest.mark.full
def test_the_smallest_budget_that_is_named_is_kept_and_gives_the_same_tokens(
    model_folder: Path, tmp_path: Path
) -> None:
    require_caps()
    path, out = LARGE.write_bundled(model_folder / "experts-large.gguf"), tmp_path / "out.json"

    def arguments(predictor: str, budget: int) -> list[str]:
        options = {"predictor": predictor, "dram_budget": budget}
        return [sys.executable, "-c", _CHILD, str(path), json.dumps(options), str(out)]

    try:
        for predictor in MODES:
            subprocess.run(arguments(predictor, 4 << 30), timeout=300, check=True)
            free = json.loads(out.read_text())
            assert subprocess.run(arguments(predictor, 64 << 20), timeout=300, check=False).returncode == 1
            budget = int(1.03 * json.loads(out.read_text())["smallest"])  # what it takes differs from run to run
            assert budget < path.stat().st_size * 0.8
            result = run_capped(budget, arguments(predictor, budget), timeout=300, capture_output=True)
            assert result.returncode == 0 and result.oom_kills == 0, result
            assert result.peak_bytes is not None and 0 < result.peak_bytes <= budget
            capped = json.loads(out.read_text())
            assert len(set(free["tokens"])) > 4 and capped["tokens"] == free["tokens"]
            assert capped["flash"]["decode"]["bytes_read"] > 0 == free["flash"]["decode"]["bytes_read"]
    finally:
        path.unlink()


# bad files

SMALL = TinyExperts(n_layer=2, n_embd=64, n_ff=32, n_expert=4, n_expert_used=2, n_vocab=260)
RECORD = 3 * SMALL.row_bytes
BUNDLE = "blk.1.ffn_bundle_exps.weight"
Change = Callable[[dict[str, Any], Tensors], None]


def key(name: str, value: Any) -> Change:
    """None: without it."""

    def change(keys: dict[str, Any], tensors: Tensors) -> None:
        keys.pop(name, None)
        if value is not None:
            keys[name] = value

    return change


def tensor(name: str, data: npt.NDArray[Any]) -> Change:
    return lambda keys, tensors: tensors.update({name: (data, FLASH if data.dtype == np.uint8 else int(K.F32))})


def changes(*each: Change) -> Change:
    def change(keys: dict[str, Any], tensors: Tensors) -> None:
        for one in each:
            one(keys, tensors)

    return change


def records(*shape: int) -> npt.NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


def floats(*shape: int) -> npt.NDArray[np.float32]:
    return np.zeros(shape, np.float32)


NO_GATE = changes(
    key("flash.bundle.parts", ["up", "down"]),
    key("flash.bundle.types", ([0, 0], V.UINT32)),
    key("flash.bundle.row_lengths", ([64, 64], V.UINT32)),
    key("flash.bundle.offsets", ([0, 256], V.UINT64)),
    key("flash.bundle.record_bytes", np.uint64(512)),
    key(f"{ARCH}.feed_forward_activation", "relu"),
    tensor("blk.0.ffn_bundle_exps.weight", records(4, 32, 512)),
    tensor(BUNDLE, records(4, 32, 512)),
)
DENSE = changes(key(f"{ARCH}.feed_forward_length", 32), tensor("blk.1.ffn_bundle.weight", records(32, RECORD)))

# what is done to keys and tensors -> what llama_flash says, what the engine says (None: it has no objection)
REFUSED: list[tuple[Change, str, str | None]] = [
    (tensor(BUNDLE, records(4, 32, RECORD - 1)), r"shape \[767, 32, 4\], expected \[768, 32, 4\]", "has the shape"),
    (tensor(BUNDLE, records(4, 31, RECORD)), r"shape \[768, 31, 4\], expected \[768, 32, 4\]", "has the shape"),
    (tensor(BUNDLE, records(3, 32, RECORD)), r"shape \[768, 32, 3\], expected \[768, 32, 4\]", "has the shape"),
    (tensor(BUNDLE, records(128, RECORD)), r"shape \[768, 128\], expected \[768, 32, 4\]", "has the shape"),
    (tensor(BUNDLE, records(2, 2, 32, RECORD)), r"shape \[768, 32, 2, 2\], expected", "has the shape"),
    (tensor(BUNDLE, floats(4, 32, RECORD)), "is of type F32, expected FLASH", "of type f32 has the shape"),
    (key(f"{ARCH}.expert_count", 5), r"shape \[768, 32, 4\], expected \[768, 32, 5\]", r"[768, 32, 5]"),
    (key(f"{ARCH}.expert_count", None), "expert_count is missing", "expert_count"),
    (key(f"{ARCH}.expert_feed_forward_length", 33), r"expected \[768, 33, 4\]", r"[768, 33, 4]"),
    (key(f"{ARCH}.expert_feed_forward_length", None), "feed_forward_length is missing", "expert_feed_forward_length"),
    (key(f"{ARCH}.expert_used_count", 5), "expert_used_count is 5 of 4", None),
    (key(f"{ARCH}.expert_used_count", None), "expert_used_count is missing", None),
    (DENSE, "is there besides blk.1.ffn_bundle", "layer 1 has neuron bundles of both kinds"),
    *(
        (
            tensor(f"blk.1.ffn_{part}_exps.weight", floats(4, *((64, 32) if part == "down" else (32, 64)))),
            f"blk.1.ffn_{part}_exps.weight is there besides {BUNDLE}",
            f"'blk.1.ffn_{part}_exps.weight' is in the file and also in '{BUNDLE}'",
        )
        for part in ("gate", "up", "down")
    ),
    *(
        (tensor(f"blk.0.ffn_{part}_exps.bias", floats(4, 32)), f"ffn_{part}_exps.bias is there besides", None)
        for part in ("gate", "up", "down")
    ),
    (tensor("blk.0.ffn_up.weight", floats(32, 64)), "blk.0.ffn_up.weight is there besides", None),
    (tensor("blk.0.ffn_up.bias", floats(32)), "blk.0.ffn_up.bias is there besides", None),
    (tensor("blk.0.ffn_predictor.bias", floats(32)), "ffn_predictor.bias is there, but .* layer 0 no rank", None),
    (key("flash.bundle.layout", "split"), "flash.bundle.layout is 'split'", "bundles of experts have a gate"),
    (key(f"{ARCH}.feed_forward_activation", "relu2"), "is 'relu2', but that of", "bundles of experts have a gate"),
    (NO_GATE, "the bundles have no gate", "bundles of experts have a gate"),
    (key("flash.version", None), "is there without", "the key flash.version is missing"),
    (key(f"{ARCH}.block_count", 1), "the model has 1 layers", "is not the neuron bundle of a layer"),
    (key("general.architecture", "llama"), "key llama.block_count is missing", "llama.block_count"),
]  # fmt: skip


def changed(case: int, path: Path) -> Path:
    keys, tensors = SMALL.keys() | SMALL.flash_keys(), SMALL.flash_tensors()
    REFUSED[case][0](keys, tensors)
    return write(path, keys, tensors, SMALL.n_vocab)


def test_the_file_from_which_the_others_are_made_loads(tmp_path: Path) -> None:
    with open_neurons(SMALL.write_bundled(tmp_path / "good.gguf")) as llm:
        llm.eval([1, 2, 3])
        assert llm.flash.plan.n_neurons == 2 * 4 * 32


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=[said for _, said, _ in REFUSED])
def test_a_file_that_contradicts_itself_is_refused(case: int, tmp_path: Path) -> None:
    with pytest.raises(FlashFormatError, match=REFUSED[case][1]):
        open_neurons(changed(case, tmp_path / "bad.gguf"))


@pytest.mark.parametrize(
    "case", [case for case, (_, _, said) in enumerate(REFUSED) if said], ids=[said for _, _, said in REFUSED if said]
)
def test_the_engine_refuses_it_too(case: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = REFUSED[case][2]
    assert said is not None
    set_verbose(True)
    with pytest.raises(ValueError):
        LlamaModel(
            path_model=str(changed(case, tmp_path / "bad.gguf")),
            params=llama_cpp.llama_model_default_params(),
            verbose=True,
        )
    assert said in capfd.readouterr().err


def test_an_architecture_of_other_experts_is_refused(tmp_path: Path) -> None:
    old = SMALL.keys() | SMALL.flash_keys()
    keys = {name.replace(ARCH, "qwen3moe"): value for name, value in old.items()} | {"general.architecture": "qwen3moe"}
    path = write(tmp_path / "other.gguf", keys, SMALL.flash_tensors(), SMALL.n_vocab)
    with pytest.raises(FlashFormatError, match="'qwen3moe', but experts can be in bundles in smallthinker"):
        open_neurons(path)


def test_without_flash_offload_the_file_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = SMALL.write_bundled(tmp_path / "good.gguf")
    with pytest.raises(FlashFormatError, match="flash_offload=True"):
        open_resident(path)
    set_verbose(True)
    with pytest.raises(ValueError):
        LlamaModel(path_model=str(path), params=llama_cpp.llama_model_default_params(), verbose=True)
    assert "the file holds neuron bundles" in capfd.readouterr().err
