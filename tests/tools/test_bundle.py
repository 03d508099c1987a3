"""Bundling and back: which bytes end up where, which models are refused, and what a conversion takes and leaves."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ModelFile
from dense_models import ArraySource, all_floats, array, contents, dense_model, raw_tensor, tensor, u32
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as K
from gguf import GGUFValueType as V
from gguf_strategies import few
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools import FLASH, GgufToolsError, ggml, stream
from gguf_tools.bundle import bundle, plan_bundle
from gguf_tools.format import Activation, BundleLayout, read_flash, weight_name
from gguf_tools.neurons import BundlePart, dense_layers
from gguf_tools.source import KeyValue, data_bytes, open_gguf
from gguf_tools.stream import PlannedTensor
from gguf_tools.unbundle import unbundle

MIB = 1 << 20


@settings(few, max_examples=60)
@given(
    kind=st.sampled_from([K.F32, K.F16, K.BF16, K.Q8_0, K.Q4_0, K.Q5_1, K.IQ4_NL, K.Q4_K, K.Q6_K]),
    down=st.sampled_from([None, K.F32, K.F16, K.Q8_0, K.Q4_0, K.Q6_K]),
    embd_blocks=st.integers(1, 2),
    ff_blocks=st.integers(1, 3),
    gated=st.booleans(),
    layout=st.sampled_from(["bundled", "split"]),
    from_file=st.booleans(),
    memory=st.sampled_from([1, 100_000, 1 << 30]),
)
def test_records_hold_rows_of_up_and_gate_as_they_are_and_columns_of_down(
    tmp_path: Path,
    kind: K,
    down: K | None,
    embd_blocks: int,
    ff_blocks: int,
    gated: bool,
    layout: str,
    from_file: bool,
    memory: int,
) -> None:
    n_embd = embd_blocks * max(32, int(GGML_QUANT_SIZES[kind][0]))
    n_ff = ff_blocks * max(32, int(GGML_QUANT_SIZES[kind if down is None else down][0]))
    model = dense_model(
        n_layer=1, n_embd=n_embd, n_ff=n_ff, kind=kind, down=down, gated=gated, activation="reglu" if gated else "relu"
    )
    if from_file:
        model.save(tmp_path / "a.gguf")
    source = open_gguf(tmp_path / "a.gguf") if from_file else model
    bundle(source, tmp_path / "b.gguf", layout=layout, memory=memory, force=True)
    (tmp_path / "a.gguf").unlink(missing_ok=True)
    written = open_gguf(tmp_path / "b.gguf")
    rows = [model.tensors[weight_name(0, part)].raw(0, n_ff) for part in (("gate", "up") if gated else ("up",))]
    columns = np.ascontiguousarray(all_floats(model.tensors[weight_name(0, "down")]).T)
    rows.append(ggml.quantize(columns, kind))
    expected = np.concatenate(rows, axis=1).tobytes() if layout == "bundled" else b"".join(r.tobytes() for r in rows)
    assert written.tensors[weight_name(0, "bundle")].raw(0, n_ff).tobytes() == expected


@few
@given(
    kind=st.sampled_from([K.F32, K.F16, K.BF16]),
    n_embd=st.integers(1, 70),
    n_ff=st.integers(1, 70),
    gated=st.booleans(),
    biases=st.booleans(),
    layout=st.sampled_from(["bundled", "split"]),
    memory=st.sampled_from([1, 1 << 30]),
)
def test_unbundling_gives_back_the_file_that_was_bundled(
    tmp_path: Path, kind: K, n_embd: int, n_ff: int, gated: bool, biases: bool, layout: str, memory: int
) -> None:
    activation = "reglu" if gated else "relu"
    model = dense_model(n_embd=n_embd, n_ff=n_ff, kind=kind, gated=gated, biases=biases, activation=activation)
    bundle(model, tmp_path / "b.gguf", layout=layout, memory=memory, force=True)
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf", memory=memory, force=True)
    back = open_gguf(tmp_path / "c.gguf")
    assert contents(back.tensors) == contents(model.tensors)
    assert back.values == model.values


@few
@given(
    kind=st.sampled_from([K.Q8_0, K.Q4_0, K.Q4_K, K.Q6_K]),
    layout=st.sampled_from(["bundled", "split"]),
    memory=st.sampled_from([1, 1 << 30]),
)
def test_unbundled_down_is_exactly_what_the_bundles_hold(tmp_path: Path, kind: K, layout: str, memory: int) -> None:
    model = dense_model(n_layer=1, n_embd=256, n_ff=64, kind=kind, down=K.F32)
    bundle(model, tmp_path / "b.gguf", layout=layout, force=True)
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf", memory=memory, force=True)
    back = open_gguf(tmp_path / "c.gguf").tensors
    for part in ("gate", "up"):
        name = weight_name(0, part)
        assert contents({name: back[name]}) == contents({name: model.tensors[name]})
    down = back[weight_name(0, "down")]
    columns = ggml.quantize(np.ascontiguousarray(all_floats(model.tensors[weight_name(0, "down")]).T), kind)
    assert down.kind == K.F32
    assert np.array_equal(all_floats(down), ggml.dequantize(columns, kind).T)
    # and nothing is lost when that file is bundled again
    bundle(tmp_path / "c.gguf", tmp_path / "d.gguf", layout=layout, force=True)
    first, second = (open_gguf(tmp_path / f"{name}.gguf").tensors[weight_name(0, "bundle")] for name in "bd")
    if kind in (K.Q8_0, K.Q4_0):  # whose quantisation keeps what it made
        assert np.array_equal(first.raw(0, 64), second.raw(0, 64))


def test_down_can_be_unbundled_to_any_type_that_its_rows_can_have(tmp_path: Path) -> None:
    bundle(dense_model(n_embd=256, n_ff=96), tmp_path / "b.gguf")
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf", down_kind=K.Q8_0)
    down = open_gguf(tmp_path / "c.gguf").tensors[weight_name(0, "down")]
    assert (down.kind, down.shape) == (K.Q8_0, (96, 256))
    for kind in (K.Q4_K, K.IQ2_XXS):
        with pytest.raises(GgufToolsError, match=rf"ffn_down\.weight: its rows of 96 elements cannot be {kind.name}"):
            unbundle(tmp_path / "b.gguf", tmp_path / "d.gguf", down_kind=kind)


@pytest.mark.parametrize("form", ["arcee", "llama"])
@pytest.mark.parametrize("quantisation", ["F16", "Q4_K_M"])
def test_all_else_is_copied_byte_for_byte(model_file: ModelFile, tmp_path: Path, form: str, quantisation: str) -> None:
    path = model_file(form, quantisation, n_shards=2)
    activation = None if form == "arcee" else Activation("fatrelu", 0.01)
    plan = bundle(path, tmp_path / "b.gguf", kind=K.Q8_0, activation=activation)
    before, after = open_gguf(path), open_gguf(tmp_path / "b.gguf")
    added = {weight_name(il, "bundle") for il in range(3)}
    gone = {weight_name(il, part) for il in range(3) for part in ("gate", "up", "down")}
    kept = {name: t for name, t in before.tensors.items() if name not in gone}
    assert contents({name: t for name, t in after.tensors.items() if name not in added}) == contents(kept)
    info = read_flash(after)
    assert info is not None
    assert info.n_ff == plan.n_ff == {0: 512, 1: 512, 2: 512}
    assert info.activation == (activation or Activation("relu2"))
    assert {key: after.values[key] for key in before.values} == before.values
    assert all(
        t.kind == K.Q8_0 for t in (part for layer in dense_layers(after).values() for part in layer.parts.values())
    )


@pytest.mark.parametrize(
    ("kind", "n_embd", "chosen", "said"),
    [
        (K.Q4_K, 288, K.Q5_0, "Q4_K does not fit rows of 288 elements"),
        (K.Q6_K, 288, K.Q8_0, "Q6_K does not fit"),
        (K.IQ3_S, 288, K.IQ4_NL, "IQ3_S does not fit"),
        (K.Q8_0, 40, K.F16, "Q8_0 does not fit rows of 40 elements"),
        (K.IQ2_XXS, 256, K.Q2_K, "importance matrix"),
    ],
)
def test_a_type_that_cannot_be_is_replaced_as_llama_cpp_does_and_said(
    kind: K, n_embd: int, chosen: K, said: str
) -> None:
    plan = plan_bundle(dense_model(n_embd=n_embd), kind=kind)
    assert {part.kind for part in plan.layout.parts} == {chosen}
    assert any(said in note for note in plan.notes)


@pytest.mark.parametrize("kind", [K.F32, K.Q4_0])
@pytest.mark.parametrize("down", [None, K.F32, K.Q8_0])
def test_types_are_those_that_are_asked_for(kind: K, down: K | None) -> None:
    plan = plan_bundle(dense_model(kind=K.Q8_0), kind=kind, down_kind=down)
    assert [part.kind for part in plan.layout.parts] == [kind, kind, kind if down is None else down]


def test_rows_that_need_an_importance_matrix_are_kept_and_only_down_is_of_another_type() -> None:
    model = dense_model(n_layer=1, n_embd=256, n_ff=64)
    for part in ("gate", "up"):
        rows = raw_tensor(weight_name(0, part), (256, 64), K.IQ2_XXS, np.random.default_rng(0))
        model = model.with_tensors(rows)
    assert [part.kind for part in plan_bundle(model).layout.parts] == [K.IQ2_XXS, K.IQ2_XXS, K.Q2_K]


def test_layers_may_have_widths_of_their_own_and_none_may_be_dense(tmp_path: Path) -> None:
    narrow, wide = (dense_model(n_layer=4, n_ff=n_ff, kind=K.F16) for n_ff in (32, 96))
    lengths = array([96, 32, 0, 96], V.UINT32)
    names = [name for name in wide.tensors if name.startswith("blk.1.")]
    model = wide.with_tensors(*(narrow.tensors[name] for name in names))  # type: ignore[arg-type]
    model = model.without(*(weight_name(2, part) for part in ("gate", "up", "down")))
    model = model.with_values(llama__feed_forward_length=lengths)
    model = model.with_tensors(raw_tensor("blk.2.ffn_up_exps.weight", (64, 32, 4), K.Q8_0, np.random.default_rng(0)))
    plan = bundle(model, tmp_path / "b.gguf")
    assert plan.n_ff == {0: 96, 1: 32, 3: 96}
    unbundle(tmp_path / "b.gguf", tmp_path / "c.gguf")
    assert contents(open_gguf(tmp_path / "c.gguf").tensors) == contents(model.tensors)


def without_key(arch: str, **changes: object) -> ArraySource:
    return dense_model(arch=arch, activation=None, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("arch", "expected"), [("arcee", "relu2"), ("nemotron", "relu2"), ("opt", "relu")])
def test_the_activation_is_known_by_the_architecture(arch: str, expected: str) -> None:
    assert plan_bundle(without_key(arch, gated=False)).activation == Activation(expected)


OTHER = tensor("blk.1.ffn_up.weight", np.zeros((96, 64), np.float32), K.Q8_0)
FUSED = tensor("blk.0.ffn_up.weight", np.zeros((192, 64), np.float32))
SUB_NORM = tensor("blk.0.ffn_sub_norm.weight", np.zeros(96, np.float32))
SCALE = tensor("blk.0.ffn_down.scale", np.zeros(1, np.float32))
BIAS = tensor("blk.0.ffn_up.bias", np.zeros(95, np.float32))
EXPERTS = tensor("blk.0.ffn_up_exps.weight", np.zeros((4, 96, 64), np.float32))
WEIGHTS = [weight_name(il, part) for il in range(2) for part in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (without_key("llama"), "architecture llama is not known to be ReLU-like.*--activation relu|relu2"),
        (without_key("arcee"), None),  # a gated relu2
        (without_key("opt"), "relu is not an activation for a model with a gate"),
        (dense_model(activation="silu"), r"llama\.feed_forward_activation: is 'silu': expected one of"),
        (dense_model(gated=False), "reglu is not an activation for a model without a gate .those are: relu, relu2"),
        (dense_model().without(*WEIGHTS).with_tensors(EXPERTS), "experts stream from the file as it is"),
        (dense_model().without(*WEIGHTS), "has no dense feed-forward blocks"),
        (dense_model().with_tensors(OTHER), r"blk\.1\.ffn_up\.weight: is Q8_0, blk\.0.* is F32; .*--type"),
        (dense_model().with_tensors(FUSED), r"blk\.0\.ffn_up\.weight: holds gate and up in one matrix"),
        (dense_model().with_tensors(SUB_NORM), r"blk\.0\.ffn_sub_norm\.weight: has no place in a bundle"),
        (dense_model().with_tensors(SCALE), r"blk\.0\.ffn_down\.scale: has no place in a bundle"),
        (dense_model().with_tensors(BIAS), r"ffn_up\.bias: has the shape \[95\], expected \[96\]"),
        (dense_model().without("blk.1.ffn_gate.weight"), r"ffn_gate\.weight: is missing, but other layers have a gate"),
        (dense_model().without("blk.1.ffn_down.weight"), r"blk\.1\.ffn_down\.weight: is missing, but layer 1"),
        (dense_model().with_values(llama__feed_forward_length=u32(95)), r"has the shape \[64, 96\], expected \[64, 95"),
        (dense_model().with_values(llama__feed_forward_length=None), r"llama\.feed_forward_length: is missing"),
        (dense_model().with_values(general__architecture=None), r"general\.architecture: is missing"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_bundled_are_refused_by_name(
    tmp_path: Path, model: ArraySource, said: str | None
) -> None:
    path = model.save(tmp_path / "a.gguf")
    if said is None:
        assert bundle(path, tmp_path / "b.gguf").activation == Activation("relu2")
        return
    with pytest.raises(GgufToolsError, match=said) as caught:
        bundle(path, tmp_path / "b.gguf")
    assert caught.value.file == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_activation_that_contradicts_the_file_is_refused() -> None:
    with pytest.raises(GgufToolsError, match="its activation is reglu, not drelu"):
        plan_bundle(dense_model(), activation=Activation("drelu"))
    with pytest.raises(GgufToolsError, match="its activation is relu2, not relu"):
        plan_bundle(without_key("arcee", gated=False), activation=Activation("relu"))
    fatrelu = Activation("fatrelu", 0.01)
    model = dense_model(activation=None)
    model = model.with_values(**fatrelu.to_values("llama"))
    assert plan_bundle(model, activation=fatrelu).activation == fatrelu


def test_a_bundled_file_is_not_bundled_again_nor_an_ordinary_one_unbundled(tmp_path: Path) -> None:
    path = dense_model().save(tmp_path / "a.gguf")
    bundle(path, tmp_path / "b.gguf")
    with pytest.raises(GgufToolsError, match="is bundled already"):
        bundle(tmp_path / "b.gguf", tmp_path / "c.gguf")
    with pytest.raises(GgufToolsError, match="has no bundles"):
        unbundle(path, tmp_path / "c.gguf")
    with pytest.raises(GgufToolsError, match="is the input"):
        bundle(path, path, force=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_numbers_are_refused_before_they_reach_the_engine(tmp_path: Path, value: float) -> None:
    values = np.zeros((64, 96), np.float32)
    values[3, 5] = value
    model = dense_model().with_tensors(tensor("blk.1.ffn_down.weight", values))
    with pytest.raises(GgufToolsError, match=r"blk\.1\.ffn_down\.weight: .* not numbers"):
        bundle(model, tmp_path / "b.gguf", kind=K.Q8_0)
    assert not list(tmp_path.iterdir())
    bundle(model, tmp_path / "b.gguf")  # as they are, they are copied


def test_values_too_large_for_f16_are_refused(tmp_path: Path) -> None:
    model = dense_model().with_tensors(tensor("blk.1.ffn_up.weight", np.full((96, 64), 1e5, np.float32)))
    with pytest.raises(GgufToolsError, match=r"blk\.1\.ffn_up\.weight: holds values too large for F16"):
        bundle(model, tmp_path / "b.gguf", kind=K.F16)


def test_parts_of_a_bundle_are_read_row_by_row_and_column_by_column() -> None:
    rng = np.random.default_rng(0)
    for name in ("bundled", "split"):
        layout = BundleLayout.of({"gate": K.Q8_0, "up": K.Q8_0, "down": K.F16}, 64, name)
        stored = raw_tensor("blk.0.ffn_bundle.weight", (layout.record_bytes, 24), FLASH, rng)
        for part in layout.parts:
            view = BundlePart("x", stored, layout, part)
            begins = [layout.begin(part, i, 24) for i in range(24)]
            flat = stored.rows.reshape(-1)
            expected = np.stack([flat[begin : begin + part.row_bytes] for begin in begins])
            for start, stop in ((0, 24), (3, 20), (7, 8), (5, 5)):
                assert np.array_equal(view.raw(start, stop), expected[start:stop])
            half = part.row_bytes // 2
            assert np.array_equal(view.raw_columns(32, 64), expected[:, half:])


def zero_model(path: Path, *, n_layer: int, n_embd: int, n_ff: int) -> Path:
    """A large file that takes no disk: all weights are zero."""
    model = dense_model(n_layer=0, arch="arcee", activation=None)
    model = model.with_values(
        arcee__block_count=u32(n_layer), arcee__embedding_length=u32(n_embd), arcee__feed_forward_length=u32(n_ff)
    )
    planned = [
        PlannedTensor(weight_name(il, part), shape, K.Q8_0, lambda: iter(()))
        for il in range(n_layer)
        for part, shape in (("up", (n_embd, n_ff)), ("down", (n_ff, n_embd)))
    ]
    # the head of such a file, and then a hole
    head, n_bytes = head_of(model.values, planned)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(n_bytes)
    return path


def head_of(values: dict[str, KeyValue], planned: list[PlannedTensor]) -> tuple[bytes, int]:
    sizes = [data_bytes(one) for one in planned]
    head = stream._head(values, planned, sizes, 32)
    return head, len(head) + sum(-(-size // 32) * 32 for size in sizes)


PEAK = """
import json, re, sys
import numpy as np
from gguf import GGMLQuantizationType as K
from gguf_tools import ggml
from gguf_tools.bundle import bundle
ggml.dequantize(ggml.quantize(np.zeros((8, 1 << 18), np.float32), K.Q8_0), K.Q8_0)
def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) << 10
before, memory = peak(), int(sys.argv[3])
bundle(sys.argv[1], sys.argv[2], memory=memory)
print(json.dumps(peak() - before))
"""


@pytest.mark.full
def test_600_mb_are_bundled_in_the_memory_that_is_given(tmp_path: Path) -> None:
    path = zero_model(tmp_path / "a.gguf", n_layer=2, n_embd=4096, n_ff=34816)
    assert path.stat().st_size > 600e6
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "b.gguf"), str(32 * MIB)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    assert json.loads(result.stdout) < (32 + 16) * MIB  # besides: blocks of what is copied, threads
    (tmp_path / "b.gguf").unlink()


@pytest.mark.parametrize("module", ["gguf_tools", "llama_flash"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_leaves_nothing(
    tmp_path: Path, number: signal.Signals, status: int, module: str
) -> None:
    path = zero_model(tmp_path / "a.gguf", n_layer=4, n_embd=2048, n_ff=8192)
    command = [sys.executable, "-m", module, "bundle", str(path), str(tmp_path / "b.gguf"), "--memory", "1"]
    for _ in range(5):  # unless the signal came when it had ended by itself
        (tmp_path / "b.gguf").unlink(missing_ok=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while not list(tmp_path.glob(".*.partial")) and not (tmp_path / "b.gguf").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            process.send_signal(number)
            output, errors = process.communicate(timeout=400)
        if process.returncode != 0:
            break
    assert (process.returncode, output, errors) == (status, "", "")
    assert list(tmp_path.iterdir()) == [path]
