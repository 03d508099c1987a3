"""The command `python -m gguf_tools`, and what `inspect` makes of a file."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ModelFile
from dense_models import dense_model, text, u32
from gguf import GGMLQuantizationType as K
from hypothesis import given
from hypothesis import strategies as st

from gguf_tools import progress
from gguf_tools.cli import main
from gguf_tools.format import weight_name
from gguf_tools.listing import describe, sector_reads
from gguf_tools.source import data_bytes, open_gguf
from gguf_tools.synthetic.opt_cli import OPT_PRESETS
from gguf_tools.synthetic.opt_writer import write_opt


class Tool:
    """The command in this process: exit status, stdout, stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)


def test_it_runs_as_a_module(model_file: ModelFile, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gguf_tools", "bundle", str(model_file("arcee")), str(tmp_path / "b.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert (result.returncode, result.stderr) == (0, "")
    assert "3 layers of 512 neurons, records of 544 bytes (up Q8_0, down Q8_0), relu2" in result.stdout
    assert "down: Q8_0 -> Q8_0 along n_embd" in result.stdout
    mode = (tmp_path / "b.gguf").stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    assert mode == 0o666 & ~mask


def test_a_model_goes_there_and_back(tool: Tool, model_file: ModelFile, tmp_path: Path) -> None:
    model, flash, back = model_file("llama", "F16"), tmp_path / "b.gguf", tmp_path / "c.gguf"
    options = ("--activation", "fatrelu", "--threshold", "0.01")
    assert tool("bundle", model, flash, *options)[0] == 0
    assert tool("unbundle", flash, back)[0] == 0
    status, out, _ = tool("verify", model, back)
    assert status == 0
    assert out.splitlines()[-1] == "30 identical: the same function"
    status, out, _ = tool("verify", flash, model, "--json")
    assert status == 0
    assert json.loads(out)["same"] is True


def test_types_layout_and_tolerance_are_options(tool: Tool, model_file: ModelFile, tmp_path: Path) -> None:
    model, flash = model_file("arcee", "F16"), tmp_path / "b.gguf"
    status, out, _ = tool(
        "bundle", model, flash, "--type", "q4_K", "--down-type", "Q6_k", "--layout", "split", "--memory", "1"
    )
    assert status == 0
    assert "gate and up: F16 -> Q4_K" in out
    assert "(up Q4_K, down Q6_K)" in out
    status, out, _ = tool("verify", model, flash)
    assert status == 1
    assert re.search(r"differs  blk\.0\.ffn_up\.weight +F16, Q4_K  at most .* relative error 0\.07", out)
    assert out.splitlines()[-1] == "21 identical, 6 differs: not the same function"
    assert tool("verify", model, flash, "--tolerance", "0.1")[0] == 0
    status, out, _ = tool("verify", model, flash, "--tolerance", "0.1", "--json")
    found = json.loads(out)
    assert (found["same"], found["within_tolerance"]) == (False, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bundle", "LLAMA", "OUT"], r"architecture llama is not known to be ReLU-like.*--activation relu"),
        (["bundle", "MIXTRAL", "OUT"], "experts stream from the file as it is"),
        (["bundle", "ARCEE", "OUT", "--type", "q9"], "unknown type 'q9', known: bf16, f16"),
        (["bundle", "ARCEE", "OUT", "--layout", "rows"], "unknown layout 'rows', known: bundled, split"),
        (["bundle", "ARCEE", "OUT", "--activation", "gelu"], "unknown activation 'gelu', known: relu"),
        (["bundle", "LLAMA", "OUT", "--activation", "fatrelu"], "--activation fatrelu and --threshold go together"),
        (["bundle", "LLAMA", "OUT", "--threshold", "0.1"], "--activation fatrelu and --threshold go together"),
        (["bundle", "ARCEE", "ARCEE", "--force"], "is the input"),
        (["bundle", "ARCEE", "LLAMA"], "already there .--force replaces it."),
        (["unbundle", "ARCEE", "OUT"], "has no bundles"),
        (["inspect", "MISSING"], "No such file"),
        (["inspect", "."], "a folder, not a GGUF file"),
        (["verify", "ARCEE", "MISSING"], "No such file"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tool: Tool, model_file: ModelFile, tmp_path: Path, arguments: list[str], said: str
) -> None:
    names = {"ARCEE": model_file("arcee"), "LLAMA": model_file("llama"), "MIXTRAL": model_file("mixtral")}
    names |= {"OUT": tmp_path / "out.gguf", "MISSING": tmp_path / "missing.gguf"}
    status, out, err = tool(*(names.get(one, one) for one in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(said, err)
    assert not list(tmp_path.iterdir())


def test_inspect_lists_an_ordinary_file(tool: Tool, model_file: ModelFile) -> None:
    path = model_file("qwen3moe", n_shards=2)
    listing = describe(path)
    assert listing.flash is None
    assert len(listing.files) == 2
    assert set(listing.by_role) == {"experts", "attention", "embeddings and output", "other"}
    for totals in (listing.by_role, listing.by_type):
        assert sum(total.bytes for total in totals.values()) == listing.data_bytes
        assert sum(total.tensors for total in totals.values()) == len(open_gguf(path).tensors)
    status, out, _ = tool("inspect", path)
    assert status == 0
    assert "and 1 more: qwen3moe" in out
    assert out.splitlines()[-1] == "no bundles"


def test_inspect_lists_bundles_and_predictors(tool: Tool, tmp_path: Path) -> None:
    path = write_opt(OPT_PRESETS["opt-tiny"], tmp_path / "a.gguf", "bundled")
    listing = describe(path)
    tensors = open_gguf(path).tensors
    assert listing.flash is not None
    assert [(part.name, part.type, part.offset, part.bytes) for part in listing.flash.parts] == [
        ("up", "F16", 0, 512),
        ("down", "F16", 512, 512),
    ]
    assert [reads.over_read for reads in listing.flash.reads] == [0, 3]
    for layer in listing.flash.layers:
        assert layer.bundle_bytes == layer.n_ff * layer.record_bytes == 1024 * 1024
        names = [f"blk.{layer.layer}.ffn_predictor{end}" for end in ("_in.weight", "_out.weight", ".bias")]
        assert layer.predictor_bytes == sum(data_bytes(tensors[name]) for name in names)
    assert listing.by_role["bundles"].bytes == 3 * 1024 * 1024
    assert listing.values["flash.bundle.record_bytes"] == 1024
    status, out, _ = tool("inspect", path)
    assert status == 0
    for line in (
        "activation relu, layout bundled, records of 1024 bytes",
        "a record alone: 1.00 sectors of 4096 bytes, 300% over-read",
        "predictors aim at a recall of 0.99 of the activation mass",
    ):
        assert line in out.splitlines()
    status, out, _ = tool("inspect", path, "--json")
    assert json.loads(out)["flash"]["layers"][2]["layer"] == 2


def test_inspect_refuses_what_a_reader_would_refuse(tool: Tool, model_file: ModelFile, tmp_path: Path) -> None:
    source = dense_model().with_values(flash__version=u32(1))
    path = source.save(tmp_path / "a.gguf")
    status, _, err = tool("inspect", path)
    assert (status, err) == (1, f"error: {path}: flash.bundle.parts: is missing\n")


def test_names_that_are_not_printable_are_shown_escaped(tool: Tool, tmp_path: Path) -> None:
    path = dense_model(arch="a\udc80\x1b[31m").save(tmp_path / "a.gguf")
    status, out, err = tool("inspect", path)
    assert status == 1, "no engine has this architecture"
    assert r"a\udc80\x1b[31m" in out
    assert "unknown model architecture" in err and "\x1b" not in err


@given(record=st.integers(1, 20000), sector=st.sampled_from([512, 4096]))
def test_sector_reads_are_the_average_over_all_records(record: int, sector: int) -> None:
    reads = sector_reads(record, sector)
    n = sector  # a multiple of every period
    touched = sum((i * record + record - 1) // sector - i * record // sector + 1 for i in range(n)) / n
    assert reads.sectors_per_record == pytest.approx(touched)
    assert reads.over_read == pytest.approx(touched * sector / record - 1)


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()
    # there alone: other threads of this process look at the clock, too
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    with progress.byte_progress("copying", 10**9) as advance:
        for _ in range(25):
            advance(40 * 10**6)
    assert capsys.readouterr().err.splitlines() == [
        "copying: 0.40 of 1.00 GB, 40 MB/s, 15 s left",
        "copying: 0.80 of 1.00 GB, 40 MB/s, 5 s left",
    ]
    with progress.byte_progress(None, 10**9) as advance:
        for _ in range(25):
            advance(1)
    assert capsys.readouterr().err == ""


def test_kinds_that_stay_are_not_touched(tool: Tool, tmp_path: Path) -> None:
    path = dense_model(kind=K.Q8_0, n_layer=1).with_values(general__name=text("a")).save(tmp_path / "a.gguf")
    assert tool("bundle", path, tmp_path / "b.gguf", "--type", "f32")[0] == 0
    assert open_gguf(tmp_path / "b.gguf").tensors["token_embd.weight"].kind == K.F32
    assert open_gguf(tmp_path / "b.gguf").tensors[weight_name(0, "bundle")].shape == (3 * 64 * 4, 96)
