"""What only prompts need is lent to flash while a model decodes, and is there again when a prompt comes."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caps import require_caps
from conftest import ModelFile
from engines import assert_same_logits, logits_of, open_resident, tokens
from llama_cpp import Llama

from gguf_tools.synthetic import PRESETS, write
from llama_flash import FlashOffload, run_capped
from llama_flash.budget.controller import Controller
from llama_flash.planning.lent import FEW_TOKENS

MiB = 1 << 20
_CHILD = """
import json, sys, time
import llama_cpp, llama_flash
import numpy as np

llm = llama_cpp.Llama(sys.argv[1], n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=2, verbose=False,
                      flash_offload={"warm_start": False})
share, rng, seen = llm.flash.share, np.random.default_rng(1), []
planned = share.granted
for turn in range(3):
    if llm.n_tokens > 1500:
        llm.reset()
    llm.eval(rng.integers(0, llm.n_vocab(), 500).tolist())
    prompt, n, end = share.granted, 0, time.monotonic() + 200
    # whoever lends looks now and then, and has to have seen tokens for a while
    while n < 60 or (share.granted <= planned and time.monotonic() < end):
        if llm.n_tokens == 2000:
            llm.reset()
        llm.eval([int(rng.integers(0, llm.n_vocab()))])
        n += 1
    seen.append((prompt, share.granted))
print(json.dumps({"planned": planned, "seen": seen}))
"""


def test_under_a_cap_prompts_have_room(model_folder: Path) -> None:
    require_caps()
    path = write(PRESETS["moe-400m"], model_folder / "lent.gguf")[0]
    try:
        beside = 280 * MiB  # interpreter, KV cache, graph buffers
        run = run_capped(beside + path.stat().st_size // 3, [sys.executable, "-c", _CHILD, path], capture_output=True)
        assert run.returncode == 0 and run.oom_kills == 0, run.stderr
    finally:
        path.unlink()
    told = json.loads(run.stdout)
    for prompt, decode in told["seen"]:
        lent = decode - told["planned"]
        # what the process holds beside is measured anew with each look: a little more or less than planned
        assert lent > 0 and prompt - told["planned"] < lent / 20, told


OPTIONS: dict[str, Any] = {"n_ctx": 4096, "n_batch": 512, "n_ubatch": 512, "n_threads": 2, "verbose": False}


def look(llm: Llama) -> int:
    """Bytes of flash memory after the controller has looked and all is settled."""
    controller = Controller.of_process()
    controller.recall()
    assert llm.flash is not None
    return llm.flash.share.granted


@pytest.mark.parametrize("form", ["qwen3moe", "llama"])
def test_lent_and_given_back_with_the_same_answers(form: str, model_file: ModelFile) -> None:
    """Prompts, tokens one by one, drafts of some tokens, a saved state: bit by bit what the resident model says."""
    path = model_file(form, "Q8_0")
    prompts = [tokens(300, seed=1), tokens(40, seed=2), tokens(FEW_TOKENS, seed=3), tokens(530, seed=4)]
    with open_resident(path, **{**OPTIONS, "logits_all": True}) as resident:
        expected = [logits_of(resident, prompt, tokens(20, seed=9)) for prompt in prompts]
    flash = FlashOffload(what="all", warm_start=False, panel_bytes=65536, reserve="8MiB")
    with closing(Llama(str(path), **OPTIONS, logits_all=True, flash_offload=flash)) as llm:
        assert llm.flash is not None and llm.flash.stats().mode == "flash"
        memory, share = llm.flash.memory, llm.flash.share
        llm.flash.set_budget(memory.fixed + 8 * MiB + share.least + (share.most - share.least) // 8)
        planned = look(llm)
        for prompt, wanted in zip(prompts, expected, strict=True):
            found = logits_of(llm, prompt, tokens(20, seed=9))
            assert_same_logits(found, wanted, len(prompt) + 20) if len(prompt) > 44 else np.testing.assert_array_equal(
                found.view(np.uint32), wanted.view(np.uint32)
            )
            assert look(llm) > planned, "nothing was lent while it decodes"
        state = llm.save_state()
        llm.eval(tokens(FEW_TOKENS + 1, seed=5))
        assert llm.flash.share.granted <= planned, "a prompt was computed with what had been lent"
        llm.eval(tokens(1))
        assert look(llm) > planned
        llm.load_state(state)
        assert llm.flash.share.granted <= planned, "a state was loaded into what had been lent"
