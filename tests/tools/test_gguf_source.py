"""Reading and writing GGUF files: what is written is what is read, and damage is an error that says where."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import ModelFile
from dense_models import Bytes, array, contents, dense_model, raw_tensor, read_everything, text, u32
from gguf import GGMLQuantizationType as K
from gguf import GGUFReader
from gguf import GGUFValueType as V
from gguf_strategies import few, key_values, many, strings
from hypothesis import given
from hypothesis import strategies as st

from gguf_tools import FLASH, GgufToolsError, ggml, stream
from gguf_tools.source import KeyValue, open_gguf, raw_columns, row_count
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from gguf_tools.types import WEIGHT_TYPES, quantisable, row_bytes


@few
@given(values=st.dictionaries(strings.filter(lambda key: key != "general.alignment"), key_values, max_size=8))
def test_key_values_are_read_as_they_were_written(tmp_path: Path, values: dict[str, KeyValue]) -> None:
    write_gguf(tmp_path / "a.gguf", values, [], alignment=32, force=True)
    assert open_gguf(tmp_path / "a.gguf").values == values


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    flash = raw_tensor("blk.0.ffn_bundle.weight", (100, 3), FLASH, rng)
    weight = raw_tensor("a.weight", (64, 2, 3), K.Q8_0, rng)
    values = {"general.architecture": text("llama"), "a.numbers": array([1, 2, 3], V.UINT64)}
    write_gguf(tmp_path / "a.gguf", values, [copied(flash), copied(weight)])
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["a.numbers"].contents() == [1, 2, 3]
    assert reader.fields["general.alignment"].contents() == 4096
    first, second = reader.tensors
    assert (first.name, first.tensor_type.name, list(first.shape)) == ("blk.0.ffn_bundle.weight", "FLASH", [100, 3])
    assert np.array_equal(first.data, flash.rows)
    assert np.array_equal(second.data.reshape(6, -1), weight.rows)
    assert first.data_offset % 4096 == second.data_offset % 4096 == 0


@pytest.mark.parametrize("form", ["arcee", "qwen3moe"])
def test_a_copy_holds_the_same_bytes_also_of_shards(model_file: ModelFile, tmp_path: Path, form: str) -> None:
    shards = open_gguf(model_file(form, n_shards=3))
    assert len(shards.files) == 3
    assert not [key for key in shards.values if key.startswith("split.")]
    write_gguf(tmp_path / "copy.gguf", shards.values, [copied(t) for t in shards.tensors.values()], alignment=32)
    copy, whole = open_gguf(tmp_path / "copy.gguf"), open_gguf(model_file(form))
    assert contents(copy.tensors) == contents(whole.tensors)
    assert copy.values == shards.values


@pytest.mark.parametrize("kind", sorted(WEIGHT_TYPES), ids=lambda kind: kind.name)
def test_values_of_every_type_are_those_of_the_gguf_package(kind: K) -> None:
    rng = np.random.default_rng(int(kind))
    if quantisable(kind, 512) == kind and not kind.name.startswith("IQ"):
        rows = ggml.quantize(rng.standard_normal((4, 512), np.float32), kind)
    else:  # takes long, or an importance matrix: any bytes, small ones, so that scales are numbers
        rows = rng.integers(0, 60, (4, row_bytes(kind, 512)), np.uint8)
    values = ggml.dequantize(rows, kind)
    assert values.shape == (4, 512)
    try:
        expected = gguf.quants.dequantize(rows, kind)
    except NotImplementedError:
        return
    assert np.allclose(values, expected, rtol=1e-6, atol=0)


@few
@given(kind=st.sampled_from([K.F32, K.BF16, K.Q4_0, K.Q6_K]), data=st.data())
def test_columns_are_those_of_the_rows(tmp_path: Path, kind: K, data: st.DataObject) -> None:
    tensor = raw_tensor("a.weight", (1024, 3, 2), kind, np.random.default_rng(0))
    write_gguf(tmp_path / "a.gguf", {}, [copied(tensor)], force=True)
    stored = open_gguf(tmp_path / "a.gguf").tensors["a.weight"]
    block = int(gguf.GGML_QUANT_SIZES[kind][0])
    start = data.draw(st.integers(0, 1024 // block))
    stop = data.draw(st.integers(start, 1024 // block))
    begin, end = row_bytes(kind, start * block), row_bytes(kind, stop * block)
    for one in (stored, tensor):
        assert np.array_equal(raw_columns(one, start * block, stop * block), tensor.rows[:, begin:end])


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "a.gguf"
    return dense_model(n_layer=1, n_embd=32, n_ff=32, kind=K.Q8_0).save(path).read_bytes()


@many
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_an_error_of_ours(tmp_path: Path, valid: bytes, data: st.DataObject) -> None:
    path = tmp_path / "cut.gguf"
    # the last tensor ends before the padding does
    path.write_bytes(valid[: data.draw(st.integers(0, len(valid) - 32))])
    with pytest.raises(GgufToolsError) as caught:
        open_gguf(path)
    assert caught.value.file == str(path)


@many
@given(data=st.data())
def test_changed_bytes_are_no_error_or_one_of_ours(tmp_path: Path, valid: bytes, data: st.DataObject) -> None:
    damaged = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(1400, len(valid)) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        read_everything(open_gguf(path).tensors)
    except GgufToolsError as error:
        assert error.file == str(path)


def test_a_tensor_that_is_cut_off_after_opening_is_named(tmp_path: Path) -> None:
    path = dense_model().save(tmp_path / "a.gguf")
    source = open_gguf(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(GgufToolsError, match=r"a\.gguf: output_norm\.weight: cut off"):
        read_everything(source.tensors)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = dense_model().save(tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert data[at : at + 4] == bytes(4)  # F32
    data[at] = 99
    path.write_bytes(data)
    with pytest.raises(GgufToolsError, match=r"output_norm\.weight: is of type 99, which this engine does not know"):
        open_gguf(path)


def test_a_missing_shard_is_named(model_file: ModelFile, tmp_path: Path) -> None:
    first = model_file("arcee", n_shards=3)
    shutil.copy(first, tmp_path)
    with pytest.raises(GgufToolsError, match=r"2 of 3 shards are missing, the first is .*-00002-of-00003"):
        open_gguf(tmp_path / first.name)
    with pytest.raises(GgufToolsError, match="is shard 2 of 3, not the first"):
        open_gguf(first.with_name(first.name.replace("00001-of", "00002-of")))


def test_files_are_closed_with_the_source(tmp_path: Path) -> None:
    path = dense_model().save(tmp_path / "a.gguf")

    def n_open() -> int:
        """Other threads open and close files of their own at any time."""
        targets = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                targets.append(os.readlink(link))
        return targets.count(str(path))

    source = open_gguf(path)
    read_everything(source.tensors)
    assert n_open() > 0
    del source
    assert n_open() == 0


def planned(chunks: list[Bytes]) -> PlannedTensor:
    return PlannedTensor("a.weight", (8, 2), K.F32, lambda: iter(chunks))


def zeros(n_bytes: int) -> Bytes:
    return np.zeros(n_bytes, np.uint8)


def test_chunks_may_be_of_any_size(tmp_path: Path) -> None:
    data = np.arange(64, dtype=np.uint8)
    write_gguf(tmp_path / "a.gguf", {}, [planned([data[:1], data[1:60].reshape(59, 1), data[60:60], data[60:]])])
    assert open_gguf(tmp_path / "a.gguf").tensors["a.weight"].raw(0, 2).tobytes() == data.tobytes()


@pytest.mark.parametrize("n_bytes", [0, 63, 65, 1 << 20])
def test_chunks_that_are_not_the_tensors_size_are_refused(tmp_path: Path, n_bytes: int) -> None:
    with pytest.raises(GgufToolsError, match=rf"a\.weight: its chunks are {n_bytes} bytes, its shape says 64"):
        write_gguf(tmp_path / "a.gguf", {}, [planned([zeros(n_bytes)])])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GgufToolsError("no"), MemoryError, RuntimeError])
def test_whatever_goes_wrong_leaves_nothing_behind(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    def chunks() -> Iterator[Bytes]:
        yield zeros(32)
        (file,) = tmp_path.iterdir()
        assert file.name.endswith(".partial")
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        write_gguf(tmp_path / "a.gguf", {}, [PlannedTensor("a.weight", (8, 2), K.F32, chunks)])
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(GgufToolsError, match=r"needs 0\.00 GB, but .* has 0\.07 GB free"):
        write_gguf(tmp_path / "a.gguf", {}, [planned([zeros(64)])])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream, "_write_all", full)
    with pytest.raises(GgufToolsError, match=r"a\.gguf: cannot be written: No space left on device"):
        write_gguf(tmp_path / "a.gguf", {}, [planned([zeros(64)])])
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_when_asked_and_never_the_input(tmp_path: Path) -> None:
    path, link = tmp_path / "a.gguf", tmp_path / "link.gguf"
    path.write_bytes(b"precious")
    os.link(path, link)
    with pytest.raises(GgufToolsError, match="already there"):
        write_gguf(path, {}, [])
    for out in (path, link):
        with pytest.raises(GgufToolsError, match="is the input"):
            write_gguf(out, {}, [], force=True, inputs=[path])
    assert path.read_bytes() == b"precious"
    write_gguf(path, {}, [planned([zeros(64)])], force=True)
    assert row_count(open_gguf(path).tensors["a.weight"]) == 2


@pytest.mark.parametrize(
    ("path", "said"), [("missing/a.gguf", "the folder .*missing does not exist"), (".", "is a folder")]
)
def test_a_target_that_cannot_be_is_said(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(GgufToolsError, match=said):
        write_gguf(tmp_path / path, {}, [])


@pytest.mark.parametrize(
    "value", [u32(-1), u32(1 << 32), KeyValue("1", V.UINT32), KeyValue([1], V.ARRAY), KeyValue(None, V.FLOAT32)]
)
def test_a_value_that_its_type_cannot_hold_is_named(tmp_path: Path, value: KeyValue) -> None:
    with pytest.raises(GgufToolsError, match=r"some\.key: cannot be stored"):
        write_gguf(tmp_path / "a.gguf", {"some.key": value}, [])
    assert not list(tmp_path.iterdir())
