"""The flash format: what is written is what is read; a contradiction is an error that names its key or tensor."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from dense_models import ArraySource, ArrayTensor, array, dense_model, raw_tensor, tensor, text, u32
from flash_models import F32, N_EMBD, N_FF, RANK, RNG, flash_model, predictor
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as K
from gguf import GGUFValueType as V
from gguf_strategies import key_values, many
from hypothesis import given
from hypothesis import strategies as st

from gguf_tools import FLASH, GgufToolsError
from gguf_tools.format import ACTIVATIONS, Activation, BundleLayout, PredictorInfo, read_flash, weight_name
from gguf_tools.neurons import dense_layers, without_bundles
from gguf_tools.source import KeyValue
from gguf_tools.types import WEIGHT_TYPES, fits


def test_a_valid_file_is_read() -> None:
    info = read_flash(flash_model())
    assert info is not None
    assert info.n_ff == {0: N_FF, 1: N_FF}
    assert info.predictor == PredictorInfo((RANK, 0, 0), 0.99)
    assert info.activation == Activation("reglu")
    assert info.bundle.record_bytes == 68 + 68 + 36
    assert [part.offset for part in info.bundle.parts] == [0, 68, 136]
    assert list(dense_layers(flash_model())) == [0, 1, 2]
    assert read_flash(without_bundles(flash_model())) is None


def test_an_ordinary_file_is_none() -> None:
    assert read_flash(dense_model()) is None


weights = st.sampled_from(sorted(WEIGHT_TYPES))


@many
@given(
    row=weights,
    down=weights,
    blocks=st.integers(1, 9),
    gated=st.booleans(),
    layout=st.sampled_from(["bundled", "split"]),
)
def test_layouts_of_all_types_come_back(row: K, down: K, blocks: int, gated: bool, layout: str) -> None:
    n_embd = blocks * math.lcm(*(int(GGML_QUANT_SIZES[kind][0]) for kind in (row, down)))
    kinds = ({"gate": row} if gated else {}) | {"up": row, "down": down}
    bundle = BundleLayout.of(kinds, n_embd, layout)
    assert BundleLayout.from_values(bundle.to_values(), n_embd) == bundle
    assert {part.name: part.kind for part in bundle.parts} == kinds
    assert bundle.gated == gated
    # the parts of all neurons tile the bundle
    n_ff = 5
    runs = [(bundle.begin(part, i, n_ff), part.row_bytes) for i in range(n_ff) for part in bundle.parts]
    end = 0
    for begin, size in sorted(runs):
        assert begin == end
        end = begin + size
    assert end == n_ff * bundle.record_bytes


@many
@given(kind=weights, n_embd=st.integers(1, 600))
def test_rows_that_a_type_cannot_hold_are_refused(kind: K, n_embd: int) -> None:
    if fits(kind, n_embd):
        assert BundleLayout.of({"up": kind, "down": kind}, n_embd).n_embd == n_embd
    else:
        with pytest.raises(GgufToolsError, match=f"{kind.name} needs rows that are a multiple of"):
            BundleLayout.of({"up": kind, "down": kind}, n_embd)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_come_back(name: str) -> None:
    activation = Activation(name, 0.01 if name == "fatrelu" else None)
    assert Activation.from_values(activation.to_values("llama"), "llama") == activation


@given(ranks=st.lists(st.integers(0, 2**32 - 1), max_size=5), recall=st.none() | st.floats(0, 1, width=32))
def test_predictors_come_back(ranks: list[int], recall: float | None) -> None:
    info = PredictorInfo(tuple(ranks), recall)
    assert PredictorInfo.from_values(info.to_values(), len(ranks)) == info


def u32s(*values: int) -> KeyValue:
    return array(list(values), V.UINT32)


def u64s(*values: int) -> KeyValue:
    return array(list(values), V.UINT64)


def strings(*values: str) -> KeyValue:
    return array(list(values), V.STRING)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("flash.version", u32(2), "is 2, this engine reads 1"),
        ("flash.version", text("1"), "is of type string, not uint32"),
        ("flash.bundle.parts", None, "is missing"),
        ("flash.bundle.parts", strings("up", "gate", "down"), r"is \['up', 'gate', 'down'\]: expected \['up'"),
        ("flash.bundle.parts", strings("up"), r"is \['up'\]: expected \['up', 'down'\] or"),
        ("flash.bundle.types", u32s(8, 8), "has 2 entries, not 3"),
        ("flash.bundle.types", u32s(8, 2, 2), "gives gate and up different types"),
        ("flash.bundle.types", u32s(8, 8, 17996), "gives down the type 17996: not a known type of weights"),
        ("flash.bundle.types", u32s(8, 8, 77), "gives down the type 77: not a known type of weights"),
        ("flash.bundle.types", u64s(8, 8, 2), r"is of type uint64\[\], not uint32\[\]"),
        ("flash.bundle.types", u32s(12, 12, 2), "gate the type 12: rows of 64 elements are not whole blocks of 256"),
        ("flash.bundle.row_lengths", u32s(64, 64, 96), "says 96, embedding_length is 64"),
        ("flash.bundle.offsets", u64s(0, 68, 128), "lets down begin at 128, the parts before it end at 136"),
        ("flash.bundle.offsets", u32s(0, 68, 136), "not uint64"),
        ("flash.bundle.record_bytes", KeyValue(176, V.UINT64), "is 176, the parts add up to 172"),
        ("flash.bundle.layout", text("rows"), "is 'rows': expected one of bundled, split"),
        ("llama.feed_forward_activation", None, "is missing"),
        ("llama.feed_forward_activation", text("silu"), "is 'silu': expected one of relu, relu2"),
        ("llama.feed_forward_activation", text("relu"), "is 'relu', which does not fit the parts gate, up, down"),
        ("llama.feed_forward_activation", text("fatrelu"), r"_threshold: is missing"),
        ("llama.embedding_length", u32(128), "says 64, embedding_length is 128"),
        ("llama.embedding_length", None, "is missing"),
        ("llama.feed_forward_length", u32(97), r"has the shape \[172, 96\], expected \[172, 97\]"),
        ("llama.feed_forward_length", u32s(96, 95, 96), r"blk\.1\..*: has the shape .* expected \[172, 95\]"),
        ("llama.feed_forward_length", strings("96", "96", "96"), r"is of type string\[\], not uint32"),
        ("llama.block_count", u32(1), r"has 3 entries, not 1"),
        ("general.architecture", None, "is missing"),
        ("flash.predictor.kind", text("mlp"), "is 'mlp': expected one of lowrank"),
        ("flash.predictor.kind", None, "is there without flash.predictor.kind"),
        ("flash.predictor.ranks", u32s(8, 0), "has 2 entries, not 3"),
        ("flash.predictor.ranks", u32s(4, 0, 0), r"predictor_in\.weight: has the shape \[64, 8\], expected \[64, 4\]"),
        ("flash.predictor.ranks", u32s(8, 8, 0), r"blk\.1\.ffn_predictor_in\.weight: is missing"),
        ("flash.predictor.ranks", u32s(0, 0, 0), r"blk\.0\.ffn_predictor_in\.weight: is there, but"),
        ("flash.predictor.recall", KeyValue(1.5, V.FLOAT32), "is 1.5, not a share"),
    ],
)  # fmt: skip
def test_key_values_that_contradict_are_refused(key: str, value: KeyValue | None, said: str) -> None:
    model = flash_model().with_values(**{key: value})
    with pytest.raises(GgufToolsError, match=said) as caught:
        read_flash(model, "a.gguf")
    assert caught.value.file == "a.gguf"
    assert caught.value.key or caught.value.tensor
    assert str(caught.value).startswith("a.gguf: ")


def zeros(name: str, *shape: int, kind: K = K.F32) -> ArrayTensor:
    return tensor(name, np.zeros(shape, F32), kind)


BUNDLE = "blk.0.ffn_bundle.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([raw_tensor(BUNDLE, (171, N_FF), FLASH, RNG)], r"has the shape \[171, 96\], expected \[172, 96\]"),
        ([raw_tensor(BUNDLE, (172, N_FF, 2), FLASH, RNG)], r"has the shape \[172, 96, 2\]"),
        ([raw_tensor(BUNDLE, (172, N_FF), K.I8, RNG)], "is of type I8, expected FLASH"),
        ([raw_tensor("blk.0.ffn_norm.weight", (64,), FLASH, RNG)], r"ffn_norm\.weight: is of the type of bundles, but"),
        ([raw_tensor("blk.3.ffn_bundle.weight", (172, N_FF), FLASH, RNG)], "the model has 3 layers"),
        ([zeros("blk.1.ffn_up.weight", N_FF, N_EMBD)], r"blk\.1\.ffn_up\.weight: is there besides blk\.1\.ffn_bundle"),
        ([zeros("blk.0.ffn_up.bias", N_FF + 1)], r"ffn_up\.bias: has the shape \[97\], expected \[96\]"),
        ([zeros("blk.0.ffn_gate.bias", N_FF, kind=K.F16)], r"ffn_gate\.bias: is of type F16, expected F32"),
        ([zeros("blk.0.ffn_down.bias", N_FF)], r"ffn_down\.bias: has the shape \[96\], expected \[64\]"),
        (predictor(1), r"flash\.predictor\.ranks gives layer 1 no rank"),
        (predictor(0, n_embd=32), r"predictor_in\.weight: has the shape \[32, 8\], expected \[64, 8\]"),
        (predictor(0, n_ff=32), r"predictor_out\.weight: has the shape \[8, 32\]"),
        (predictor(0, kind=K.Q4_0), r"predictor_in\.weight: is of type Q4_0, expected F32 or F16 or Q8_0 or BF16"),
        ([zeros("blk.0.ffn_predictor.bias", N_FF, kind=K.F16)], r"is of type F16, expected F32"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_are_refused(tensors: list[ArrayTensor], said: str) -> None:
    with pytest.raises(GgufToolsError, match=said) as caught:
        read_flash(flash_model().with_tensors(*tensors), "a.gguf")
    assert caught.value.tensor


@pytest.mark.parametrize("name", ["ffn_predictor_in.weight", "ffn_predictor_out.weight", "ffn_predictor.bias"])
def test_a_predictor_without_one_of_its_tensors_is_refused(name: str) -> None:
    with pytest.raises(GgufToolsError, match=rf"blk\.0\.{name}: is missing"):
        read_flash(flash_model().without(f"blk.0.{name}"))


def test_a_version_without_bundles_is_refused() -> None:
    model = flash_model().without(BUNDLE, "blk.1.ffn_bundle.weight")
    with pytest.raises(GgufToolsError, match=r"flash\.version: is there, but no tensor blk\.N\.ffn_bundle\.weight"):
        read_flash(model)


def test_a_bias_of_a_part_that_is_not_there_is_refused() -> None:
    source = dense_model(n_layer=1, n_embd=N_EMBD, n_ff=N_FF, gated=False, activation="relu")
    bundle = BundleLayout.of({"up": K.F16, "down": K.F16}, N_EMBD)
    source = replace(source, values=source.values | bundle.to_values()).without(
        weight_name(0, "up"), weight_name(0, "down")
    )
    source = source.with_tensors(raw_tensor(BUNDLE, (bundle.record_bytes, N_FF), FLASH, RNG))
    assert read_flash(source) is not None
    with pytest.raises(GgufToolsError, match=r"blk\.0\.ffn_gate\.bias: is there, but the bundles have no gate"):
        read_flash(source.with_tensors(zeros("blk.0.ffn_gate.bias", N_FF)))


@pytest.mark.parametrize(
    "source",
    [
        flash_model().with_values(**{"flash.version": None}),
        dense_model().with_tensors(raw_tensor("x", (4,), FLASH, RNG)),
        dense_model().with_tensors(*predictor(0)),
    ],
)
def test_what_belongs_to_the_format_needs_its_version(source: ArraySource) -> None:
    with pytest.raises(GgufToolsError, match=r"is there without flash\.version"):
        read_flash(source)


keys = st.sampled_from(sorted(flash_model().values))


@many
@given(changes=st.dictionaries(keys, st.none() | key_values, min_size=1, max_size=3))
def test_any_key_values_are_no_error_or_one_of_ours(changes: dict[str, KeyValue | None]) -> None:
    model = flash_model().with_values(**changes)
    try:
        read_flash(model, "a.gguf")
        dense_layers(model, "a.gguf")
    except GgufToolsError as error:
        assert error.file == "a.gguf"
        assert error.key or error.tensor
