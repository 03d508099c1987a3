"""A state that is larger than what memory is left is stored and restored below a cap that the kernel keeps."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from caps import require_caps

import llama_flash
from llama_flash import FlashOffload, run_capped
from llama_flash.prompts.heads import BLOCK

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20
N_CTX = 16 * 1024
N_BLOCKS = 60
N_PROMPT = N_BLOCKS * BLOCK + 7
OPTIONS: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 256, "n_ubatch": 256}
_CHILD = """
import contextlib, json, sys
from pathlib import Path
import llama_cpp
from llama_flash import FlashOffload

path, folder, options, n_prompt, out = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
flash = FlashOffload(prompt_cache=folder, follow=False, warm_start=False)
with contextlib.closing(llama_cpp.Llama(path, verbose=False, flash_offload=flash, **options)) as llm:
    prompt = [5 + (7 * i * i + 3 * i) % 4000 for i in range(n_prompt)]
    answer = [token for token, _ in zip(llm.generate(prompt, temp=0.0), range(8))]
    recalled, memory = llm.flash.stats().prompts.recalled, llm.flash.stats().memory
Path(out).write_text(json.dumps({"answer": answer, "recalled": recalled, "kv": memory.kv}))
"""


def _capped(cap: int, folder: Path, out: Path) -> dict[str, Any]:
    arguments = [str(SHIPPED), str(folder), json.dumps(OPTIONS), str(N_PROMPT), str(out)]
    result = run_capped(cap, [sys.executable, "-c", _CHILD, *arguments], timeout=300.0, capture_output=True)
    assert result.returncode == 0 and result.oom_kills == 0, result
    assert result.peak_bytes is not None and result.peak_bytes <= cap
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_state_larger_than_the_room_beside_the_plan_is_stored_and_restored(tmp_path: Path) -> None:
    require_caps()
    folder = tmp_path / "prompts"
    flash = FlashOffload(prompt_cache=str(folder), follow=False, warm_start=False)
    smallest = llama_flash.plan(str(SHIPPED), flash_offload=flash, **OPTIONS).smallest
    room = 8 * MIB
    computed = _capped(smallest + room, folder, tmp_path / "computed.json")
    assert computed["recalled"] == 0
    stored = sum(path.stat().st_size for path in folder.iterdir())
    assert stored > 4 * room and stored > 0.9 * computed["kv"]
    restored = _capped(smallest + room, folder, tmp_path / "restored.json")
    assert restored["recalled"] == N_BLOCKS * BLOCK
    assert restored["answer"] == computed["answer"]
