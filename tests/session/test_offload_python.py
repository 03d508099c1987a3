"""`llama_cpp.Llama(path, flash_offload=...)`: what it refuses, what it says, what it raises."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from llama_cpp import Llama

from llama_flash import FlashBudgetError, FlashFormatError, FlashOffload, FlashReadError

SMALL: dict[str, Any] = {"n_ctx": 128, "n_batch": 32, "n_ubatch": 32, "n_threads": 2, "n_threads_batch": 2}
PROMPT = list(range(3, 40))
MIB = 1 << 20


@pytest.fixture
def moe(model_file: ModelFile) -> Path:
    return model_file("qwen3moe")


@pytest.fixture
def dense(model_file: ModelFile) -> Path:
    return model_file("llama")


def load(path: Path, flash: Any = True, **options: Any) -> Llama:
    return Llama(str(path), flash_offload=flash, **{**SMALL, "verbose": False, **options})


def logits(llm: Llama, n_decoded: int = 8) -> np.ndarray[Any, Any]:
    """Of a prompt and of greedily decoded tokens; needs logits_all."""
    llm.reset()
    llm.eval(PROMPT)
    for _ in range(n_decoded):
        llm.eval([int(llm.scores[llm.n_tokens - 1].argmax())])
    return np.array(llm.scores[: llm.n_tokens])


def test_without_the_option_there_is_no_flash(moe: Path) -> None:
    for off in (False, None):
        assert load(moe, off).flash is None


@pytest.mark.parametrize("name", ["flash_ofload", "flash_budget", "flashoffload"])
def test_misspelt_options_raise_type_error_before_anything_is_loaded(name: str, moe: Path) -> None:
    with pytest.raises(TypeError, match=name):
        Llama(str(moe), verbose=False, **{name: True})


def test_unknown_options_raise_type_error(moe: Path) -> None:
    with pytest.raises(TypeError, match="budget"):
        load(moe, {"budget": "2GiB"})
    with pytest.raises(TypeError, match="FlashOffload"):
        load(moe, "2GiB")


def test_arguments_that_upstream_ignores_are_still_ignored(moe: Path) -> None:
    load(moe, n_gqa=8).close()


@pytest.mark.parametrize("flash", [True, {"what": "experts"}, FlashOffload(what="experts", io_engine="pread")])
def test_stats_count_prompt_and_generation_apart(flash: Any, moe: Path) -> None:
    llm = load(moe, flash, logits_all=True)
    assert llm.flash is not None
    logits(llm)
    stats = llm.flash.stats()
    assert stats.prompt.tokens == len(PROMPT)
    assert (stats.decode.tokens, stats.decode.calls) == (8, 8)
    assert stats.total.tokens == len(PROMPT) + 8
    assert (stats.last.tokens, stats.last.calls) == (1, 1)
    assert stats.total.bytes_read >= stats.prompt.bytes_read + stats.decode.bytes_read
    assert stats.memory.total <= stats.budget.total
    json.dumps(stats.as_dict())
    str(stats)
    if flash is not True:
        assert stats.mode == "flash"
        assert stats.total.misses > 0
        assert stats.total.bytes_read >= stats.total.bytes_used > 0
        assert stats.io_engine == ("pread" if isinstance(flash, FlashOffload) else stats.io_engine)


def test_stats_still_answer_after_close(moe: Path) -> None:
    llm = load(moe, {"what": "experts"})
    llm.eval(PROMPT)
    assert llm.flash is not None
    before = llm.flash.stats()
    llm.close()
    llm.close()
    assert llm.flash.stats() == before


def test_everything_is_resident_where_the_model_fits(moe: Path) -> None:
    expected = logits(load(moe, False, logits_all=True))
    llm = load(moe, logits_all=True)
    assert np.array_equal(logits(llm), expected)
    assert llm.flash is not None
    stats = llm.flash.stats()
    assert (stats.mode, stats.total.bytes_read, stats.flash_weights) == ("resident", 0, 0)
    assert "nothing on flash" in llm.flash.summary


def test_a_file_without_anything_to_offload_says_so_and_runs_as_stock(dense: Path) -> None:
    expected = logits(load(dense, False, logits_all=True))
    llm = load(dense, {"what": "experts"}, logits_all=True)
    assert np.array_equal(logits(llm), expected)
    assert llm.flash is not None
    assert llm.flash.stats().mode == "nothing"
    assert "runs as stock" in llm.flash.summary


def test_one_line_at_load_goes_to_stderr_unless_not_verbose(moe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(moe, {"what": "experts"}, verbose=True).close()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("llama-flash: ")]
    for said in ("resident", "on flash", "slots", "per token", "budget"):
        assert said in line
    load(moe, {"what": "experts"}).close()
    assert "llama-flash" not in capfd.readouterr().err


def test_the_line_goes_to_logging_where_somebody_listens(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llama_flash"):
        load(moe).close()
    assert [record.name for record in caplog.records] == ["llama_flash"]


def test_too_small_a_budget_names_one_that_works(moe: Path) -> None:
    with pytest.raises(FlashBudgetError) as error:
        load(moe, {"dram_budget": "16MiB", "what": "experts"})
    assert sum(error.value.breakdown.values()) > 16 * MIB
    # other tests of this process may have freed or taken memory in between
    smallest = error.value.smallest + 32 * MIB
    llm = load(moe, {"dram_budget": smallest, "what": "experts"})
    llm.eval(PROMPT)
    assert llm.flash is not None
    stats = llm.flash.stats()
    assert stats.budget.total == smallest
    assert stats.memory.total <= smallest


def test_the_smallest_budget_works_to_the_byte_in_a_fresh_process(moe: Path) -> None:
    script = """
import sys, llama_cpp, llama_flash
def load(budget):
    llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_batch=32, n_ubatch=32, verbose=False,
                          flash_offload={"dram_budget": budget, "what": "experts"})
    llm.eval(list(range(3, 40)))
    print(llm.flash.stats().memory.total <= budget)
if len(sys.argv) > 2:
    load(int(sys.argv[2]))
else:
    try:
        load("16MiB")
    except llama_flash.FlashBudgetError as error:
        print(error.smallest)
"""

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", script, str(moe), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=400).stdout.strip()

    assert run(run()) == "True"


def test_two_models_do_not_spend_the_same_bytes(moe: Path) -> None:
    first = load(moe, {"what": "experts"})
    assert first.flash is not None
    granted = first.flash.memory.flash
    second = load(moe, {"what": "experts"})
    assert second.flash is not None
    # nothing of the first one's slots has been touched, and yet the second counts them
    assert second.flash.memory.interpreter > granted
    first.close()


def test_logits_of_all_tokens_are_counted(moe: Path) -> None:
    one, every = load(moe, {"what": "experts"}), load(moe, {"what": "experts"}, logits_all=True)
    assert one.flash is not None and every.flash is not None
    assert every.flash.memory.outputs - one.flash.memory.outputs >= every.scores.nbytes


def test_pickling_carries_the_option(moe: Path) -> None:
    options = FlashOffload(what="experts", io_engine="pread")
    llm = pickle.loads(pickle.dumps(load(moe, options)))
    assert llm.flash is not None
    assert llm.flash.options == options
    assert llm.flash.stats().mode == "flash"


def test_a_missing_shard_or_a_damaged_file_is_named(tmp_path: Path, moe: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "no.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(moe.read_bytes()[:200])
    with pytest.raises(FlashFormatError, match=r"cut\.gguf"):
        load(cut)


def test_a_model_that_ends_early_does_not_load(tmp_path: Path, moe: Path) -> None:
    cut = tmp_path / "cut.gguf"
    content = moe.read_bytes()
    cut.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises((ValueError, FlashReadError, FlashFormatError)):
        load(cut, {"what": "experts"})
    load(moe, {"what": "experts"}).close()  # and the engine still works


@pytest.fixture
def copy(moe: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "model.gguf"
    shutil.copyfile(moe, path)
    yield path


def test_a_file_cut_short_stops_the_decode_and_the_model_is_usable_once_it_is_back(copy: Path, moe: Path) -> None:
    expected = logits(load(moe, False, logits_all=True))
    llm = load(copy, {"what": "experts"}, logits_all=True)
    assert llm.flash is not None
    llm.flash.native.set_memory(llm.flash.native.requirements().min_memory)
    assert np.array_equal(logits(llm), expected)  # what is read again has been read before
    content, times = copy.read_bytes(), copy.stat()
    os.truncate(copy, len(content) // 4)
    for _ in range(2):
        with pytest.raises(FlashReadError) as error:
            llm.eval(PROMPT)
        assert error.value.file == str(copy)
        assert isinstance(error.value, RuntimeError)
    with copy.open("r+b") as file:
        file.write(content)
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(logits(llm), expected)
    assert llm.flash.stats().total.errors >= 1


def test_a_file_cut_short_before_it_was_read_has_to_be_loaded_again(copy: Path) -> None:
    llm = load(copy, {"what": "experts"}, logits_all=True)
    content, times = copy.read_bytes(), copy.stat()
    os.truncate(copy, len(content) // 4)
    with pytest.raises(FlashReadError):
        llm.eval(PROMPT)
    with copy.open("r+b") as file:
        file.write(content)
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))  # nobody can tell whether the bytes are the same
    with pytest.raises(FlashReadError, match=r"may have changed.*load the model again"):
        llm.eval(PROMPT)


def test_a_file_that_changed_is_an_error_and_not_another_answer(copy: Path) -> None:
    llm = load(copy, {"what": "experts"}, logits_all=True)
    content = bytearray(copy.read_bytes())
    content[len(content) // 2 :: 97] = b"\x55" * len(content[len(content) // 2 :: 97])
    with copy.open("r+b") as file:
        file.write(content)
    os.utime(copy, ns=(1, 1))
    with pytest.raises(FlashReadError, match="changed"):
        logits(llm)


def test_use_mlock_is_said_to_have_no_effect(moe: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="llama_flash"):
        load(moe, use_mlock=True).close()
    assert "use_mlock" in caplog.text


def test_without_the_plugin_llama_cpp_imports_and_says_what_is_missing(tmp_path: Path, moe: Path) -> None:
    script = f"""
import ctypes, sys
from pathlib import Path
from llama_flash.native import bindings
bindings.library_path = lambda: Path("/nowhere/libllama_flash.so")
import llama_cpp, llama_flash
llama_cpp.Llama({str(moe)!r}, verbose=False).close()
try:
    llama_cpp.Llama({str(moe)!r}, verbose=False, flash_offload=True)
except llama_flash.FlashError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "/nowhere/libllama_flash.so" in result.stdout
