"""Verification: files that hold the same model are told from those that do not, and where they differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import ModelFile
from dense_models import ArraySource, ArrayTensor, dense_model, tensor, u32
from gguf import GGMLQuantizationType as K
from gguf_strategies import few
from hypothesis import given
from hypothesis import strategies as st

from gguf_tools import GgufToolsError
from gguf_tools.bundle import bundle
from gguf_tools.format import weight_name
from gguf_tools.synthetic.opt_cli import OPT_PRESETS
from gguf_tools.synthetic.opt_writer import Layout, write_opt
from gguf_tools.unbundle import unbundle
from gguf_tools.verify import TensorResult, Verification, verify

Order = npt.NDArray[np.int64]


def rows_of(model: ArraySource, name: str) -> npt.NDArray[np.uint8]:
    stored = model.tensors[name]
    assert isinstance(stored, ArrayTensor)
    return stored.rows


def with_rows(model: ArraySource, name: str, rows: npt.NDArray[np.uint8]) -> ArraySource:
    stored = model.tensors[name]
    assert isinstance(stored, ArrayTensor)
    return model.with_tensors(replace(stored, rows=rows))


def reordered(model: ArraySource, il: int, order: Order, *, biases: bool = True) -> ArraySource:
    """The same function, with the neurons of a layer (of type F32) in another order."""
    for part in ("gate", "up"):
        name = weight_name(il, part)
        model = with_rows(model, name, rows_of(model, name)[order])
        bias = f"blk.{il}.ffn_{part}.bias"
        if biases and bias in model.tensors:
            model = with_rows(model, bias, columns(rows_of(model, bias), order))
    name = weight_name(il, "down")
    return with_rows(model, name, columns(rows_of(model, name), order))


def columns(rows: npt.NDArray[np.uint8], order: Order) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(rows.view(np.float32)[:, order]).view(np.uint8)


def results(verification: Verification) -> dict[str, TensorResult]:
    return {result.name: result for result in verification.tensors if result.status != "identical"}


def test_a_file_is_itself_bundled_or_not(model_file: ModelFile, tmp_path: Path) -> None:
    for form in ("arcee", "mixtral", "deepseek2-fused"):
        assert verify(model_file(form), model_file(form)).same
    bundle(model_file("arcee"), tmp_path / "a.gguf")
    bundle(model_file("arcee"), tmp_path / "b.gguf", layout="split")
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf")
    for a, b in ("aa", "ab", "ac", "cb"):
        found = verify(tmp_path / f"{a}.gguf", tmp_path / f"{b}.gguf", memory=1 << 16)
        assert found.same
        assert found.counts() == {"identical": 27}


@pytest.mark.parametrize("kind", [K.F32, K.F16])
def test_bundling_without_quantising_is_the_same_function(tmp_path: Path, kind: K) -> None:
    path = dense_model(kind=kind, biases=True).save(tmp_path / "a.gguf")
    bundle(path, tmp_path / "b.gguf")
    assert verify(path, tmp_path / "b.gguf").same
    assert verify(tmp_path / "b.gguf", path).same


def test_the_synthetic_model_of_another_writer_is_one_model_in_all_layouts(tmp_path: Path) -> None:
    layouts: tuple[Layout, ...] = ("plain", "bundled", "split")
    paths = [write_opt(OPT_PRESETS["opt-tiny"], tmp_path / f"{name}.gguf", name) for name in layouts]
    bundle(paths[0], tmp_path / "ours.gguf")
    unbundle(paths[1], tmp_path / "back.gguf")
    for other in (*paths[1:], tmp_path / "ours.gguf", tmp_path / "back.gguf"):
        assert verify(paths[0], other).same


def test_requantised_down_differs_by_its_rounding_and_nothing_else_does(model_file: ModelFile, tmp_path: Path) -> None:
    bundle(model_file("arcee"), tmp_path / "b.gguf")
    found = verify(model_file("arcee"), tmp_path / "b.gguf")
    assert not found.same
    assert set(results(found)) == {weight_name(il, "down") for il in range(3)}
    for result in results(found).values():
        assert (result.status, result.types) == ("differs", "Q8_0")
        assert result.relative_error is not None
        assert 0.001 < result.relative_error < 0.01
    assert found.within(0.01)
    assert not found.within(0.001)


@few
@given(seed=st.integers(0, 2**32 - 1), biases=st.booleans(), side=st.sampled_from(["plain", "bundled", "both"]))
def test_neurons_may_be_in_another_order(tmp_path: Path, seed: int, biases: bool, side: str) -> None:
    model = dense_model(biases=biases)
    other = reordered(model, 1, np.random.default_rng(seed).permutation(96))
    for name, one in (("a", model), ("b", other)):
        path = tmp_path / f"{name}.gguf"
        path.unlink(missing_ok=True)
        if side == "both" or (side == "bundled" and name == "b"):
            bundle(one, path)
        else:
            one.save(path)
    found = verify(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert found.same
    assert {result.status for result in results(found).values()} <= {"reordered"}
    assert weight_name(1, "up") in results(found)
    assert not [name for name in results(found) if name.startswith("blk.0.")]


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    return Compared(tmp_path)


class Compared:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, a: ArraySource, b: ArraySource) -> Verification:
        paths = [self._folder / "a.gguf", self._folder / "b.gguf"]
        for model, path in zip((a, b), paths, strict=True):
            path.unlink(missing_ok=True)
            model.save(path)
        return verify(*paths)


ORDER = np.random.default_rng(5).permutation(96)


def test_biases_that_do_not_follow_their_neurons_are_found(compared: Compared) -> None:
    model = dense_model(biases=True)
    found = compared(model, reordered(model, 0, ORDER, biases=False))
    assert not found.same
    assert results(found)[weight_name(0, "up")].status == "differs"


def test_down_that_does_not_follow_its_neurons_is_found(compared: Compared) -> None:
    model = dense_model()
    other = reordered(model, 0, ORDER)
    other = other.with_tensors(model.tensors[weight_name(0, "down")])  # type: ignore[arg-type]
    found = compared(model, other)
    assert not found.same
    assert results(found)[weight_name(0, "down")].status == "differs"


def test_one_changed_neuron_in_another_order_is_named(compared: Compared) -> None:
    model = dense_model()
    other = reordered(model, 0, ORDER)
    rows = rows_of(other, weight_name(0, "up")).copy()
    rows[7, 100] ^= 1
    found = compared(model, with_rows(other, weight_name(0, "up"), rows))
    assert not found.same
    expected = f"1 of 96 neurons have no counterpart, the first is {ORDER[7]}"
    assert expected in results(found)[weight_name(0, "up")].detail


def test_equal_rows_with_other_columns_of_down_are_told_apart(compared: Compared) -> None:
    model = dense_model()
    for part in ("gate", "up"):
        rows = rows_of(model, weight_name(0, part)).copy()
        rows[10:20] = 0
        model = with_rows(model, weight_name(0, part), rows)
    found = compared(model, reordered(model, 0, ORDER))
    assert found.same
    assert results(found)[weight_name(0, "down")].status == "reordered"


def test_another_order_and_another_type_of_down_is_compared_neuron_by_neuron(compared: Compared) -> None:
    model = dense_model()
    other = reordered(model, 0, ORDER)
    down = tensor(weight_name(0, "down"), rows_of(other, weight_name(0, "down")).view(np.float32), K.Q8_0)
    found = compared(model, other.with_tensors(down))
    result = results(found)[weight_name(0, "down")]
    assert (result.status, result.types) == ("differs", "F32, Q8_0")
    assert found.within(0.01)


@few
@given(at=st.tuples(st.integers(0, 63), st.integers(0, 95)))
def test_one_changed_value_is_found_where_it_is(tmp_path: Path, at: tuple[int, int]) -> None:
    model = dense_model()
    values = rows_of(model, weight_name(1, "down")).view(np.float32).copy()
    values[at] += 1
    found = Compared(tmp_path)(model, model.with_tensors(tensor(weight_name(1, "down"), values)))
    (result,) = results(found).values()
    assert result.name == weight_name(1, "down")
    assert f"in row {at[0]}, column {at[1]};" in result.detail
    assert result.max_difference == pytest.approx(1, abs=1e-3)


def test_not_a_number_equals_itself_and_nothing_else(compared: Compared) -> None:
    model = dense_model()
    values = rows_of(model, "output_norm.weight").view(np.float32).copy()
    values[0, 3] = np.nan
    other = model.with_tensors(tensor("output_norm.weight", values[0]))
    assert compared(other, other).same
    found = compared(model, other)
    assert results(found)["output_norm.weight"].max_difference == np.inf
    assert not found.within(1e9)


def test_missing_tensors_other_shapes_and_other_numbers_are_found(compared: Compared) -> None:
    model = dense_model()
    assert results(compared(model, model.without("output_norm.weight")))["output_norm.weight"].detail == "only A has it"
    assert results(compared(model.without("output_norm.weight"), model))["output_norm.weight"].detail == "only B has it"
    wide = tensor("output_norm.weight", np.zeros(65, np.float32))
    assert "shapes [64] and [65]" in results(compared(model, model.with_tensors(wide)))["output_norm.weight"].detail
    large = np.array([[2**60]], np.int64).view(np.uint8)
    numbers = [ArrayTensor("n", (1,), K.I64, rows) for rows in (large, (large.view(np.int64) + 1).view(np.uint8))]
    found = compared(*(model.with_tensors(one) for one in numbers))
    assert results(found)["n"].detail == "other bytes"


def test_key_values_of_the_model_are_compared(compared: Compared) -> None:
    model = dense_model(activation=None)
    other = model.with_values(llama__rope__dimension_count=u32(32), general__name=u32(1))
    assert compared(model, other).values == ["llama.rope.dimension_count: missing, 32"]
    stated = dense_model()
    assert compared(model, stated).same
    assert compared(model, stated).notes == [
        "only B states the activation, llama.feed_forward_activation: missing, 'reglu'"
    ]
    assert not compared(stated, dense_model(activation="drelu")).same


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = dense_model().save(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(path.read_bytes()[:-500])
    with pytest.raises(GgufToolsError, match=r"b\.gguf: .*cut off"):
        verify(path, tmp_path / "b.gguf")
