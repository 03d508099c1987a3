"""Models larger than a real memory cap: same tokens, the cap is kept, nobody is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from caps import require_caps

from gguf_tools.synthetic import PRESETS, write
from llama_flash import run_capped

_CHILD = """
import json, sys
import llama_cpp
import numpy as np

path, flash, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
llm = llama_cpp.Llama(path, n_ctx=256, n_batch=64, n_ubatch=64, n_threads=2, verbose=False, flash_offload=flash)
rng = np.random.default_rng(1)
llm.eval(rng.integers(0, llm.n_vocab(), 100).tolist())
tokens = []
for _ in range(24):
    tokens.append(int(llm.sample(temp=0.0)))
    llm.eval([tokens[-1]])
counters = llm.flash.stats().as_dict() if flash else {}
open(out, "w").write(json.dumps({"tokens": tokens, "flash": counters}))
"""
_TIMEOUT = 300.0
NEEDED = 160 << 20  # interpreter, libraries and buffers, about; the cap must leave room for some weights as well


@pytest.fixture(scope="module", params=["moe-400m", pytest.param("dense-400m", marks=pytest.mark.full)])
def large_model(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Path]:
    (path,) = write(PRESETS[request.param], model_folder / f"{request.param}.gguf")
    try:
        yield path
    finally:
        path.unlink()


def arguments(model: Path, out: Path, flash: bool | dict[str, Any]) -> list[str]:
    return [sys.executable, "-c", _CHILD, str(model), json.dumps(flash), str(out)]


def test_same_tokens_under_half_the_memory(large_model: Path, tmp_path: Path) -> None:
    require_caps()
    size = large_model.stat().st_size
    cap = max(size // 2, NEEDED)
    assert cap < size * 0.6, "the model is too small for the cap to bite"
    free, capped = tmp_path / "free.json", tmp_path / "capped.json"
    subprocess.run(arguments(large_model, free, False), timeout=_TIMEOUT, check=True)
    result = run_capped(cap, arguments(large_model, capped, True), timeout=_TIMEOUT, capture_output=True)
    assert result.returncode == 0 and result.oom_kills == 0, result
    assert result.peak_bytes is not None and 0 < result.peak_bytes <= cap
    expected, actual = (json.loads(path.read_text()) for path in (free, capped))
    assert len(actual["tokens"]) == 24 and len(set(actual["tokens"])) > 4
    assert actual["tokens"] == expected["tokens"]
    assert actual["flash"]["mode"] == "flash"
    assert actual["flash"]["budget"] <= cap
    assert actual["flash"]["total"]["bytes_read"] > size - cap


def test_the_smallest_budget_that_is_named_works(large_model: Path, tmp_path: Path) -> None:
    require_caps()
    out = tmp_path / "out.json"
    refused = run_capped(
        "1GiB", arguments(large_model, out, {"dram_budget": "64MiB"}), timeout=_TIMEOUT, capture_output=True
    )
    assert refused.returncode == 1 and refused.oom_kills == 0, refused
    assert refused.stderr is not None and "FlashBudgetError" in refused.stderr
    smallest = subprocess.run(
        [sys.executable, "-c", _SMALLEST, str(large_model)],
        timeout=_TIMEOUT,
        check=True,
        capture_output=True,
        text=True,
    )
    budget = int(smallest.stdout.split()[-1])
    result = run_capped(
        budget, arguments(large_model, out, {"dram_budget": budget}), timeout=_TIMEOUT, capture_output=True
    )
    assert result.returncode == 0 and result.oom_kills == 0, result
    assert result.peak_bytes is not None and result.peak_bytes <= budget


_SMALLEST = """
import sys
import llama_cpp, llama_flash

try:
    llama_cpp.Llama(sys.argv[1], n_ctx=256, n_batch=64, n_ubatch=64, n_threads=2, verbose=False,
                    flash_offload=llama_flash.FlashOffload(dram_budget="64MiB"))
except llama_flash.FlashBudgetError as error:
    print(error.smallest)
"""
