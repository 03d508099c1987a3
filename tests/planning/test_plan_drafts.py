"""What a plan says of drafts: what they cost, and what they bring for how many are accepted."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from itertools import islice
from pathlib import Path

import pytest
from engines import Model
from hypothesis import given
from hypothesis import strategies as st
from mtp_models import write_mtp

import llama_flash
from llama_flash import FlashBudgetError, FlashError, FlashOffload
from llama_flash.budget.rooms import held_by_process, resolve_budget
from llama_flash.model.gguf import read_gguf
from llama_flash.model.mtp import mtp_head
from llama_flash.model.no_alloc import context_params, no_alloc_context
from llama_flash.model.shape import ContextShape
from llama_flash.native.calls import context_memory
from llama_flash.planning.cost import Cost
from llama_flash.planning.drafted import MOST_DRAFTED, draft_batch, draft_sizes, drafted
from llama_flash.server.parallel import plan_of

MODELS = Path(str(resources.files("llama_flash") / "models"))
ARCEE, MOE = MODELS / "stdlib-arcee-q8_0.gguf", MODELS / "stdlib-moe-q8_0.gguf"


def budget() -> int:
    """Too little for all weights, whatever this process has taken by now. Bytes."""
    return held_by_process() + (320 << 20)


def cost(seconds: float) -> Cost:
    return Cost((), 0.0, seconds, ())


@given(st.floats(0, 1), st.floats(0.001, 10), st.floats(0, 1), st.floats(0, 1))
def test_the_best_length_is_as_good_as_every_other(acceptance: float, one: float, further: float, per: float) -> None:
    def shape(n: int) -> float:
        return 1 + further * (n - 1)

    best = drafted(cost(one), shape, acceptance, per * one)
    for n in range(MOST_DRAFTED + 1):
        expected = sum(acceptance**i for i in range(n + 1))
        assert best.tokens_per_second >= expected / (one * shape(n + 1) + n * per * one) * (1 - 1e-9)
    assert best.tokens_per_second >= 1 / one * (1 - 1e-9)


def test_a_plan_says_what_a_draft_model_costs_and_brings() -> None:
    plain = llama_flash.plan(ARCEE, budget(), flash_offload={"what": "all"})
    made = llama_flash.plan(ARCEE, budget(), flash_offload={"what": "all", "draft": ARCEE})
    assert plain.drafts is None and plain.memory.draft == 0
    assert made.drafts is not None and made.drafts.source == "model"
    assert made.drafts.bytes == made.memory.draft > ARCEE.stat().st_size * 0.9
    assert made.smallest > plain.smallest + (made.drafts.bytes >> 21 << 20)
    rates = [each.tokens_per_second for each in made.drafts.expected]
    assert rates == sorted(rates) and [each.acceptance for each in made.drafts.expected] == [0.5, 0.7, 0.9]
    assert made.as_dict()["drafts"]["source"] == "model"


def test_passes_cost_more_where_each_token_has_experts_of_its_own() -> None:
    plans = {path: llama_flash.plan(path, budget(), flash_offload={"what": "all"}) for path in (ARCEE, MOE)}
    assert all(plan.mode == "flash" for plan in plans.values())
    ngram = llama_flash.plan(MOE, budget(), flash_offload={"what": "all", "draft": "ngram"}).drafts
    assert ngram is not None and ngram.bytes == 0
    assert ngram.expected[0].length == 0, "half of the drafts accepted do not pay for a mixture"


@pytest.mark.parametrize("value", ["ngrams", "", 3, True])
def test_what_is_no_draft_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError), match="draft"):
        FlashOffload(draft=value)  # type: ignore[arg-type]


def test_a_path_is_a_draft_model(tmp_path: Path) -> None:
    assert FlashOffload(draft=tmp_path / "x").drafts_by_model
    assert FlashOffload(draft="small.gguf").drafts_by_model
    assert not FlashOffload(draft="ngram").drafts_by_model


@pytest.mark.parametrize(("arch", "dense"), [("mimo2", True), ("glm4moe", False)])
def test_a_plan_says_what_a_head_costs_and_a_load_takes_that(arch: str, dense: bool, tmp_path: Path) -> None:
    path = write_mtp(arch, tmp_path / "model.gguf", dense=dense)
    head = mtp_head(read_gguf(path))
    assert head is not None
    options = {"what": "all", "reserve": "32MiB", "follow": False, "warm_start": False}
    shape = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64}
    plain = llama_flash.plan(path, budget(), flash_offload=options, **shape)  # type: ignore[arg-type]
    made = llama_flash.plan(path, budget(), flash_offload={**options, "draft": "mtp"}, **shape)  # type: ignore[arg-type]
    assert plain.drafts is None and plain.memory.draft == 0
    assert made.drafts is not None and made.drafts.source == "mtp"
    assert made.drafts.bytes == made.memory.draft > head.bytes
    # the matrix that the head shares stays in memory, too; weights alone are what a load without the head has
    output = read_gguf(path).tensors["output.weight"].size
    assert made.memory.weights == plain.memory.weights + output
    assert made.smallest >= plain.smallest
    with Model(
        str(path),
        n_threads=1,
        verbose=False,
        flash_offload={**options, "draft": "mtp", "dram_budget": budget()},
        **shape,
    ) as llm:
        assert llm.flash is not None and llm.flash.memory.draft == made.memory.draft


def test_a_plan_with_a_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_mtp("glm4moe", tmp_path / "model.gguf", head=False)
    with pytest.raises(FlashError, match=r"model\.gguf has no head of multi-token prediction"):
        llama_flash.plan(path, budget(), flash_offload={"draft": "mtp"})
    made = llama_flash.plan(path, budget(), flash_offload={"draft": "auto"}).drafts
    assert made is not None and made.source == "ngram"


def test_a_plan_for_clients_at_the_same_time_has_a_head_with_a_cache_for_each(tmp_path: Path) -> None:
    path = write_mtp("glm4moe", tmp_path / "model.gguf")
    one, two, found = (
        llama_flash.plan(path, "2GiB", parallel=n, n_ctx=512, flash_offload={"draft": draft})
        for n, draft in ((1, "mtp"), (2, "mtp"), (2, "auto"))
    )
    assert one.drafts is not None and two.drafts is not None and found.drafts is not None
    assert one.drafts.source == two.drafts.source == found.drafts.source == "mtp"
    assert two.drafts.bytes > one.drafts.bytes and found.memory.draft == two.memory.draft


@pytest.mark.parametrize("what", ["all", "auto"])
def test_auto_is_the_text_alone_where_the_budget_has_no_room_for_the_head(what: str, tmp_path: Path) -> None:
    path = write_mtp("glm4moe", tmp_path / "model.gguf", own_head=True)
    options = {"what": what, "reserve": "32MiB", "follow": False, "warm_start": False}
    shape = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512}

    def planned(draft: str, total: int | str) -> llama_flash.LoadPlan:
        return llama_flash.plan(path, total, flash_offload={**options, "draft": draft}, **shape)  # type: ignore[arg-type]

    slack = 4 << 20  # bytes: what this process has taken is not the same at each plan
    least = planned("ngram", budget()).smallest
    assert least < planned("mtp", budget()).smallest and planned("auto", budget()).smallest >= least - slack
    total = planned("auto", budget()).smallest + slack  # the head takes twice as much
    with pytest.raises(FlashBudgetError):
        planned("mtp", total)
    made = planned("auto", total)
    assert made.drafts is not None and made.drafts.source == "ngram" and made.memory.draft == 0
    assert "head takes" in made.drafts.reason
    assert "too small" not in {option.mode for option in made.others}
    ample = planned("auto", budget()).drafts
    assert ample is not None and (ample.source, ample.reason) == ("mtp", "")
    with Model(
        str(path),
        n_threads=1,
        verbose=False,
        flash_offload={**options, "draft": "auto", "dram_budget": total},
        **shape,
    ) as llm:
        assert llm.flash is not None and llm.flash.memory.draft == 0 and llm.flash._load.head is None
        drafts = llm.flash.stats().drafts
        assert drafts.source == "ngram" and drafts.reason == made.drafts.reason and drafts.reason in llm.flash.summary
        assert len(list(islice(llm.generate([5, 6, 7], temp=0.0), 8))) == 8


def test_how_many_sequences_have_room_counts_a_head_and_a_draft_model_has_none_of_its_weights(tmp_path: Path) -> None:
    path = write_mtp("glm4moe", tmp_path / "model.gguf")
    meta = read_gguf(path)
    head = mtp_head(meta)
    assert head is not None
    loaded = sum(tensor.size for tensor in meta.tensors.values()) - head.bytes
    options, shape = FlashOffload(dram_budget="8GiB"), ContextShape(n_ctx=256)
    one = plan_of(1, meta, options, resolve_budget("8GiB"), shape)
    assert one is not None and one.resident_bytes == loaded
    with_head = plan_of(2, meta, replace(options, draft="mtp"), resolve_budget("8GiB"), shape)
    assert with_head is not None and with_head.expected.outputs > one.expected.outputs
    small = draft_sizes(path, 512)
    with no_alloc_context(str(path), None, context_params(shape)) as (_, context):
        assert small.weights == small.read == context_memory(context).model >= loaded


def test_a_wide_feed_forward_block_has_fewer_tokens_at_once_so_that_a_draft_model_s_buffers_stay_small() -> None:
    """Such as one that was made large for a measurement: fewer tokens are computed at once."""
    meta = read_gguf(ARCEE)
    assert draft_batch(meta, 1024) == 256 and draft_batch(meta, 100) == 100
    for neurons, batch in ((65_536, 256), (819_200, 20), (50_000_000, 16)):
        wide = replace(meta, values={**meta.values, "arcee.feed_forward_length": neurons})
        assert draft_batch(wide, 1024) == batch
