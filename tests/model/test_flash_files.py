"""Bundle files that are not as docs/reference/format.md says are refused before a load, with key or tensor named."""

from __future__ import annotations

import math
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import ModelFile
from dense_models import array, text, u32
from flash_models import flash_model
from gguf import GGUFValueType as V
from gguf_strategies import key_values, many
from hypothesis import event, given
from hypothesis import strategies as st
from test_bundle_loader import MODEL, ROW, flash_keys, flash_tensors, write

from gguf_tools import GgufToolsError
from gguf_tools.format import FlashInfo, read_flash
from gguf_tools.source import KeyValue, data_bytes, open_gguf
from gguf_tools.stream import _string, _value
from llama_flash import FlashFormatError
from llama_flash.model.bundles import Bundles, holds_bundles, read_bundles
from llama_flash.model.gguf import read_gguf

FLASH, F32, F16, Q4_0, F64, UNKNOWN = 17996, 0, 1, 2, 28, 77
RANK = 8
BUNDLE = "blk.1.ffn_bundle.weight"


@dataclass(frozen=True)
class Info:
    """What a file's head says of a tensor."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from the begin of the data


@dataclass(frozen=True, repr=False)
class RawFile:
    """A GGUF file in which the head may say anything about the data."""

    values: dict[str, KeyValue]
    tensors: dict[str, Info]
    data: bytes

    def __repr__(self) -> str:
        return f"RawFile of {len(self.tensors)} tensors"

    @classmethod
    def of(cls, path: Path) -> RawFile:
        source, content = open_gguf(path), path.read_bytes()
        size = max(t.offset + data_bytes(t) for t in source.tensors.values())  # type: ignore[attr-defined]
        begin = min(t.offset for t in source.tensors.values())  # type: ignore[attr-defined]
        infos = {
            name: Info(name, t.shape, int(t.kind), t.offset - begin)  # type: ignore[attr-defined]
            for name, t in source.tensors.items()
        }
        return cls(source.values, infos, content[begin:size])

    def save(self, path: Path) -> Path:
        head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.values)))
        for key, value in self.values.items():
            head += _string(key) + _value(key, value)
        for info in self.tensors.values():
            dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
            head += _string(info.name) + dimensions + struct.pack("<IQ", info.type, info.offset)
        alignment = self.values["general.alignment"].value if "general.alignment" in self.values else 32
        path.write_bytes(
            bytes(head) + bytes(-len(head) % (alignment if isinstance(alignment, int) else 32)) + self.data
        )
        return path


Change = Callable[[RawFile], RawFile]


def put(key: str, value: KeyValue | None) -> Change:
    """Another value of a key; None: without it."""

    def change(file: RawFile) -> RawFile:
        values = {**file.values, key: value}
        return replace(file, values={key: value for key, value in values.items() if value is not None})

    return change


def info(name: str, /, **changes: Any) -> Change:
    """Another info of a tensor, or a tensor more, at the begin of the data."""

    def change(file: RawFile) -> RawFile:
        old = file.tensors.get(name, Info(name, (8,), F32, 0))
        return replace(file, tensors={**file.tensors, name: replace(old, **changes)})

    return change


def without(*names: str) -> Change:
    return lambda file: replace(file, tensors={k: v for k, v in file.tensors.items() if k not in names})


def behind_the_end(name: str) -> Change:
    """The tensor's last four bytes are not there."""

    def change(file: RawFile) -> RawFile:
        size = math.prod(file.tensors[name].shape) * {FLASH: 1, F32: 4}[file.tensors[name].type]
        return info(name, offset=len(file.data) - size + 4)(file)

    return change


def both(*changes: Change) -> Change:
    def change(file: RawFile) -> RawFile:
        for one in changes:
            file = one(file)
        return file

    return change


@pytest.fixture(scope="module")
def valid(model_folder: Path) -> RawFile:
    keys, tensors = flash_keys(), flash_tensors()
    for il in range(MODEL.n_layer):
        tensors[f"blk.{il}.ffn_predictor_in.weight"] = np.zeros((RANK, MODEL.n_embd), np.float32)
        tensors[f"blk.{il}.ffn_predictor_out.weight"] = np.zeros((MODEL.n_ff, RANK), np.float32)
        tensors[f"blk.{il}.ffn_predictor.bias"] = np.zeros(MODEL.n_ff, np.float32)
    path = write(model_folder / "valid.gguf", keys, tensors)
    return both(put("flash.predictor.kind", text("lowrank")), put("flash.predictor.ranks", u32s(RANK, RANK)))(
        RawFile.of(path)
    )


def load(path: Path, **options: Any) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), **{"flash_offload": True, "n_ctx": 64, "verbose": False, **options})


def test_the_file_from_which_the_others_are_made_loads(valid: RawFile, tmp_path: Path) -> None:
    llm = load(valid.save(tmp_path / "valid.gguf"))
    llm.eval([1, 2, 3])
    assert llm.flash.plan.bundles.has_predictors
    llm.close()


def u32s(*values: int) -> KeyValue:
    return array(list(values), V.UINT32)


def u64s(*values: int) -> KeyValue:
    return array(list(values), V.UINT64)


def strings(*values: str) -> KeyValue:
    return array(list(values), V.STRING)


ACTIVATION = "llama.feed_forward_activation"
IN, OUT, BIAS = (f"blk.1.ffn_predictor{suffix}" for suffix in ("_in.weight", "_out.weight", ".bias"))
NOT_WEIGHTS = "not a known type of weights"

# what is wrong, and what the message says
REFUSED: list[tuple[Change, str]] = [
    (put("flash.version", u32(2)), r"key flash\.version is 2, this engine reads 1"),
    (put("flash.version", text("1")), r"key flash\.version is of type string, not uint32"),
    (put("flash.version", None), r"key flash\.\S+ is there without flash\.version"),
    (put("flash.bundle.parts", None), r"key flash\.bundle\.parts is missing"),
    (put("flash.bundle.parts", strings("up", "gate", "down")), r"key flash\.bundle\.parts is \['up', 'gate', 'down'\]"),
    (put("flash.bundle.types", u32s(0, 0)), r"key flash\.bundle\.types has 2 entries, not 3"),
    (put("flash.bundle.types", u32s(0, 1, 0)), r"key flash\.bundle\.\w+ "),
    (put("flash.bundle.types", u32s(UNKNOWN, UNKNOWN, 0)), f"bundle\\.types gives gate the type 77: {NOT_WEIGHTS}"),
    (put("flash.bundle.types", u32s(0, 0, FLASH)), f"flash\\.bundle\\.types gives down the type 17996: {NOT_WEIGHTS}"),
    (put("flash.bundle.types", u32s(0, 0, F64)), f"flash\\.bundle\\.types gives down the type 28: {NOT_WEIGHTS}"),
    (put("flash.bundle.types", u32s(12, 12, 12)), r"flash\.bundle\.types gives gate .* not whole blocks of 256"),
    (put("flash.bundle.types", u64s(0, 0, 0)), r"flash\.bundle\.types is of type uint64\[\], not uint32\[\]"),
    (put("flash.bundle.row_lengths", u32s(64, 64, 96)), r"flash\.bundle\.row_lengths says 96, embedding_length is 64"),
    (put("flash.bundle.row_lengths", u32s(*[64] * 5000)), r"flash\.bundle\.row_lengths has 5000 entries, not 3"),
    (put("flash.bundle.offsets", u64s(0, ROW, ROW)), r"flash\.bundle\.offsets lets down begin at 256, .* end at 512"),
    (put("flash.bundle.offsets", u32s(0, ROW, 2 * ROW)), r"flash\.bundle\.offsets is of type uint32\[\]"),
    (put("flash.bundle.record_bytes", KeyValue(3 * ROW + 1, V.UINT64)), r"flash\.bundle\.record_bytes is 769"),
    (put("flash.bundle.record_bytes", u32(3 * ROW)), r"flash\.bundle\.record_bytes is of type uint32, not uint64"),
    (put("flash.bundle.layout", text("rows")), r"flash\.bundle\.layout is 'rows': expected one of bundled, split"),
    (put("flash.bundle.layout", None), r"flash\.bundle\.layout is missing"),
    (put(ACTIVATION, None), r"llama\.feed_forward_activation is missing"),
    (put(ACTIVATION, text("silu")), r"feed_forward_activation is 'silu': expected one of relu, "),
    (put(ACTIVATION, text("relu")), r"feed_forward_activation is 'relu', which does not fit the parts gate, up, down"),
    (put(ACTIVATION, text("fatrelu")), r"feed_forward_activation_threshold is missing"),
    (
        both(put(ACTIVATION, text("fatrelu")), put(f"{ACTIVATION}_threshold", KeyValue(math.inf, V.FLOAT32))),
        r"feed_forward_activation_threshold is inf",
    ),
    (put("llama.embedding_length", u32(128)), r"row_lengths says 64, embedding_length is 128"),
    (put("llama.embedding_length", None), r"llama\.embedding_length is missing"),
    (put("llama.embedding_length", KeyValue(64.0, V.FLOAT32)), r"embedding_length is of type float32"),
    (put("llama.feed_forward_length", u32(97)), r"tensor blk\.0\.\S+ has the shape .*, expected .*97"),
    (
        both(
            put("llama.feed_forward_length", u32s(96, 95)),
            put("flash.predictor.ranks", u32s(RANK, 0)),
            without(IN, OUT, BIAS),
        ),
        r"tensor blk\.1\.ffn_bundle\.weight has the shape \[768, 96\], expected \[768, 95\]",
    ),
    (put("llama.block_count", u32(2**32 - 1)), r"llama\.block_count is 4294967295"),
    (
        both(put("llama.block_count", u32(1)), put("flash.predictor.ranks", u32s(RANK))),
        r"tensor blk\.1\.\S+ is there, but the model has 1 layers",
    ),
    (put("general.architecture", None), r"key general\.architecture is missing"),
    (info(BUNDLE, shape=(3 * ROW, 95)), r"blk\.1\.ffn_bundle\.weight has the shape \[768, 95\], expected \[768, 96\]"),
    (info(BUNDLE, type=24), r"tensor blk\.1\.ffn_bundle\.weight is of type I8, expected FLASH"),
    (info(BUNDLE, name="blk.1.ffn_bundle.bias"), r"blk\.1\.ffn_bundle\.bias is of the type of bundles, but is none"),
    (without(BUNDLE, "blk.0.ffn_bundle.weight"), r"flash\.version is there, but no tensor blk\.N\.ffn_bundle\.weight"),
    (behind_the_end(BUNDLE), r"tensor blk\.1\.ffn_bundle\.weight ends at byte \d+, but the file has \d+: it is cut"),
    (info(BUNDLE, offset=1 << 60), r"tensor blk\.1\.ffn_bundle\.weight ends at byte 11529\d+, but"),
    *(
        (info(f"blk.1.ffn_{part}.weight", shape=(64, 96), type=F32), rf"blk\.1\.ffn_{part}\.weight is there besides")
        for part in ("gate", "up", "down")
    ),
    (info("blk.0.ffn_up.bias", shape=(95,), type=F32), r"blk\.0\.ffn_up\.bias has the shape \[95\], expected \[96\]"),
    (info("blk.0.ffn_gate.bias", shape=(96,), type=F16), r"tensor blk\.0\.ffn_gate\.bias is of type F16, expected F32"),
    (info("blk.0.ffn_down.bias", shape=(96,), type=F32), r"0\.ffn_down\.bias has the shape \[96\], expected \[64\]"),
    (put("flash.predictor.kind", text("mlp")), r"flash\.predictor\.kind is 'mlp': expected one of lowrank"),
    (put("flash.predictor.kind", None), r"key flash\.predictor\.ranks is there without flash\.predictor\.kind"),
    (put("flash.predictor.ranks", None), r"flash\.predictor\.ranks is missing"),
    (put("flash.predictor.ranks", u32s(RANK)), r"flash\.predictor\.ranks has 1 entries, not 2"),
    (put("flash.predictor.ranks", u32s(RANK, 4)), r"tensor blk\.1\.ffn_predictor_in\.weight has the shape \[64, 8\]"),
    (put("flash.predictor.ranks", u32s(RANK, 0)), r"tensor blk\.1\.ffn_predictor_in\.weight is there, but .* no rank"),
    (put("flash.predictor.recall", KeyValue(1.5, V.FLOAT32)), r"flash\.predictor\.recall is 1\.5, not a share"),
    *((without(name), rf"tensor {name} is missing: flash\.predictor\.ranks gives layer 1") for name in (IN, OUT, BIAS)),
    *((behind_the_end(name), rf"tensor {name} ends at byte \d+, but .* cut off") for name in (IN, OUT, BIAS)),
    (info(IN, shape=(RANK, 64)), r"blk\.1\.ffn_predictor_in\.weight has the shape \[8, 64\], expected \[64, 8\]"),
    (info(OUT, shape=(RANK, 95)), r"blk\.1\.ffn_predictor_out\.weight has the shape \[8, 95\], expected \[8, 96\]"),
    (info(BIAS, shape=(95,)), r"tensor blk\.1\.ffn_predictor\.bias has the shape \[95\], expected \[96\]"),
    (info(IN, type=Q4_0), r"blk\.1\.ffn_predictor_in\.weight is of type Q4_0, expected F32 or F16 or Q8_0 or BF16"),
    (info(OUT, type=8), r"tensor blk\.1\.ffn_predictor_out\.weight is of type 8: rows of 8 elements"),
    (info(BIAS, type=F16), r"tensor blk\.1\.ffn_predictor\.bias is of type F16, expected F32"),
    (info(IN, type=UNKNOWN), r"tensor blk\.1\.ffn_predictor_in\.weight is of type 77"),
]  # fmt: skip


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(llama_cpp.llama.internals, "LlamaModel", loaded)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("case", range(len(REFUSED)), ids=[said for _, said in REFUSED])
def test_it_is_refused_before_anything_is_loaded(case: int, valid: RawFile, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    with pytest.raises(FlashFormatError, match=said) as caught:
        load(change(valid).save(tmp_path / "bad.gguf"))
    assert "bad.gguf: " in str(caught.value)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_file_that_is_cut_short_is_refused(valid: RawFile, tmp_path: Path) -> None:
    last = max(valid.tensors.values(), key=lambda one: one.offset)
    assert last.name.endswith(("predictor.bias", "bundle.weight"))
    with pytest.raises(FlashFormatError, match=f"tensor {last.name} ends at byte .* cut off"):
        load(replace(valid, data=valid.data[:-4]).save(tmp_path / "cut.gguf"))


@pytest.mark.parametrize(
    "change",
    [
        put("flash.predictor.recall", KeyValue(0.99, V.FLOAT32)),
        put(f"{ACTIVATION}_threshold", text("of no meaning here")),
        put("llama.feed_forward_length", u32s(96, 96)),
        put("flash.of.later.versions", u32(1)),
        info(BUNDLE, shape=(3 * ROW, 96, 1)),
        info("blk.1.ffn_down.bias", shape=(64,), type=F32),
    ],
)
def test_what_the_format_allows_is_read(change: Change, valid: RawFile, tmp_path: Path) -> None:
    bundles = read_bundles(read_gguf(change(valid).save(tmp_path / "good.gguf")))
    assert bundles is not None
    assert [(layer.n_ff, layer.rank) for layer in bundles.layers] == [(96, RANK), (96, RANK)]


# Files that nobody thought of.

BASE_KEYS = sorted(flash_model().values)
NAMES = [
    *flash_model().tensors,
    *(f"blk.{il}.ffn_{part}" for il in (2, 3, 99) for part in ("bundle.weight", "predictor_in.weight", "up.weight")),
    *("blk.01.ffn_bundle.weight", "blk.0.ffn_bundle.scale", "blk.1.ffn_predictor.weight", "ffn_bundle.weight"),
]
numbers = st.one_of(st.integers(0, 200), st.sampled_from([2**31, 2**32 - 1]))


@st.composite
def near_values(draw: st.DrawFn) -> Change:
    """A key's value changed a little, of the type that it has."""
    key = draw(st.sampled_from(BASE_KEYS))
    old = flash_model().values[key]
    if isinstance(old.value, list):
        new = list(old.value)
        if draw(st.booleans()):
            new[draw(st.integers(0, len(new) - 1))] = draw(
                st.sampled_from(new) if old.sub_type == V.STRING else numbers
            )
        elif draw(st.booleans()):
            new.append(new[0])
        else:
            new.pop()
        return put(key, replace(old, value=new))
    if old.type == V.STRING:
        names = ["relu", "relu2", "fatrelu", "drelu", "split", "lowrank", "llama"]
        return put(key, replace(old, value=draw(st.sampled_from(names))))
    return put(key, replace(old, value=draw(st.floats(0, 2, width=32) if old.type == V.FLOAT32 else numbers)))


@st.composite
def infos(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(NAMES))
    shapes = st.one_of(
        st.lists(st.sampled_from([0, 1, 8, 32, 64, 95, 96, 172, 2**40]), max_size=4).map(tuple),
        st.sampled_from([(172, 96), (172, 96, 1), (64, 8), (8, 96), (96,), (64,)]),
    )
    fields = {
        "name": st.sampled_from(NAMES),
        "shape": shapes,
        "type": st.sampled_from([F32, F16, Q4_0, 8, 24, F64, 30, 42, FLASH, UNKNOWN]),
        "offset": st.integers(0, 4000).map(lambda n: 32 * n),
    }
    changed = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=2, unique=True))
    return info(name, **{one: draw(fields[one]) for one in changed})


mutations = st.lists(
    st.one_of(
        near_values(),
        st.builds(put, st.sampled_from([*BASE_KEYS, "flash.new", "flash.predictor.new"]), st.none() | key_values),
        infos(),
        st.sampled_from(NAMES).map(without),
        st.integers(0, 60_000).map(lambda size: lambda file: replace(file, data=file.data[:size])),
    ),
    min_size=1,
    max_size=3,
).map(lambda changes: both(*changes))


@pytest.fixture(scope="module")
def small(model_folder: Path) -> RawFile:
    return RawFile.of(flash_model().save(model_folder / "small.gguf"))


def ours(path: Path) -> Bundles | str | None:
    """What the engine's reader says, predictors and biases included; a string: why it refuses the file."""
    try:
        bundles = read_bundles(read_gguf(path))
        for description in bundles.descriptions() if bundles else ():
            description.as_struct()
    except FlashFormatError as error:
        assert str(path) in str(error)
        return str(error)
    return bundles


def same(bundles: Bundles | None, info: FlashInfo | None) -> bool:
    if bundles is None or info is None:
        return bundles is None and info is None
    return (
        [(p.name, p.type, p.offset, p.row_bytes) for p in bundles.format.parts]
        == [(p.name, int(p.kind), p.offset, p.row_bytes) for p in info.bundle.parts]
        and (bundles.format.activation, bundles.format.threshold)
        == (info.activation.name, info.activation.threshold or 0.0)
        and {layer.layer: layer.n_ff for layer in bundles.layers} == info.n_ff
        and all(layer.rank == (info.predictor.ranks[layer.layer] if info.predictor else 0) for layer in bundles.layers)
    )


@many
@given(change=mutations)
def test_both_readers_refuse_the_same_files_and_nothing_else_goes_wrong(
    change: Change, small: RawFile, model_folder: Path
) -> None:
    """Except what is no whole GGUF file, which `open_gguf` refuses: the engine's loader does so, if `ours` does not."""
    path = change(small).save(model_folder / "mutated.gguf")
    found = ours(path)
    try:
        source = open_gguf(path)
    except GgufToolsError:
        event("no whole GGUF file")
        return
    try:
        theirs = read_flash(source, path)
    except GgufToolsError as error:
        event("refused by both")
        assert isinstance(found, str), f"gguf_tools alone refuses it: {error}"
        return
    if isinstance(found, str) and "block_count is" in found:
        event("more layers than the engine has")
        return
    event("read by both")
    assert not isinstance(found, str), f"llama_flash alone refuses it: {found}"
    assert same(found, theirs)


@many
@given(places=st.dictionaries(st.integers(4, 4000), st.integers(0, 255), min_size=1, max_size=4))
def test_a_damaged_head_is_read_or_refused(places: dict[int, int], small: RawFile, model_folder: Path) -> None:
    path = small.save(model_folder / "damaged.gguf")
    content = bytearray(path.read_bytes())
    for place, byte in places.items():
        content[place] = byte
    path.write_bytes(content)
    ours(path)


# Without flash_offload.


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("off", [False, None])
def test_without_flash_offload_the_message_says_what_to_do(off: Any, valid: RawFile, tmp_path: Path) -> None:
    path = valid.save(tmp_path / "bundled.gguf")
    with pytest.raises(FlashFormatError) as caught:
        load(path, flash_offload=off)
    assert str(caught.value) == (
        f"{path} holds neuron bundles: load it with flash_offload=True, or convert it back with "
        "`python -m gguf_tools unbundle`"
    )


def test_the_vocabulary_of_a_bundle_file_needs_no_flash_offload(valid: RawFile, tmp_path: Path) -> None:
    llm = load(valid.save(tmp_path / "bundled.gguf"), flash_offload=False, vocab_only=True)
    assert llm.tokenize(b"a")
    llm.close()


def test_a_file_that_stock_loads_is_loaded(model_file: ModelFile, tmp_path: Path) -> None:
    plain = RawFile.of(model_file("llama"))
    for name, change in (
        ("plain", both()),
        ("version", put("flash.version", u32(1))),
        ("text", put("general.description", text("flash.version"))),
    ):
        path = change(plain).save(tmp_path / f"{name}.gguf")
        assert not holds_bundles(path)
        load(path, flash_offload=False).close()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(20), b"GGUF\x03" + b"\xff" * 99])
def test_what_is_no_model_is_left_to_the_engine(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "no-model.gguf"
    path.write_bytes(content)
    assert not holds_bundles(path)
    assert not holds_bundles(tmp_path)
    assert not holds_bundles(tmp_path / "not-there.gguf")
    with pytest.raises(ValueError, match="Failed to load model"):
        load(path, flash_offload=False)


def test_a_large_vocabulary_is_searched_and_not_read_string_by_string(valid: RawFile, tmp_path: Path) -> None:
    words = [f"word{i:x}" for i in range(150_000)]
    large = {"tokenizer.ggml.tokens": strings(*words), "tokenizer.ggml.merges": strings(*(f"{w} {w}" for w in words))}
    ordinary = {key: value for key, value in valid.values.items() if not key.startswith("flash.")}
    plain = replace(valid, values=ordinary | large)
    plain = without(*(name for name in plain.tensors if "bundle" in name or "predictor" in name))(plain)
    path = plain.save(tmp_path / "plain.gguf")
    calls = Counter[str]()
    sys.setprofile(lambda frame, event, _: calls.update([event]))
    try:
        assert not holds_bundles(path)
    finally:
        sys.setprofile(None)
    assert 0 < calls.total() < 1000
    behind = replace(valid, values=large | valid.values)
    assert holds_bundles(behind.save(tmp_path / "behind.gguf"))
