"""The command `llama-flash`, run as a user does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import in_this_process
from conftest import ModelFile
from engines import open_flash
from neurons import bundled, write_model

import llama_flash
from llama_flash.cli.loading import print_statistics

MIB = 1 << 20


def flash(*arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_flash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def model(model_file: ModelFile) -> Path:
    return model_file("qwen3moe")


def test_version() -> None:
    assert flash("--version").stdout == f"llama-flash {llama_flash.__version__}\n"


def test_importing_the_package_does_not_load_the_engine() -> None:
    script = "import sys, llama_flash; print([m for m in ('llama_cpp', 'numpy', 'typer') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_cap_passes_arguments_output_and_exit_code() -> None:
    result = flash("cap", "64MiB", "--", "sh", "-c", 'echo "$1"; exit 3', "sh", "--help")
    assert (result.returncode, result.stdout) == (3, "--help\n")
    assert "peak" in result.stderr
    assert "64.0 MiB" in result.stderr


def test_cap_reports_an_oom_kill() -> None:
    result = flash("cap", "32MiB", "--", sys.executable, "-S", "-c", "bytearray(64 << 20)[::4096] = b'x' * 16384")
    assert result.returncode == 137
    assert "1 OOM kills" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cap", "5 parsecs", "--", "true"), "not a size"),
        (("cap", "64MiB", "--", "no-such-command"), "no-such-command"),
        (("run", "/no/model.gguf", "-p", "x"), "/no/model.gguf"),
        (("run", sys.executable, "-p", "x"), "not a GGUF file"),
        (("run", "--predictor", "guess"), "predictor: 'guess' is not one of 'auto', 'exact', 'lowrank', 'off'"),
        (("run", "--window", "-1"), "window: -1 is not a whole number"),
        (("run", "--dram-budget", "5 parsecs"), "dram_budget: not a size: '5 parsecs'; accepted"),
        (("plan", "/no/model.gguf"), "/no/model.gguf"),
        (("plan", sys.executable), "not a GGUF file"),
        (("plan", "--dram-budget", "-1"), "dram_budget: not a size: '-1'; accepted"),
        (("plan", "--dram-budget", ""), "dram_budget: not a size: ''; accepted"),
        (("plan", "--dram-budget", "1MiB"), "The smallest that works is"),
        (("plan", "--type-k", "q9"), "--type-k: 'q9' is not one of f32, f16"),
        (("profile", "/no/where"), "/no/where"),
        (("profile", "/dev/null"), "neither a file nor a directory"),
        (("profile", "/", "--io-engine", "aio"), "io_engine: 'aio' is not one of"),
    ],
)
def test_mistakes_are_one_line_without_traceback(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = in_this_process(capsys, monkeypatch)(*arguments)
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_run_generates_text_and_prints_statistics(model: Path) -> None:
    result = flash("run", model, "-p", "hello", "-n", 8)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("hello")
    assert len(result.stdout) > len("hello\n")
    for said in ("read per token", "hit rate", "tokens per second", "budget"):
        assert said in result.stderr


def test_statistics_say_that_a_quota_stopped_the_process(
    model_file: ModelFile, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_flash(model_file("llama")) as llm:
        llm.eval([1, 2, 3])
        stats = llm.flash.stats()
    for times in (0, 3):
        print_statistics(replace(stats, throttled=times, throttled_seconds=times / 2), "here")
        said = " ".join(capsys.readouterr().err.split())
        assert ("a CPU quota stopped the process in 3 periods, for 1.5 s" in said) == (times > 0)


def test_run_prints_what_was_expected_beside_what_was_measured(model: Path) -> None:
    budget = int(1.02 * json.loads(flash("plan", model, "--json").stdout)["smallest"])
    result = flash("run", model, "-p", "hello", "-n", 8, "--dram-budget", budget)
    assert result.returncode == 0, result.stderr
    for said in ("expected", "measured", "read from flash", "a quick probe of"):
        assert said in result.stderr
    values = json.loads(flash("run", model, "-p", "hello", "-n", 8, "--dram-budget", budget, "--json").stdout)
    assert values["expected"]["bytes_per_token"] > 0 < values["flash"]["decode"]["bytes_per_token"]
    assert values["expected"]["tokens_per_second"] > 0
    assert values["expected"]["rates"] == "quick probe"


def test_plan_names_the_smallest_budget_and_run_works_with_it(model: Path) -> None:
    result = flash("plan", model)
    assert result.returncode == 0, result.stderr
    for said in ("KV cache", "compute buffers", "tokens per second", "other budgets", "rates: ", "assumed: "):
        assert said in result.stdout
    match = re.search(r"smallest workable budget .* (\d+) MiB", result.stdout)
    assert match
    smallest = int(match[1])
    assert json.loads(flash("plan", model, "--json").stdout)["smallest"] == pytest.approx(smallest * MIB, rel=0.02)
    assert flash("run", model, "-p", "hello", "-n", 2, "--dram-budget", f"{1.03 * smallest:.1f}MiB").returncode == 0
    refused = flash("run", model, "-p", "hello", "-n", 2, "--dram-budget", f"{0.9 * smallest:.1f}MiB")
    assert refused.returncode == 1
    assert "smallest that works" in refused.stderr


@pytest.mark.full
def test_profile_is_kept_and_used_by_plans(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path))
    result = flash("profile", model.parent)
    assert result.returncode == 0, result.stderr
    for said in ("4.00 KiB", "4.00 MiB", "128 in flight", "DRAM", f"kept in {tmp_path}"):
        assert said in result.stdout
    plan = json.loads(flash("plan", model, "--json").stdout)
    assert plan["profile"]["source"] == "cached"
    assert len(plan["profile"]["reads"]) > 4


def test_ctrl_c_ends_a_profile_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llama_flash", "profile", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    links = Path(f"/proc/{process.pid}/fd")

    def temporary() -> bool:
        """Whether the process has a file without a name in the folder."""
        try:
            return any(os.readlink(link).startswith(str(tmp_path)) for link in links.iterdir())
        except OSError:
            return False

    deadline = time.monotonic() + 400
    while not temporary():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_run_under_a_share_of_the_model_stays_below_the_cap_with_the_same_text(model: Path) -> None:
    free = json.loads(flash("run", model, "-p", "hello", "-n", 16, "--json").stdout)
    result = flash("run", model, "-p", "hello", "-n", 16, "--json", "--cap", "50%")
    assert result.returncode == 0, result.stderr
    capped = json.loads(result.stdout)
    assert capped["text"] == free["text"] != ""
    assert capped["flash"]["mode"] == "flash"
    assert capped["flash"]["total"]["bytes_read"] > 0
    assert capped["cap"]["oom_kills"] == 0
    assert capped["cap"]["peak_bytes"] <= capped["cap"]["limit_bytes"]
    # the interpreter alone is larger than this model: the share is of the weights, and that is said
    assert "50% of the file" in result.stderr


def test_run_names_the_smallest_budget_where_the_cap_is_too_small(model: Path) -> None:
    result = flash("run", model, "-p", "hello", "--cap", "72MiB")
    assert result.returncode == 1
    assert "smallest that works" in result.stderr
    assert "0 OOM kills" in result.stderr


@pytest.fixture(scope="module")
def bundles(model_folder: Path) -> Path:
    return bundled(write_model(model_folder, "arcee", "Q8_0"))


def test_run_shows_how_many_neurons_were_active(bundles: Path) -> None:
    result = flash("run", bundles, "-p", "hello", "-n", 8, "--predictor", "exact", "--window", 4)
    assert result.returncode == 0, result.stderr
    assert "predictor exact" in result.stderr
    assert re.search(r"neurons per token .* \d+ \(\d+\.\d%\)", result.stderr)
    assert "hit rate" in result.stderr


def test_the_predictor_is_passed_on_under_a_cap(bundles: Path) -> None:
    capped, free = (
        json.loads(flash("run", bundles, "-n", 8, "--json", "--predictor", "off", "--window", 2, *cap).stdout)
        for cap in (("--cap", "50%"), ())
    )
    assert capped["text"] == free["text"] != ""
    assert capped["flash"]["predictor"] == free["flash"]["predictor"] == "off"
    assert capped["cap"]["oom_kills"] == 0
    n_neurons = capped["flash"]["n_neurons"]
    assert n_neurons > 0 == capped["flash"]["decode"]["neurons_per_token"], "whole layers: none is chosen"


def test_lowrank_without_predictors_is_one_line(bundles: Path) -> None:
    result = flash("run", bundles, "--predictor", "lowrank")
    assert result.returncode == 1
    assert "python -m gguf_tools calibrate" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly(number: signal.Signals, model: Path) -> None:
    prompt = "hello " * 4000  # a synthetic model may end its text at any time, but not its prompt
    command = [sys.executable, "-m", "llama_flash", "run", str(model), "-p", prompt, "-c", "30000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the model is loaded
    process.send_signal(number)
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert "read per token" in stderr
