"""Bundles of experts: which bytes end up where, and back; which models, and which files, are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ModelFile
from dense_models import (
    ArraySource,
    ArrayTensor,
    all_floats,
    contents,
    dense_model,
    expert_model,
    raw_tensor,
    text,
    u32,
)
from dense_models import tensor as tensor_of
from engines import logits_of, open_resident, tokens
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as K
from gguf import GGUFValueType as V
from gguf_strategies import few, key_values, many
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bundle import PEAK, head_of
from test_gguf_tools_cli import Tool, tool  # noqa: F401 (a fixture)

from gguf_tools import FLASH, GgufToolsError, ggml
from gguf_tools.bundle import bundle, plan_bundle
from gguf_tools.format import Activation, BundleLayout, PredictorInfo, bias_name, read_flash, weight_name
from gguf_tools.neurons import BundlePart, Matrix, Transposed, without_bundles
from gguf_tools.source import KeyValue, open_gguf
from gguf_tools.stream import PlannedTensor
from gguf_tools.synthetic import tiny, write
from gguf_tools.unbundle import unbundle
from gguf_tools.verify import verify

MIB = 1 << 20
F32 = np.float32
PARTS = ("gate", "up", "down")


def name_of(part: str, il: int = 0) -> str:
    return weight_name(il, f"{part}_exps")


def expert(model: ArraySource, part: str, number: int) -> np.ndarray:  # type: ignore[type-arg]
    """Rows of one expert's matrix, as they are stored."""
    stored = model.tensors[name_of(part)]
    n_rows = stored.shape[1]
    return stored.raw(number * n_rows, (number + 1) * n_rows)


@settings(few, max_examples=60)
@given(
    kind=st.sampled_from([K.F32, K.F16, K.BF16, K.Q8_0, K.Q4_0, K.IQ4_NL, K.Q4_K]),
    down=st.sampled_from([None, K.F32, K.F16, K.Q8_0, K.Q6_K]),
    embd_blocks=st.integers(1, 2),
    ff_blocks=st.integers(1, 3),
    n_expert=st.integers(1, 4),
    from_file=st.booleans(),
    memory=st.sampled_from([1, 50_000, 200_000, 1 << 30]),
)
def test_records_of_an_expert_hold_its_rows_of_gate_and_up_and_its_columns_of_down(
    tmp_path: Path,
    kind: K,
    down: K | None,
    embd_blocks: int,
    ff_blocks: int,
    n_expert: int,
    from_file: bool,
    memory: int,
) -> None:
    n_embd = embd_blocks * max(32, int(GGML_QUANT_SIZES[kind][0]))
    n_ff = ff_blocks * max(32, int(GGML_QUANT_SIZES[kind if down is None else down][0]))
    model = expert_model(n_layer=1, n_embd=n_embd, n_ff=n_ff, n_expert=n_expert, kind=kind, down=down)
    if from_file:
        model.save(tmp_path / "a.gguf")
    source = open_gguf(tmp_path / "a.gguf") if from_file else model
    bundle(source, tmp_path / "b.gguf", memory=memory, force=True)
    (tmp_path / "a.gguf").unlink(missing_ok=True)
    written = open_gguf(tmp_path / "b.gguf")
    stored = written.tensors[name_of("bundle")]
    info = read_flash(written)
    assert info is not None
    assert (info.n_ff, info.n_expert, info.activation) == ({0: n_ff}, {0: n_expert}, Activation("reglu"))
    assert stored.shape == (info.bundle.record_bytes, n_ff, n_expert)
    assert stored.kind == FLASH
    for e in range(n_expert):
        columns = ggml.dequantize(expert(model, "down", e), model.tensors[name_of("down")].kind).T
        parts = [expert(model, "gate", e), expert(model, "up", e), ggml.quantize(np.ascontiguousarray(columns), kind)]
        assert np.array_equal(stored.raw(e * n_ff, (e + 1) * n_ff), np.concatenate(parts, axis=1))


@few
@given(
    kind=st.sampled_from([K.F32, K.F16, K.BF16]),
    n_embd=st.integers(1, 70),
    n_ff=st.integers(1, 70),
    n_expert=st.integers(1, 5),
    memory=st.sampled_from([1, 30_000, 1 << 30]),
)
def test_unbundling_gives_back_the_experts_that_were_bundled(
    tmp_path: Path, kind: K, n_embd: int, n_ff: int, n_expert: int, memory: int
) -> None:
    model = expert_model(n_embd=n_embd, n_ff=n_ff, n_expert=n_expert, kind=kind)
    bundle(model, tmp_path / "b.gguf", memory=memory, force=True)
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf", memory=memory, force=True)
    back = open_gguf(tmp_path / "c.gguf")
    assert contents(back.tensors) == contents(model.tensors)
    assert back.values == model.values


@few
@given(kind=st.sampled_from([K.Q8_0, K.Q4_0, K.Q4_K, K.Q6_K]), memory=st.sampled_from([1, 200_000, 1 << 30]))
def test_unbundled_down_is_exactly_what_the_bundles_hold(tmp_path: Path, kind: K, memory: int) -> None:
    model = expert_model(n_layer=1, n_embd=256, n_ff=64, kind=kind, down=K.F32)
    bundle(model, tmp_path / "b.gguf", force=True)
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf", memory=memory, force=True)
    back = open_gguf(tmp_path / "c.gguf").tensors
    for part in ("gate", "up"):
        name = name_of(part)
        assert contents({name: back[name]}) == contents({name: model.tensors[name]})
    down = all_floats(model.tensors[name_of("down")]).reshape(4, 256, 64).transpose(0, 2, 1)
    columns = ggml.quantize(np.ascontiguousarray(down).reshape(-1, 256), kind)
    expected = ggml.dequantize(columns, kind).reshape(4, 64, 256).transpose(0, 2, 1)
    assert (back[name_of("down")].kind, back[name_of("down")].shape) == (K.F32, (64, 256, 4))
    assert np.array_equal(all_floats(back[name_of("down")]).reshape(4, 256, 64), expected)
    # and nothing is lost when that file is bundled again
    bundle(tmp_path / "c.gguf", tmp_path / "d.gguf", force=True)
    first, second = (open_gguf(tmp_path / f"{name}.gguf").tensors[name_of("bundle")] for name in "bd")
    if kind in (K.Q8_0, K.Q4_0):  # whose quantisation keeps what it made
        assert np.array_equal(first.raw(0, 4 * 64), second.raw(0, 4 * 64))


def test_transposed_experts_are_read_from_any_row_to_any_other() -> None:
    rng = np.random.default_rng(0)
    stored = raw_tensor("x", (24, 10, 3), K.F16, rng)
    expected = stored.rows.view(np.uint16).reshape(3, 10, 24).transpose(0, 2, 1).reshape(72, 10)
    layout = BundleLayout.of({"gate": K.F16, "up": K.F16, "down": K.F16}, 24)
    records = raw_tensor("y", (layout.record_bytes, 10, 3), FLASH, rng)
    part = layout.parts[2]
    begin = part.offset // 2
    in_records = records.rows.view(np.uint16)[:, begin : begin + 24].reshape(3, 10, 24).transpose(0, 2, 1)
    for tensor, rows in (
        (Transposed(stored), expected),
        (Transposed(BundlePart("y", records, layout, part)), in_records.reshape(72, 10)),
    ):
        assert tensor.shape == (10, 24, 3)
        values = np.ascontiguousarray(rows).view(np.float16).astype(F32)
        for start in range(72):
            for stop in range(start, 73, 5):
                assert np.array_equal(tensor.raw(start, stop).view(np.uint16), rows[start:stop])
                assert np.array_equal(tensor.floats(start, stop), values[start:stop], equal_nan=True)
    assert np.array_equal(Matrix(stored, 1).floats(2, 4), stored.floats(12, 14), equal_nan=True)


@pytest.mark.parametrize("kind", [K.F32, K.F16])
def test_bundled_experts_are_the_same_function_and_a_changed_one_is_found(tmp_path: Path, kind: K) -> None:
    model = expert_model(kind=kind)
    path = model.save(tmp_path / "a.gguf")
    bundle(path, tmp_path / "b.gguf")
    for memory in (1, 1 << 28):
        assert verify(path, tmp_path / "b.gguf", memory=memory).counts() == {"identical": 9}
        assert verify(tmp_path / "b.gguf", path, memory=memory).same
    for part in PARTS:
        stored = model.tensors[name_of(part, 1)]
        assert isinstance(stored, ArrayTensor)
        rows = stored.rows.copy()
        per_expert = stored.shape[1]
        rows[: 2 * per_expert] = np.roll(rows[: 2 * per_expert], per_expert, axis=0)  # experts 0 and 1 swapped
        bundle(model.with_tensors(replace(stored, rows=rows)), tmp_path / "c.gguf", force=True)
        found = verify(tmp_path / "b.gguf", tmp_path / "c.gguf")
        assert [result.name for result in found.tensors if result.status != "identical"] == [name_of(part, 1)]


def test_layers_of_experts_and_dense_ones_may_be_in_one_file(tmp_path: Path) -> None:
    experts = expert_model(n_layer=2, kind=K.F16, activation="reglu")  # which dense layers need
    dense = dense_model(n_layer=1, n_embd=64, n_ff=32, kind=K.F16, biases=True)
    model = experts.without(*(name for name in experts.tensors if name.startswith("blk.0.")))
    model = replace(model, tensors={**dense.tensors, **model.tensors})
    model = model.with_values(smallthinker__feed_forward_length=u32(32))
    plan = bundle(model, tmp_path / "b.gguf")
    assert (plan.n_ff, plan.n_expert) == ({0: 32, 1: 96}, {1: 4})
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf")
    back = open_gguf(tmp_path / "c.gguf")
    assert (contents(back.tensors), back.values) == (contents(model.tensors), model.values)


def test_a_single_expert_needs_no_dimension_of_its_own(tmp_path: Path) -> None:
    model = expert_model(n_expert=1)
    stored = [replace(t, shape=t.shape[:2]) for t in model.tensors.values() if isinstance(t, ArrayTensor)]
    flat = model.with_tensors(*(t for t in stored if "_exps" in t.name))
    assert bundle(flat, tmp_path / "b.gguf").tensors[name_of("bundle")].shape == (3 * 64 * 4, 96)
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf")
    assert contents(open_gguf(tmp_path / "c.gguf").tensors) == contents(flat.tensors)
    bundle(model, tmp_path / "d.gguf")
    assert verify(tmp_path / "c.gguf", model.save(tmp_path / "a.gguf")).counts()["differs"] == 6  # shapes, as stored


def test_the_engine_computes_the_same_with_experts_that_were_bundled(
    tool: Tool,  # noqa: F811
    model_file: ModelFile,
    tmp_path: Path,
) -> None:
    model, flash, back = model_file("smallthinker", "F16"), tmp_path / "b.gguf", tmp_path / "c.gguf"
    status, out, _ = tool("bundle", model, flash)
    assert status == 0
    assert "3 layers of 8 x 512 neurons, records of 1536 bytes (gate F16, up F16, down F16), reglu" in out
    status, out, _ = tool("inspect", flash)
    assert status == 0
    assert "    1  8 x 512    1536  6.29 MB     -          -" in out.splitlines()
    found = json.loads(tool("inspect", flash, "--json")[1])
    assert [(layer["n_expert"], layer["n_ff"]) for layer in found["flash"]["layers"]] == [(8, 512)] * 3
    assert found["by_role"]["bundles"]["bytes"] == 3 * 8 * 512 * 1536
    assert tool("unbundle", flash, back)[0] == 0
    status, out, _ = tool("verify", flash, back)
    assert (status, out.splitlines()[-1]) == (0, "33 identical: the same function")
    logits = []
    for path in (model, back):
        with open_resident(path) as llm:
            logits.append(logits_of(llm, tokens(32), tokens(4, seed=1)))
    assert np.isfinite(logits[0]).all()
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("quantisation", ["F32", "F16", "Q8_0"])
def test_a_smallthinker_of_any_size_gives_finite_logits(quantisation: str, tmp_path: Path) -> None:
    model = tiny("smallthinker", quantisation, n_layer=2)
    shape = replace(model.shape, n_embd=128, n_head=2, n_head_kv=1, n_ff_exp=96)
    (path,) = write(replace(model, shape=shape), tmp_path / "a.gguf")
    with open_resident(path) as llm:
        logits = logits_of(llm, tokens(32), [])
    assert np.isfinite(logits).all() and logits.std() > 0.5
    plan = plan_bundle(open_gguf(path))
    assert (plan.n_ff, plan.n_expert) == ({0: 96, 1: 96}, {0: 8, 1: 8})


def test_types_are_converted_as_those_of_dense_layers_are(
    tool: Tool,  # noqa: F811
    model_file: ModelFile,
    tmp_path: Path,
) -> None:
    model, flash = model_file("smallthinker", "F16"), tmp_path / "b.gguf"
    status, out, _ = tool("bundle", model, flash, "--type", "q4_K", "--down-type", "q6_K", "--memory", "1")
    assert status == 0
    assert "gate and up: F16 -> Q4_K" in out
    assert "(gate Q4_K, up Q4_K, down Q6_K), reglu" in out
    assert tool("verify", model, flash)[0] == 1
    assert tool("verify", model, flash, "--tolerance", "0.1")[0] == 0


BIAS = tensor_of(bias_name(1, "up_exps"), np.zeros((4, 96), F32))
SCALE = tensor_of("blk.1.ffn_down_exps.scale", np.zeros(4, F32))
FUSED = tensor_of("blk.1.ffn_gate_up_exps.weight", np.zeros((4, 192, 64), F32))
NARROW = tensor_of(name_of("down", 1), np.zeros((4, 64, 64), F32))
FEWER = tensor_of(name_of("up", 1), np.zeros((3, 96, 64), F32))
OTHER = tensor_of(name_of("up", 1), np.zeros((4, 96, 64), F32), K.Q8_0)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (expert_model(arch="qwen3moe"), "qwen3moe is a mixture of experts .* not ReLU-like .those of smallthinker are"),
        (expert_model(arch="llama", activation="reglu"), "experts stream from the file as it is"),
        (expert_model(activation="drelu"), r"smallthinker\.feed_forward_activation: is 'drelu', but that of"),
        (expert_model(activation="relu"), "relu is not an activation for a model with a gate"),
        (expert_model(activation="silu"), r"smallthinker\.feed_forward_activation: is 'silu': expected one of"),
        (expert_model().with_tensors(BIAS), r"blk\.1\.ffn_up_exps\.bias: has no place in a bundle"),
        (expert_model().with_tensors(SCALE), r"blk\.1\.ffn_down_exps\.scale: has no place in a bundle"),
        (expert_model().with_tensors(FUSED), r"blk\.1\.ffn_gate_up_exps\.weight: has no place in a bundle"),
        (expert_model().with_tensors(NARROW), r"ffn_down_exps\.weight: has the shape \[64, 64, 4\], expected \[96"),
        (expert_model().with_tensors(FEWER), r"ffn_up_exps\.weight: has the shape \[64, 96, 3\], expected .* 4\]"),
        (expert_model().with_tensors(OTHER), r"blk\.1\.ffn_up_exps\.weight: is Q8_0, blk\.0.* is F32; .*--type"),
        (expert_model().without(name_of("gate", 1)), r"blk\.1\.ffn_gate_exps\.weight: is missing, but layer 1 has"),
        (expert_model().without(name_of("down", 0)), r"blk\.0\.ffn_down_exps\.weight: is missing, but layer 0 has"),
        (expert_model().with_values(smallthinker__expert_count=None), r"smallthinker\.expert_count: is missing"),
        (expert_model().with_values(smallthinker__expert_count=text("4")), r"is of type string, not uint32"),
        (
            expert_model().with_values(smallthinker__expert_feed_forward_length=None),
            r"smallthinker\.expert_feed_forward_length: is missing",
        ),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_bundled_are_refused_by_name(tmp_path: Path, model: ArraySource, said: str) -> None:
    path = model.save(tmp_path / "a.gguf")
    with pytest.raises(GgufToolsError, match=said) as caught:
        bundle(path, tmp_path / "b.gguf")
    assert caught.value.file == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_length_of_dense_layers_is_not_needed_where_there_are_none(tmp_path: Path) -> None:
    model = expert_model().with_values(smallthinker__feed_forward_length=None)
    assert bundle(model, tmp_path / "b.gguf").n_ff == {0: 96, 1: 96}
    assert read_flash(open_gguf(tmp_path / "b.gguf")) is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bundle", "MODEL", "OUT", "--layout", "split"], "layout split is for dense layers only: experts are bundled"),
        (["bundle", "MODEL", "OUT", "--activation", "relu2"], "its activation is reglu, not relu2"),
        (["bundle", "FLASH", "OUT"], "is bundled already"),
        (["calibrate", "FLASH", "OUT", "--text", "TEXT"], "layer 0 is of experts: only the neurons of dense layers"),
        (["calibrate", "MODEL", "--report", "--text", "TEXT"], "layer 0 is of experts"),
        (["reorder", "FLASH", "OUT", "--text", "TEXT"], "layer 0 is of experts"),
        (["reorder", "MODEL", "OUT", "--text", "TEXT"], "layer 0 is of experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_with_experts_is_one_line_and_leaves_nothing(
    tool: Tool,  # noqa: F811
    model_file: ModelFile,
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    (tmp_path / "text").write_text("a text\n" * 100)
    bundle(model_file("smallthinker"), tmp_path / "flash.gguf")
    names = {"MODEL": model_file("smallthinker"), "FLASH": tmp_path / "flash.gguf", "TEXT": tmp_path / "text"}
    before = sorted(tmp_path.iterdir())
    status, out, err = tool(*({**names, "OUT": tmp_path / "out.gguf"}.get(one, one) for one in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(tmp_path.iterdir()) == before


def flash_model() -> ArraySource:
    """Two layers of bundled experts."""
    plan = plan_bundle(expert_model(kind=K.F16))
    rng = np.random.default_rng(0)
    tensors = [raw_tensor(t.name, t.shape, t.kind, rng) for t in plan.planned]
    return ArraySource(plan.values, {t.name: t for t in tensors})


RECORD = 3 * 2 * 64
RNG = np.random.default_rng(0)
BUNDLE = name_of("bundle")


def zeros(name: str, *shape: int) -> ArrayTensor:
    return tensor_of(name, np.zeros(shape, F32))


def test_a_valid_file_is_read() -> None:
    info = read_flash(flash_model())
    assert info is not None
    assert (info.n_ff, info.n_expert, info.predictor) == ({0: 96, 1: 96}, {0: 4, 1: 4}, None)
    assert info.bundle.record_bytes == RECORD
    assert read_flash(without_bundles(flash_model())) is None


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([raw_tensor(BUNDLE, (RECORD, 96, 3), FLASH, RNG)], r"has the shape \[384, 96, 3\], expected \[384, 96, 4\]"),
        ([raw_tensor(BUNDLE, (RECORD, 96 * 4), FLASH, RNG)], r"has the shape \[384, 384\], expected \[384, 96, 4\]"),
        ([raw_tensor(BUNDLE, (RECORD, 95, 4), FLASH, RNG)], r"has the shape \[384, 95, 4\]"),
        ([raw_tensor(BUNDLE, (RECORD - 1, 96, 4), FLASH, RNG)], r"has the shape \[383, 96, 4\]"),
        ([raw_tensor(BUNDLE, (RECORD, 96, 4, 2), FLASH, RNG)], r"has the shape \[384, 96, 4, 2\]"),
        ([raw_tensor(BUNDLE, (RECORD, 96, 4), K.I8, RNG)], "is of type I8, expected FLASH"),
        ([raw_tensor(name_of("bundle", 2), (RECORD, 96, 4), FLASH, RNG)], "the model has 2 layers"),
        ([raw_tensor("blk.0.ffn_bundle_exps.bias", (RECORD,), FLASH, RNG)], "is of the type of bundles, but is none"),
        ([raw_tensor(weight_name(1, "bundle"), (RECORD, 7), FLASH, RNG)], r"blk\.1\.ffn_bundle\.weight: is there bes"),
        ([zeros(name_of("down", 1), 4, 64, 96)], r"blk\.1\.ffn_down_exps\.weight: is there besides blk\.1\.ffn_bundle"),
        ([zeros("blk.1.ffn_gate_up_exps.weight", 4, 192, 64)], r"blk\.1\.ffn_gate_up_exps\.weight: is there besides"),
        ([zeros(bias_name(0, "up_exps"), 4, 96)], r"blk\.0\.ffn_up_exps\.bias: .* experts in bundles have no biases"),
        ([zeros(bias_name(0, "down"), 64)], r"blk\.0\.ffn_down\.bias: .* experts in bundles have no biases"),
        ([zeros(bias_name(1, "predictor"), 96)], r"blk\.1\.ffn_predictor\.bias: is there, but flash\.predictor\.ranks"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_are_refused(tensors: list[ArrayTensor], said: str) -> None:
    with pytest.raises(GgufToolsError, match=said) as caught:
        read_flash(flash_model().with_tensors(*tensors), "a.gguf")
    assert caught.value.tensor


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"smallthinker.expert_count": None}, r"smallthinker\.expert_count: is missing"),
        ({"smallthinker.expert_count": u32(0)}, r"expected \[384, 96, 0\]"),
        ({"smallthinker.expert_count": u32(1)}, r"has the shape \[384, 96, 4\], expected \[384, 96\]"),
        ({"smallthinker.expert_feed_forward_length": u32(64)}, r"expected \[384, 64, 4\]"),
        ({"smallthinker.expert_feed_forward_length": KeyValue([96, 96], V.ARRAY, V.UINT32)}, r"is of type uint32\[\]"),
        ({"smallthinker.feed_forward_activation": text("drelu")}, r"activation: is 'drelu', but .* is reglu"),
        ({"smallthinker.feed_forward_activation": None}, r"feed_forward_activation: is missing"),
        ({"flash.bundle.layout": text("split")}, r"flash\.bundle\.layout: is 'split', but bundles of experts are"),
        (
            BundleLayout.of({"up": K.F16, "down": K.F16}, 64).to_values()
            | {"smallthinker.feed_forward_activation": text("relu")},
            r"blk\.0\.ffn_bundle_exps\.weight: is there, but the bundles have no gate",
        ),
        (PredictorInfo((8, 0)).to_values(), r"flash\.predictor\.ranks: gives layer 0 a rank, but blk\.0.* no predict"),
        ({"flash.version": None}, r"is there without flash\.version"),
    ],
)  # fmt: skip
def test_key_values_that_contradict_are_refused(changes: dict[str, KeyValue | None], said: str) -> None:
    with pytest.raises(GgufToolsError, match=said) as caught:
        read_flash(flash_model().with_values(**changes), "a.gguf")
    assert str(caught.value).startswith("a.gguf: ")


def test_bundled_experts_need_a_version() -> None:
    model = flash_model()
    model = model.with_values(**{key: None for key in model.values if key.startswith("flash.")})
    with pytest.raises(GgufToolsError, match=r"blk\.0\.ffn_bundle_exps\.weight: is there without flash\.version"):
        read_flash(model)


keys = st.sampled_from(sorted(flash_model().values))


@many
@given(changes=st.dictionaries(keys, st.none() | key_values, min_size=1, max_size=3))
def test_any_key_values_of_expert_bundles_are_no_error_or_one_of_ours(changes: dict[str, KeyValue | None]) -> None:
    model = flash_model().with_values(**changes)
    try:
        read_flash(model, "a.gguf")
        without_bundles(model, "a.gguf")
    except GgufToolsError as error:
        assert error.file == "a.gguf"
        assert error.key or error.tensor


def zero_experts(path: Path, *, n_embd: int, n_ff: int, n_expert: int) -> Path:
    """A large layer that takes no disk: all weights are zero."""
    model = expert_model(n_layer=0)
    values = model.with_values(
        smallthinker__block_count=u32(1),
        smallthinker__embedding_length=u32(n_embd),
        smallthinker__expert_feed_forward_length=u32(n_ff),
        smallthinker__expert_count=u32(n_expert),
    ).values
    planned = [
        PlannedTensor(
            name_of(part),
            (n_ff, n_embd, n_expert) if part == "down" else (n_embd, n_ff, n_expert),
            K.Q8_0,
            lambda: iter(()),
        )
        for part in PARTS
    ]
    head, n_bytes = head_of(values, planned)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(n_bytes)
    return path


@pytest.mark.full
def test_350_mb_of_experts_are_bundled_in_the_memory_that_is_given(tmp_path: Path) -> None:
    path = zero_experts(tmp_path / "a.gguf", n_embd=2048, n_ff=768, n_expert=72)
    assert path.stat().st_size > 350e6
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "b.gguf"), str(32 * MIB)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    assert json.loads(result.stdout) < (32 + 16) * MIB  # besides: blocks of what is copied, threads
    (tmp_path / "b.gguf").unlink()
