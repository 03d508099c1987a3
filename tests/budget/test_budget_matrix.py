"""A cap is kept, or the load is refused with the right number: shares of the file x contexts x kinds of models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from caps import require_caps

from gguf_tools.synthetic import PRESETS, write
from gguf_tools.synthetic.opt import OptModel, OptShape
from gguf_tools.synthetic.opt_writer import write_opt
from llama_flash import CapResult, run_capped

SHARES, CONTEXTS = (0.25, 0.50, 0.75, 1.10), (512, 4096, 16384)
EVERY_TIME = {(0.50, 4096)}  # the others: make test-full
_TIMEOUT = 300.0
_MIB = 1 << 20

_CHILD = """
import json, sys, time
import llama_cpp, llama_flash

path, n_ctx, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
try:
    llm = llama_cpp.Llama(path, n_ctx=n_ctx, n_batch=256, n_ubatch=256, n_threads=2, verbose=False, flash_offload=True)
except llama_flash.FlashBudgetError as error:
    answer = {"smallest": error.smallest}
else:
    for turn in range(2):  # what is lent to one turn's tokens is given back before the next one's prompt
        llm.reset()
        llm.eval([i % 500 for i in range(300)])
        end = time.monotonic() + 2.5
        for i in range(150):
            llm.eval([int(llm.sample(temp=0.0))])
            if time.monotonic() > end:
                break
    answer = {"mode": llm.flash.stats().mode, "kv": llm.flash.memory.kv}
open(out, "w").write(json.dumps(answer))
"""


@pytest.fixture(
    scope="module", params=["moe", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("dense", "relu"))]
)
def model(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[Path]:
    path = model_folder / f"matrix-{request.param}.gguf"
    if request.param == "relu":
        shape = OptShape(n_layer=4, n_embd=2048, n_ff=8192, n_head=16, n_vocab=8192, n_ctx=16384)
        write_opt(OptModel(shape), path, "bundled")
    else:
        write(PRESETS[f"{request.param}-400m"], path)
    yield path
    path.unlink()


def run(model: Path, n_ctx: int, cap: int, out: Path) -> tuple[CapResult, dict[str, Any]]:
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", _CHILD, str(model), str(n_ctx), str(out)]
    result = run_capped(cap, command, timeout=_TIMEOUT, capture_output=True)
    assert result.oom_kills == 0, f"killed at {cap >> 20} MiB: {result}"
    assert result.returncode == 0 and out.exists(), result
    assert result.peak_bytes is not None and result.peak_bytes <= cap
    return result, json.loads(out.read_text())


def cells() -> list[Any]:
    return [
        pytest.param(share, n_ctx, marks=() if (share, n_ctx) in EVERY_TIME else pytest.mark.full)
        for share in SHARES
        for n_ctx in CONTEXTS
    ]


@pytest.mark.parametrize(("share", "n_ctx"), cells())
def test_the_cap_is_kept_or_the_load_refused_with_the_right_number(
    model: Path, share: float, n_ctx: int, tmp_path: Path
) -> None:
    require_caps()
    cap = int(share * model.stat().st_size)
    _, answer = run(model, n_ctx, cap, tmp_path / "answer.json")
    if "smallest" not in answer:
        return
    smallest = answer["smallest"]
    assert smallest > cap, "refused although it is enough"
    _, answer = run(model, n_ctx, int(1.03 * smallest), tmp_path / "answer.json")
    assert answer.get("mode") == "flash", f"{smallest / _MIB:.0f} MiB were said to be enough"
