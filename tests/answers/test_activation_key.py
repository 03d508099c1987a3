"""`<arch>.feed_forward_activation` decides what is computed between up and down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import logits_of, open_resident
from numpy_models import ACTIVATIONS, F32_ATTENTION, N_VOCAB, THRESHOLD, TinyModel, activation, assert_close

TOKENS = [int(token) for token in np.random.default_rng(6).integers(0, N_VOCAB, 32)]
PROMPT, DECODED = TOKENS[:28], TOKENS[28:]
GATED = TinyModel("llama", activation("silu", gated=True))
FORMS = {
    "llama": GATED,
    "arcee": TinyModel("arcee", activation("relu2", gated=False)),
    "opt": TinyModel("opt", activation("relu", gated=False)),
}
CASES = [
    (form, name)
    for form, model in FORMS.items()
    for name, ways in ACTIVATIONS.items()
    for way in ways
    if way.gated == model.gated
]


def with_activation(model: TinyModel, name: str, **keys: Any) -> TinyModel:
    return replace(model, keys=model.keys | {"feed_forward_activation": name} | keys)


@pytest.mark.parametrize(("form", "name"), CASES)
def test_each_activation_is_computed_as_named(form: str, name: str, tmp_path: Path) -> None:
    model = with_activation(FORMS[form], name, feed_forward_activation_threshold=THRESHOLD)
    model = replace(model, activation=activation(name, model.gated))
    with open_resident(model.write(tmp_path / "model.gguf"), **F32_ATTENTION) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), model.logits(TOKENS))


@pytest.mark.parametrize("form", FORMS)
def test_without_the_key_each_architecture_computes_its_own(form: str, tmp_path: Path) -> None:
    model = FORMS[form]
    with open_resident(model.write(tmp_path / "model.gguf"), **F32_ATTENTION) as llm:
        assert_close(logits_of(llm, PROMPT, DECODED), model.logits(TOKENS))


def test_gelu_differs_from_silu_alone(tmp_path: Path) -> None:
    """The engine looks gelu up in a table, so that numpy cannot say to which bit."""
    logits = []
    for name in ("gelu", "silu"):
        with open_resident(with_activation(GATED, name).write(tmp_path / f"{name}.gguf"), **F32_ATTENTION) as llm:
            logits.append(logits_of(llm, PROMPT, DECODED))
    assert np.isfinite(logits).all() and np.abs(logits[0] - logits[1]).max() > 0.1


NAN = float("nan")
REFUSED: dict[str, tuple[TinyModel, str]] = {
    "an unknown name": (with_activation(GATED, "swish9"), "unknown feed-forward activation 'swish9'"),
    "an empty name": (with_activation(GATED, ""), "unknown feed-forward activation ''"),
    "a number": (replace(GATED, keys={"feed_forward_activation": 3}), "llama.feed_forward_activation has wrong type"),
    "fatrelu without a threshold": (
        with_activation(GATED, "fatrelu"),
        "key not found in model: llama.feed_forward_activation_threshold",
    ),
    "fatrelu with a threshold that is not a number": (
        with_activation(GATED, "fatrelu", feed_forward_activation_threshold=NAN),
        "llama.feed_forward_activation_threshold is nan",
    ),
    "relu with gates": (with_activation(GATED, "relu"), "'relu' is for layers without a gate, but layer 0 has one"),
    "reglu without gates": (with_activation(FORMS["arcee"], "reglu"), "'reglu' needs a gate, but layer 0 has none"),
    "drelu without gates": (with_activation(FORMS["opt"], "drelu"), "'drelu' needs a gate, but layer 0 has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, message = REFUSED[case]
    with pytest.raises(ValueError):
        open_resident(model.write(tmp_path / "model.gguf"), verbose=True)
    assert message in capfd.readouterr().err


def test_an_architecture_without_such_layers_refuses_the_key(
    model_file: ModelFile, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError):
        open_resident(model_file("olmoe"), kv_overrides={"olmoe.feed_forward_activation": "relu2"}, verbose=True)
    assert "the architecture olmoe has no use for feed_forward_activation" in capfd.readouterr().err
