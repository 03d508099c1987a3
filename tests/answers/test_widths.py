"""A token's logits are the same bits however many others are computed with it: alone, in a prompt, as a draft that is
checked, beside other sequences. Whole arrays, resident and from flash, repacked and as the file has the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from architecture_page import ALL
from architectures import N_VOCAB, write
from conftest import ModelFile
from engines import Model, assert_same_logits, open_flash, open_resident, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp
from neurons import bundled, open_neurons, some_active, with_predictors, write_model
from widths import Row, Sequences, different_rows, in_passes, sequences

WIDTHS = (2, 3, 5, 8, 16, 32, 64)
TEXT = tokens(64, seed=1)
OPTIONS: dict[str, Any] = {"n_ctx": 128, "n_batch": 64, "n_ubatch": 64}

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
FORMS = ("llama", "qwen3moe", "deepseek2")
HOW = ("resident", "not repacked", "flash")
# every type with every form and every way; a third of the cases is `full`
CASES = [
    pytest.param(form, kind, HOW[(i + k) % 3], marks=pytest.mark.full if k == 2 else ())
    for i, kind in enumerate(TYPES)
    for k, form in enumerate((*FORMS[i % 3 :], *FORMS[: i % 3]))
]


@contextmanager
def opened(path: Path, how: str, **options: Any) -> Iterator[Model]:
    defaults = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    with ExitStack() as stack:
        if how == "not repacked":
            stack.enter_context(patch.object(llama_cpp, "llama_model_default_params", without_repacking))
        yield stack.enter_context((open_flash if how == "flash" else open_resident)(path, **OPTIONS, **options))


def assert_no_width_matters(llm: Model, text: list[int] = TEXT) -> None:
    alone = in_passes(llm, text, 1)
    assert len(np.unique(alone.argmax(axis=1))) > 4, "these values say nothing"
    assert {width: different_rows(in_passes(llm, text, width), alone) for width in WIDTHS} == dict.fromkeys(WIDTHS, 0)


@pytest.mark.parametrize(("form", "kind", "how"), CASES)
def test_no_width_changes_a_bit(form: str, kind: str, how: str, model_file: ModelFile) -> None:
    with opened(model_file(form, kind), how) as llm:
        assert_no_width_matters(llm)


@pytest.mark.parametrize("how", ["resident", "flash"])
def test_no_width_changes_a_bit_when_types_are_mixed(how: str, model_file: ModelFile) -> None:
    with opened(model_file("qwen3moe", "Q4_K_M"), how) as llm:
        assert_no_width_matters(llm)


# attention's flash kernel has one way for every width where the cache is quantised (the page says what it has else)
def test_no_width_changes_a_bit_with_a_quantised_cache(model_file: ModelFile) -> None:
    with opened(model_file("llama", "Q8_0"), "resident", flash_attn=True, type_k=8, type_v=8) as llm:
        assert_no_width_matters(llm)


def test_neither_batch_nor_ubatch_changes_a_bit(model_file: ModelFile) -> None:
    path, text = model_file("qwen3moe", "Q4_K"), tokens(300, seed=5)
    found = []
    for n_batch, n_ubatch in ((512, 512), (512, 7), (64, 32)):
        with open_flash(path, n_batch=n_batch, n_ubatch=n_ubatch) as llm:
            found.append(in_passes(llm, text, n_batch))
    for logits in found[1:]:
        assert_same_logits(logits, found[0], len(text))


@pytest.mark.parametrize("predictor", ["exact", "off"])
@pytest.mark.parametrize(("form", "kind"), [("arcee", "Q4_0"), ("llama", "F16"), ("llama", "Q8_0")])
def test_no_width_changes_a_bit_of_neurons(form: str, kind: str, predictor: str, model_folder: Path) -> None:
    """16 tokens are computed neuron by neuron, more of them as the layer passes by."""
    path = bundled(write_model(model_folder, form, kind, "reglu" if form == "llama" else None))
    with open_neurons(path, predictor=predictor) as llm:
        assert_no_width_matters(llm)


@pytest.mark.parametrize("form", ["arcee", "llama"])
def test_tokens_of_a_pass_are_predicted_one_by_one(form: str, model_folder: Path) -> None:
    """Up to 16 at once: what a token computes is what its own input asks for. Prompts are computed in full."""
    path = bundled(write_model(model_folder, form, "Q8_0", "reglu" if form == "llama" else None))
    path = with_predictors(path, model_folder / f"width-{form}.gguf", some_active)
    with open_neurons(path, predictor="lowrank") as llm:
        alone = in_passes(llm, TEXT, 1)
        assert [different_rows(in_passes(llm, TEXT, width), alone) for width in (2, 3, 5, 8, 16)] == [0] * 5
        assert different_rows(in_passes(llm, TEXT, 32), alone) > 0, "say so in docs/explanation/width.md"


ONE_OF_EACH = ["llama", "gemma3", "gpt2", "mamba2", "rwkv7", "qwen3next", "chameleon"]
LATER = [case.arch for case in ALL if case.arch not in ONE_OF_EACH]
# whole texts at once, or only after an encoder; blocks of recurrence as long as the pass
NO_STEPS = frozenset(
    [
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
        "llama-embed",
        "dream",
        "llada",
        "llada-moe",
        "rnd1",
        "wavtokenizer-dec",
        "t5",
        "t5encoder",
        "minimax-01",
    ]
)


def assert_no_width_matters_to(arch: str, ftype: str, model_folder: Path) -> None:
    path = write(arch, model_folder / f"width-{arch}-{ftype}.gguf", ftype)
    try:
        with opened(path, "resident") as llm:
            assert_no_width_matters(llm, tokens(64, N_VOCAB, seed=1))
    finally:
        path.unlink()


@pytest.mark.parametrize("arch", ONE_OF_EACH)
def test_no_width_changes_a_bit_of_an_architecture(arch: str, model_folder: Path) -> None:
    """In float32, whose rounding hides nothing."""
    assert_no_width_matters_to(arch, "plain", model_folder)


@pytest.mark.full
@pytest.mark.parametrize("arch", [arch for arch in LATER if arch not in NO_STEPS])
def test_no_width_changes_a_bit_of_any_architecture(arch: str, model_folder: Path) -> None:
    assert_no_width_matters_to(arch, "plain", model_folder)


@pytest.mark.full
@pytest.mark.parametrize(
    "ftype",
    ["iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m", "tq1_0", "tq2_0", "q5_0", "q5_1", "q4_1"],
)
def test_no_width_changes_a_bit_of_small_types(ftype: str, model_folder: Path) -> None:
    assert_no_width_matters_to("qwen3moe", ftype, model_folder)


# several sequences

N_SEQUENCES, LENGTH = 4, 40
TEXTS = [tokens(LENGTH, seed=10 + sequence) for sequence in range(N_SEQUENCES)]
# for each pass: how many tokens each sequence goes on by, and how many are drafted beyond and refused
PASSES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 12), min_size=N_SEQUENCES, max_size=N_SEQUENCES),
        st.lists(st.sampled_from([0, 0, 0, 1, 4]), min_size=N_SEQUENCES, max_size=N_SEQUENCES),
    ),
    min_size=3,
    max_size=12,
)


def rows_of(sequence: int, begin: int, n: int) -> list[Row]:
    return [(sequence, begin + i, token) for i, token in enumerate(TEXTS[sequence][begin : begin + n])]


def alone(context: Sequences) -> dict[tuple[int, int], Any]:
    """Every sequence by itself, token by token."""
    found = {}
    for sequence in range(N_SEQUENCES):
        context.clear()
        for row in rows_of(sequence, 0, LENGTH):
            found |= context.compute([row])
    return found


@pytest.fixture(scope="module", params=["resident-F16", "resident-Q4_K", "flash-Q8_0"])
def crowd(request: pytest.FixtureRequest, model_file: ModelFile) -> Iterator[tuple[Sequences, dict[Any, Any]]]:
    how, quantisation = request.param.split("-")
    with opened(model_file("qwen3moe", quantisation), how) as llm, sequences(llm, N_SEQUENCES) as context:
        yield context, alone(context)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(passes=PASSES)
def test_neither_neighbours_nor_drafts_change_a_bit(passes: Any, crowd: tuple[Sequences, dict[Any, Any]]) -> None:
    context, expected = crowd
    context.clear()
    done = [0] * N_SEQUENCES
    for steps, drafts in passes:
        rows, refused = [], []
        for sequence, (step, draft) in enumerate(zip(steps, drafts, strict=True)):
            goes_on = rows_of(sequence, done[sequence], step)
            done[sequence] += len(goes_on)
            wrong = range(done[sequence], done[sequence] + draft) if goes_on else range(0)
            rows += [*goes_on, *((sequence, position, 7) for position in wrong)]
            refused += [(sequence, position) for position in wrong]
        if not rows:
            continue
        found = context.compute(rows)
        for sequence in {sequence for sequence, _ in refused}:
            context.forget(sequence, done[sequence])
        for key in found.keys() - set(refused):
            assert np.array_equal(found[key].view(np.uint32), expected[key].view(np.uint32)), key
