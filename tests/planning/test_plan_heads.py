"""What a plan counts of a file with heads of multi-token prediction is what the engine loads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Model
from mtp_models import write_mtp

import llama_flash
from llama_flash import FlashOffload
from llama_flash.model.gguf import read_gguf
from llama_flash.model.mtp import mtp_head
from llama_flash.model.no_alloc import context_params, no_alloc_context
from llama_flash.model.shape import ContextShape
from llama_flash.native.calls import context_memory
from llama_flash.planning.drafting import chosen

ONE = ("cohere2moe", "deepseek2", "deepseek32", "glm-dsa", "glm4moe", "hy_v3", "mimo2", "step35")
THREE = ("hy_v3", "mimo2", "step35")
_PADDED = 32  # bytes: the buffer has whole ones of them for each tensor
FILES = [*((arch, 1, own) for arch in ONE for own in (False, True)), *((arch, 3, False) for arch in THREE)]


@pytest.mark.parametrize(("arch", "heads", "own_head"), FILES)
def test_planned_bytes_are_those_that_the_engine_loads(arch: str, heads: int, own_head: bool, tmp_path: Path) -> None:
    path = write_mtp(arch, tmp_path / "head.gguf", dense=arch == "mimo2", heads=heads, own_head=own_head)
    meta = read_gguf(path)
    head = mtp_head(meta)
    assert head is not None and head.n_layers == heads
    shape: dict[str, Any] = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64}
    for draft in ("off", "mtp"):
        _, kept = chosen(FlashOffload(draft=draft), meta, possible=True, rounded=False)
        planned = sum(tensor.size for tensor in kept.tensors.values())
        assert planned == sum(t.size for t in meta.tensors.values()) - (head.bytes if draft == "off" else 0)
        params = context_params(ContextShape(**shape))
        with no_alloc_context(str(path), None, params, mtp=draft == "mtp") as (_, context):
            assert context_memory(context).model == sum(-(-t.size // _PADDED) * _PADDED for t in kept.tensors.values())
        flash: dict[str, Any] = {"draft": draft, "dram_budget": "8GiB", "follow": False, "warm_start": False}
        made = llama_flash.plan(path, flash_offload=flash, **shape)
        with Model(str(path), n_threads=1, verbose=False, flash_offload=flash, **shape) as llm:
            assert llm.flash is not None and llm.flash.plan.mode == "resident"
            assert llm.flash.plan.resident_bytes == made.resident_weights == planned
            own = planned - (head.bytes if draft == "mtp" else 0)
            assert {own <= weights < own + 256 for weights in (llm.flash.memory.weights, made.memory.weights)} == {True}
            assert llm.flash.memory.draft == made.memory.draft
