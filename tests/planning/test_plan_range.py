"""What a plan says of a mixture's first run is a range that what comes lies in; after it, one figure."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import give_memory
from model_heads import DENSE, MIB, model
from test_cost import device, needs, placed

import llama_flash
from llama_flash.budget.rooms import Breakdown
from llama_flash.device.kept import profile_for
from llama_flash.model.gguf import GgufMeta
from llama_flash.planning.cost import Cost, expect
from llama_flash.planning.misses import USUAL_SKEW, expert_misses, skew_of
from llama_flash.planning.usage import Usage

SHIPPED = Path(llama_flash.__file__).parent / "models" / "stdlib-moe-q8_0.gguf"


def expected(held: float, usage: Usage | None = None, **options: Any) -> Cost:
    """Of a mixture of which slots hold this share."""
    meta = model()  # 4 layers, 8 experts of 2 MiB in 3 weights, 2 used
    plan = placed(meta, "experts")
    slots = int(held * 96 * (2 * MIB + 4096))
    return expect(meta, plan, Breakdown(slots=slots), needs(plan, 96), device(), usage=usage, **options)


@pytest.mark.parametrize("held", [0.2, 0.5, 0.75])
def test_of_a_first_run_the_range_goes_from_even_to_usual_routing(held: float) -> None:
    cost = expected(held)
    assert cost.usual is not None and cost.usual.usual is None
    assert cost.usual.bytes_per_token == pytest.approx(cost.bytes_per_token * math.exp(-USUAL_SKEW * held))
    assert cost.bytes_per_token_range == (cost.usual.bytes_per_token, cost.bytes_per_token)
    assert cost.tokens_per_second_range == (cost.tokens_per_second, cost.usual.tokens_per_second)
    assert cost.tokens_per_second <= cost.usual.tokens_per_second
    if cost.bound_by == "flash":
        assert cost.tokens_per_second < cost.usual.tokens_per_second
    seen = expected(held, Usage(tokens=24, computing=0.0, skew=USUAL_SKEW))
    assert seen.traffic == cost.usual.traffic, "the same as if it had been seen"
    assert any("most mixtures" in text for text in cost.assumptions)


def test_after_a_run_there_is_one_figure() -> None:
    cost = expected(0.5, Usage(tokens=100, computing=0.02, skew=3.0, read=1e7, waited=0.001))
    assert cost.usual is None
    assert cost.tokens_per_second_range == (cost.tokens_per_second,) * 2
    assert cost.bytes_per_token_range == (cost.bytes_per_token,) * 2
    assert not any("most mixtures" in text for text in cost.assumptions)


def test_a_run_that_did_not_show_the_routing_leaves_the_range() -> None:
    cost = expected(0.5, Usage(tokens=100, computing=0.02))
    assert cost.usual is not None and cost.usual.compute_seconds == cost.compute_seconds == 0.02


def test_what_reads_no_experts_has_no_range() -> None:
    assert expected(1.0).usual is None, "all of them fit"
    meta: GgufMeta = model(**DENSE)
    plan = placed(meta, "ffn")
    dense = expect(meta, plan, Breakdown(pinned=32 * MIB, stream=8 * MIB), needs(plan, n_panels=64), device())
    assert dense.usual is None


def test_a_range_is_json_with_both_figures() -> None:
    values = json.loads(json.dumps(expected(0.5).as_dict()))
    assert values["tokens_per_second_range"] == [values["tokens_per_second"], values["usual"]["tokens_per_second"]]
    assert values["bytes_per_token_range"] == [values["usual"]["bytes_per_token"], values["bytes_per_token"]]
    assert values["usual"]["usual"] is None
    assert json.loads(json.dumps(expected(1.0).as_dict()))["usual"] is None


@pytest.mark.parametrize(("held", "missed"), [(0.45, 0.08), (0.2, 0.32)])
def test_full_size_runs_lie_near_the_usual_end(held: float, missed: float) -> None:
    """48 layers of Qwen3-30B-A3B's shape with skewed routing found 92 % within 8 GiB, and 68 % within 4 GiB."""
    assert expert_misses(held, USUAL_SKEW) == pytest.approx(missed, rel=0.15)
    assert skew_of(held, missed) == pytest.approx(USUAL_SKEW, rel=0.15)


def test_the_command_prints_the_range_and_says_what_it_is_of() -> None:
    # nothing that decoding has no use for: the model is small
    small = ["--what", "experts", "--n-ctx", "128", "--n-ubatch", "16", "--reserve", "1MiB"]

    def said(*options: str) -> str:
        command = [sys.executable, "-m", "llama_flash", "plan", str(SHIPPED), *small, *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    memory = json.loads(said("--json", "--dram-budget", "1GiB"))["memory"]
    # what the process itself takes decides: less, until something has to be read
    for missing in range(0, memory["slots"], 2 << 20):
        budget = ("--dram-budget", str(sum(memory.values()) - missing))
        values = json.loads(said("--json", *budget))
        if values["bytes_per_token"] > 0:
            break
    low, high = values["tokens_per_second_range"]
    assert low == values["tokens_per_second"] <= high, "the same where DRAM is slower than the device"
    assert values["bytes_per_token_range"][0] < values["bytes_per_token_range"][1] == values["bytes_per_token"]
    text = said(*budget)
    (row,) = [line for line in text.splitlines() if "experts from flash" in line]
    assert row.count(" to ") == 3 and "most mixtures" in text, "hit rate, bytes and reads"


@pytest.mark.parametrize("share", [0.25, 0.45])
def test_what_the_shipped_mixture_reads_lies_within_the_range(share: float) -> None:
    options = {"what": "experts", "follow": False, "lookahead": False, "warm_start": False}
    import llama_cpp

    llm = llama_cpp.Llama(str(SHIPPED), n_ctx=512, n_threads=2, verbose=False, flash_offload=options)
    try:
        give_memory(llm, share)
        given = llm.flash.native.memory()
        memory = Breakdown(slots=given.slots, pinned=given.pinned, stream=given.stream)
        wanted = llm.flash.native.requirements()
        cost = expect(llm.flash.meta, llm.flash.plan, memory, wanted, profile_for(SHIPPED))
        text = llm.tokenize(inspect.getsource(argparse).encode())[:400]
        for token in text[:160]:
            llm.eval([token])
        before = llm.flash.stats().decode
        for token in text[160:]:
            llm.eval([token])
        read = (llm.flash.stats().decode - before).bytes_per_token
    finally:
        llm.close()
    least, most = cost.bytes_per_token_range
    assert 0.7 * least <= read <= most, (least, read, most)
