"""`llama-flash exec`: the engine's own tools say with weights on flash what they say with all of them in memory."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from caps import require_caps
from commands import FLASH, flash, in_this_process
from fault_shim import compiled
from neurons import bundled, write_model
from sparse_models import library_text

from llama_flash.model.gguf import read_gguf
from llama_flash.server.driver import EngineDriver
from llama_flash.server.tools import TOOLS, _ToolDriver

MODELS = Path(str(resources.files("llama_flash") / "models"))
MIXTURE, DENSE = MODELS / "stdlib-moe-q8_0.gguf", MODELS / "stdlib-arcee-q8_0.gguf"
BUNDLES = MODELS / "stdlib-opt-q8_0-flash.gguf"
MIB = 1 << 20
ON_FLASH = r"[\d.]+ \w+ on flash;"
SHORT = ("-c", "128", "--chunks", "4")
PATIENCE = 200.0  # seconds

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    library, _ = library_text(path.parent)
    path.write_bytes(library.read_bytes()[:12000])
    return path


def tool(*arguments: object, options: tuple[object, ...] = (), **environment: str) -> Done:
    return flash("exec", *options, "--", *arguments, **environment)


@cache
def refusal(*arguments: object) -> str:
    """Of a budget that is too small: the line about it."""
    refused = tool(*arguments, options=("--dram-budget", "32MiB"))
    assert refused.returncode == 1, refused.stderr
    lines = [line for line in refused.stderr.splitlines() if line.startswith("llama-flash: ")]
    assert len(lines) == 1 and "32.0 MiB is too small" in lines[0] and "Traceback" not in refused.stderr
    return lines[0]


def smallest(*arguments: object) -> int:
    """Bytes of the smallest budget that works for a tool, as its refusal names them."""
    return _mib(r"smallest that works is (\d+) MiB", refusal(*arguments))


def _mib(pattern: str, line: str) -> int:
    found = re.search(pattern, line)
    assert found, line
    return int(float(found[1]) * MIB)


def smallest_of_mixture(text: Path) -> int:
    """Of perplexity: of it, the other tools need about as much."""
    return smallest("perplexity", "-m", MIXTURE, "-f", text, *SHORT)


def figures(done: Done) -> list[str]:
    """All that perplexity prints: of each chunk, and at the end."""
    assert done.returncode == 0, done.stderr
    found = re.findall(r"\[\d+\][\d.]+|PPL = [\d.]+ \+/- [\d.]+", done.stdout + done.stderr)
    assert len(found) >= 3 and found[-1].startswith("PPL"), done.stderr
    return found


def on_flash(done: Done) -> bool:
    return re.search(rf"resident, {ON_FLASH}", done.stderr) is not None


@pytest.mark.parametrize("model", [MIXTURE, DENSE], ids=lambda model: model.stem)
def test_perplexity_is_that_of_all_memory_to_the_last_digit_under_the_smallest_cap(model: Path, text: Path) -> None:
    require_caps()
    arguments = ("perplexity", "-m", model, "-f", text, *SHORT)
    resident = tool(*arguments, options=("--no-flash",))
    cap = smallest(*arguments)
    capped = flash("cap", str(cap), "--", *FLASH, "exec", "--", *arguments)
    assert on_flash(capped) and not on_flash(resident)
    assert " 0 OOM kills" in capped.stderr
    assert figures(capped) == figures(resident)


def test_perplexity_in_several_calls_for_a_chunk_counts_the_logits_that_it_keeps(text: Path) -> None:
    arguments = ("perplexity", "-m", MIXTURE, "-f", text, "-c", "512", "--chunks", "2")
    whole = figures(tool(*arguments, options=("--no-flash",)))
    parts = (*arguments, "-b", "128")
    row = 4 * read_gguf(MIXTURE).n_vocab
    for given, rows in ((arguments, 512), (parts, 128 + 512)):  # of the engine, and of the tool
        assert 0 <= _mib(r"outputs ([\d.]+) MiB", refusal(*given)) - rows * row < 2 * MIB
    done = tool(*parts, options=("--dram-budget", smallest(*parts)))
    assert on_flash(done) and figures(done) == whole


def test_perplexity_of_neuron_bundles_does_not_depend_on_what_is_in_memory(text: Path) -> None:
    arguments = ("perplexity", "-m", BUNDLES, "-f", text, *SHORT)
    exact = ("--predictor", "exact")
    tight = tool(*arguments, options=(*exact, "--dram-budget", smallest(*arguments) + 2 * MIB))
    assert on_flash(tight) and "active neurons exact" in tight.stderr
    assert figures(tight) == figures(tool(*arguments, options=exact))
    assert figures(tight) == figures(tool(*arguments, options=("--predictor", "off")))


def test_perplexity_of_active_neurons_is_that_of_all_but_for_the_order_of_sums(text: Path, model_folder: Path) -> None:
    ordinary = write_model(model_folder, "llama", "F32", "reglu")
    resident = figures(tool("perplexity", "-m", ordinary, "-f", text, *SHORT, options=("--no-flash",)))
    done = tool("perplexity", "-m", bundled(ordinary), "-f", text, *SHORT, options=("--predictor", "exact"))
    assert "active neurons exact" in done.stderr
    for one, other in zip(figures(done), resident, strict=True):
        assert _number(one) == pytest.approx(_number(other), rel=1e-6)


def _number(figure: str) -> float:
    found = re.search(r"(?:\]|= )([\d.]+)", figure)
    assert found
    return float(found[1])


def test_imatrix_writes_the_same_bytes(text: Path, tmp_path: Path) -> None:
    def imatrix(name: str, *options: object) -> Done:
        done = tool("imatrix", "-m", MIXTURE, "-f", text, *SHORT, "-o", tmp_path / name, options=options)
        assert done.returncode == 0, done.stderr
        return done

    assert on_flash(imatrix("flash.gguf", "--dram-budget", smallest_of_mixture(text) + 2 * MIB))
    imatrix("resident.gguf", "--no-flash")
    written = (tmp_path / "flash.gguf").read_bytes()
    assert len(written) > 100_000 and written == (tmp_path / "resident.gguf").read_bytes()


def test_bench_measures_each_test_with_a_model_of_its_own() -> None:
    arguments = ("bench", "-m", MIXTURE, "-p", "128,32", "-n", "4", "-r", "2", "-t", "1", "-o", "json")
    budget = smallest(*arguments) + 8 * MIB  # the process grows from load to load, by pages of libraries as well
    done = tool(*arguments, options=("--dram-budget", budget))
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(128, 0), (32, 0), (0, 4)]
    assert all(row["avg_ts"] > 0 and row["n_threads"] == 1 and len(row["samples_ns"]) == 2 for row in rows)
    assert len(re.findall(rf"{ON_FLASH}.*; 1 thread as asked for", done.stderr)) == 3, done.stderr


def test_quantize_writes_what_the_library_writes_in_bounded_memory(tmp_path: Path) -> None:
    require_caps()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    want, got = tmp_path / "want.gguf", tmp_path / "got.gguf"
    assert llama_cpp.llama_model_quantize(os.fsencode(MIXTURE), os.fsencode(want), params) == 0
    arguments = ("quantize", "--allow-requantize", "--max-buffer-size", "4", MIXTURE, got, "Q4_0")
    done = flash("cap", "128MiB", "--", *FLASH, "exec", "--", *arguments)
    assert done.returncode == 0, done.stderr
    assert got.read_bytes() == want.read_bytes()


def test_cli_answers_as_with_all_memory(text: Path, tmp_path: Path) -> None:
    def answer(name: str, *options: object) -> tuple[Done, str]:
        path = tmp_path / name
        told = ("-p", "def read_lines(path):", "-n", "24", "-st", "--temp", "0", "--simple-io", "-o", path)
        done = tool("cli", "-m", MIXTURE, "-c", "512", *told, options=options)
        assert done.returncode == 0, done.stderr
        return done, path.read_text()

    done, flashed = answer("flash.txt", "--dram-budget", smallest_of_mixture(text))
    assert on_flash(done)
    _, resident = answer("resident.txt", "--no-flash")
    assert len(flashed.partition("Assistant:")[2]) > 40 and flashed == resident


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("name", ["perplexity", "imatrix", "bench", "cli"])
def test_a_weight_that_cannot_be_read_is_named_and_the_status_is_an_error(
    name: str, text: Path, shim: Path, tmp_path: Path
) -> None:
    arguments = {
        "perplexity": ("-f", text, *SHORT),
        "imatrix": ("-f", text, *SHORT, "-o", tmp_path / "imatrix.gguf"),
        "bench": ("-p", "512", "-n", "0"),
        "cli": ("-c", "512", "-p", "def read_lines(path):", "-n", "8", "-st", "--simple-io"),
    }[name]
    control = tmp_path / "control"
    control.write_bytes(struct.pack("3i", 1, 1 << 30, 100) + bytes(4084))  # all reads after the first hundred: EIO
    options = ("--io-engine", "pread", "--dram-budget", smallest_of_mixture(text))
    done = tool(*(name, "-m", MIXTURE, *arguments), options=options, LD_PRELOAD=str(shim), FAULTS=str(control))
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert re.search(rf"cannot read tensor \S+ from {re.escape(str(MIXTURE))} at offset \d+ .*Input/output error", said)
    assert on_flash(done) and "Traceback" not in said
    assert not (tmp_path / "imatrix.gguf").exists()


# a busy disk may take longer than a user who has sent a signal wants to wait
PATIENT = """
import runpy, sys
from llama_flash.server import tools

tools._PATIENCE = 100.0
sys.argv[0] = "llama-flash"
runpy.run_module("llama_flash", run_name="__main__")
"""


@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_what_was_hot_is_stored(one: signal.Signals, text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    long = tmp_path / "long.txt"
    long.write_bytes(text.read_bytes() * 20)
    arguments = ("perplexity", "-m", MIXTURE, "-f", long, "-c", "128")
    budget = smallest_of_mixture(text)
    environment = {"LLAMA_FLASH_CACHE": str(cache), "LLAMA_FLASH_WARM_START": "1"}
    command = [sys.executable, "-c", PATIENT, "exec", "--dram-budget", str(budget), "--", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | environment
    ) as running:
        assert running.stdout is not None
        said = b""
        while b"[1]" not in said:
            piece = os.read(running.stdout.fileno(), 1 << 16)
            assert piece, said
            said += piece
        running.send_signal(one)
        assert running.wait(PATIENCE) == 128 + one
    assert list(cache.glob("hot/*.hot"))


def test_help_is_the_tools() -> None:
    for name, option in (("perplexity", "--ppl-stride"), ("llama-bench", "--n-prompt")):
        done = tool(name, "--help")
        assert done.returncode == 0 and option in done.stdout, done.stderr


def test_what_cannot_be_run_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = in_this_process(capsys, monkeypatch)
    for arguments, said in {
        ("--", "tokenize", "-m", MIXTURE): "no tool tokenize: there are bench, cli, imatrix, perplexity, quantize",
        ("--", "perplexity", "-ot", "a=CPU"): "-ot says where weights lie",
        ("--", "cli", "--fit", "on"): "--fit: the budget decides",
    }.items():
        done = here("exec", *arguments)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert here("exec").returncode == 2
    monkeypatch.setenv("LLAMA_ARG_N_CPU_MOE", "2")
    assert "LLAMA_ARG_N_CPU_MOE says where" in here("exec", "--", "bench", "-m", MIXTURE).stderr


def test_what_is_no_model_is_said_and_the_status_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    for path, said in ((tmp_path / "none.gguf", "no such model"), (tmp_path / "text.gguf", "not a GGUF file")):
        done = tool("bench", "-m", path, "-p", "8", "-n", "0")
        assert done.returncode == 1 and said in done.stderr.splitlines()[-1], done.stderr


def test_a_tool_is_told_what_the_user_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str, *given: str) -> list[str]:
        return [argument for default in TOOLS[name] for argument in default.arguments(given)]

    assert told("perplexity", "-t", "3")[:4] == ["--fit", "off", "--batch-size", "512"]
    assert "--batch-size" not in told("perplexity", "-b", "64")
    assert told("cli", "-c", "99")[:2] == ["--threads", told("bench")[1]]
    assert "--ctx-size" in told("cli") and "--ctx-size" not in told("cli", "-c", "99")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "99")
    assert "--ctx-size" not in told("cli")


def test_the_logits_that_a_tool_keeps_are_counted_where_it_keeps_them() -> None:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = 2048, 512, 4

    def keeps(name: str, *arguments: str) -> bool:
        driver: EngineDriver = _ToolDriver(name, arguments, True, lambda session: None, print)
        return driver._keeps_scores(params)

    assert not keeps("perplexity") and not keeps("imatrix") and not keeps("cli")
    assert keeps("perplexity", "--hellaswag") and keeps("perplexity", "--save-all-logits", "logits")
    params.n_seq_max = 1
    assert keeps("perplexity") and keeps("imatrix") and not keeps("bench")


def test_adapters_on_neuron_bundles_are_refused() -> None:
    driver = _ToolDriver("cli", ["--lora", "a.gguf"], True, lambda session: None, print)
    model, context = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    assert driver.load(str(BUNDLES), model, context) == 0
    assert "no adapter is applied" in str(driver.failure)
