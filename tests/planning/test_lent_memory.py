"""How much of a plan's memory is idle while tokens are generated, and how much of that may be touched soon."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import ModelFile

from llama_flash.budget.rooms import MACHINE, Breakdown, Budget
from llama_flash.model.shape import ContextShape
from llama_flash.native.caches import AtOnce
from llama_flash.options import FlashOffload
from llama_flash.planning import lent
from llama_flash.planning.lent import Growth, few_tokens, lent_of
from llama_flash.session.account import Account
from llama_flash.session.share import Share

MiB = 1 << 20
PLANNED = Breakdown(kv=256 * MiB, compute=64 * MiB)


def growth(**shape: Any) -> Growth:
    return Growth(PLANNED, ContextShape(n_ctx=2048, n_ubatch=512, **shape))


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    monkeypatch.setattr(lent, "_HUGE_PAGES", enabled)
    return enabled


def test_what_is_left_follows_the_speed(small_pages: Path) -> None:
    grows = growth()
    least = 64 * MiB * 16 // 512 + 256 * MiB * 8 // 2048
    assert grows.soon(0.0) == least
    grows.add(1000)
    fast = grows.soon(10.0)
    assert fast == 64 * MiB * 16 // 512 + 256 * MiB * 200 // 2048
    assert least <= grows.soon(11.0) < fast, "a rest is no reason to forget it at once"
    assert grows.soon(11.0) == grows.soon(11.0), "no time has passed"
    grows.add(1_000_000)
    assert grows.soon(12.0) == 64 * MiB * 16 // 512 + 256 * MiB, "no more than there is"


def test_where_one_token_touches_many_pages_all_of_it_is_left(small_pages: Path) -> None:
    small_pages.write_text("[always] madvise never\n")
    assert growth().soon(0.0) == 320 * MiB
    small_pages.unlink()
    assert growth().soon(0.0) < 10 * MiB, "a kernel without huge pages"
    across = Growth(PLANNED, ContextShape(n_ctx=32768, n_ubatch=512))
    along = Growth(PLANNED, ContextShape(n_ctx=32768, n_ubatch=512, flash_attn=True))
    assert across.soon(0.0) - along.soon(0.0) == 256 * MiB * 2048 // 32768


def test_where_prompts_are_kept_beside_the_context_only_graphs_are_lent(small_pages: Path) -> None:
    beside, kept = PLANNED.kv + PLANNED.outputs, growth(aside=16 * MiB)
    assert kept.soon(0.0) - growth().soon(0.0) == beside and kept.soon(0.0) < PLANNED.compute + beside


def test_a_plan_expects_what_will_be_lent(small_pages: Path) -> None:
    shape = ContextShape(n_ctx=2048, n_ubatch=512)
    idle = 320 * MiB - growth().soon(0.0)
    budget = Budget(4096 * MiB, 123 * MiB, "dram_budget")
    assert lent_of(PLANNED, shape, budget, None) == idle + 123 * MiB - 4096 * MiB // 100
    assert lent_of(PLANNED, shape, budget, "123MiB") == idle, "what the user sets stands"
    assert lent_of(PLANNED, shape, Budget(4096 * MiB, 123 * MiB, MACHINE), None) == 0, "as in a load"


def test_a_pass_with_a_token_of_each_sequence_generates(small_pages: Path) -> None:
    assert [few_tokens(n) for n in (1, 16, 17, 32)] == [16, 16, 17, 32]
    memory = Breakdown(compute=64 * MiB, outputs=16 * MiB)
    shape = ContextShape(n_ctx=32 * 256, n_ubatch=512, n_outputs=32, n_sequences=32)
    graphs = 48 * MiB * 32 // 512 + 16 * MiB  # each token of such a pass has logits
    assert Growth(memory, shape).soon(0.0) == graphs + 16 * MiB * 8 // (32 * 256)


def test_caches_that_were_touched_are_not_left_room_for_again(small_pages: Path, model_file: ModelFile) -> None:
    llm = llama_cpp.Llama(str(model_file("llama")), n_ctx=256, flash_offload=True, verbose=False)
    try:
        at_once = AtOnce.of(llm._ctx.ctx)
        assert at_once is not None and at_once.bytes > 0
        memory = Breakdown(kv=2 * at_once.bytes, compute=64 * MiB)
        shape = ContextShape(n_ctx=4 * 256, n_ubatch=512, n_sequences=4)
        rest = 64 * MiB * 16 // 512 + memory.kv * 8 // 1024
        assert Growth(memory, shape).soon(0.0) == rest + memory.kv, "not known"
        grows = Growth(memory, shape, at_once)
        assert at_once.untouched() > 0.9 * at_once.bytes  # a neighbour's page may be its first
        assert grows.soon(0.0) == rest + at_once.untouched()
        llm.eval([1])
        assert at_once.untouched() == 0 and grows.soon(0.0) == rest
    finally:
        llm.close()


@pytest.mark.parametrize("flash_attn", [False, True])
def test_of_a_cache_without_rows_a_token_touches_its_own_cells(flash_attn: bool, model_file: ModelFile) -> None:
    with contextlib.closing(
        llama_cpp.Llama(str(model_file("llama")), n_ctx=256, flash_attn=flash_attn, verbose=False)
    ) as llm:
        at_once = AtOnce.of(llm._ctx.ctx)
        assert at_once is not None and (at_once.bytes == 0) == flash_attn


def test_what_is_lent_is_told_as_a_part_of_what_lends_it() -> None:
    share = Share("model.gguf", FlashOffload(), Account())
    share.budget = Budget(100 * MiB, MiB, "dram_budget")
    share.memory = Breakdown(interpreter=60 * MiB, weights=MiB, kv=64 * MiB, compute=16 * MiB, pinned=9 * MiB)
    assert share.told == share.memory
    share.limited(100 * MiB, MiB, -30 * MiB, "dram_budget")
    told = share.told
    assert (told.interpreter, told.compute, told.kv) == (0, 0, 50 * MiB)
    assert told.total == share.memory.total and share.memory.kv == 64 * MiB
