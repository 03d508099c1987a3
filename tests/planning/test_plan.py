"""A plan is what loading does: the same weights on flash, the same memory, and a smallest budget that works."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from caps import require_caps
from conftest import ModelFile
from engines import give_memory, tokens
from gguf import GGMLQuantizationType
from llama_cpp import Llama
from neurons import bundled, write_model
from repository import with_support

import llama_flash
from gguf_tools.bundle import bundle
from gguf_tools.synthetic import tiny, write
from llama_flash import FlashBudgetError, FlashError, FlashFormatError, FlashOffload, run_capped
from llama_flash.budget.rooms import Breakdown, held_by_process
from llama_flash.device.kept import profile_for
from llama_flash.planning.cost import expect
from llama_flash.planning.planner import LoadPlan
from llama_flash.session.expected import cost_of

MIB = 1 << 20
MODELS = Path(llama_flash.__file__).parent / "models"
SMALL: dict[str, Any] = {"n_ctx": 128, "n_batch": 32, "n_ubatch": 32}

# A load is tried in a process of its own: what other tests have left in this one is not part of it.
LOAD = """
import json, sys
import llama_cpp, llama_flash
path, budget, options, context = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
if budget == 0:
    plan = llama_flash.plan(path, flash_offload=options, **context)
    print(json.dumps({"smallest": plan.smallest}))
    sys.exit()
try:
    llm = llama_cpp.Llama(path, flash_offload={**options, "dram_budget": budget}, verbose=False, **context)
    llm.eval(list(range(3, 40)))
    llm.eval([5])
    stats = llm.flash.stats()
    print(json.dumps({"works": True, "total": stats.memory.total}))
except llama_flash.FlashBudgetError as error:
    print(json.dumps({"works": False, "smallest": error.smallest}))
"""


def in_a_fresh_process(path: Path, budget: int, options: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", LOAD, str(path), str(budget), json.dumps(options), json.dumps(context)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


# What is refused names a budget; that very process takes it at once, again and again, and after other refusals.
NAMED = """
import json, sys
import llama_cpp, llama_flash
path, options, context = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])

def attempt(budget):
    try:
        llm = llama_cpp.Llama(path, flash_offload={**options, "dram_budget": budget}, verbose=False, **context)
    except llama_flash.FlashBudgetError as error:
        assert f"The smallest that works is {error.smallest >> 20} MiB." in str(error), error
        return error.smallest
    llm.eval(list(range(3, 40)))
    llm.eval([5])
    llm.close()
    return None

first = attempt("8MiB")
tried = [["first", first, attempt(first)] for _ in range(3)]
for budget in ("8MiB", "16MiB", "8MiB", int(0.92 * first), int(0.95 * first)):  # near: refused by what a load took
    named = attempt(budget)
    tried.append([budget, named, named and attempt(named)])
print(json.dumps(tried))
"""


@pytest.mark.parametrize(
    ("name", "options", "context"),
    [
        ("stdlib-moe-q8_0.gguf", {}, {"n_ctx": 512}),
        ("stdlib-arcee-q8_0.gguf", {}, {"n_ctx": 1024}),
        ("stdlib-opt-q8_0-flash.gguf", {}, {"n_ctx": 512}),
        ("llama", {"what": "ffn"}, SMALL),
    ],
)
def test_the_budget_that_a_refusal_names_works_in_the_process_that_was_told_it(
    name: str, options: dict[str, Any], context: dict[str, Any], model_file: ModelFile
) -> None:
    path = MODELS / name if name.endswith(".gguf") else model_file(name)
    command = [sys.executable, "-c", NAMED, str(path), json.dumps(options), json.dumps(context)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    for asked, named, refused in json.loads(done.stdout):
        assert refused is None and (named is not None or isinstance(asked, int)), (
            f"{asked}: {named} bytes were named, then {refused}"
        )


@pytest.mark.parametrize("name", ["stdlib-moe-q8_0.gguf", "stdlib-opt-q8_0-flash.gguf"])
def test_the_budget_that_a_refusal_names_works_as_a_cap_of_a_new_process(name: str) -> None:
    require_caps()
    command = [sys.executable, "-m", "llama_flash", "run", str(MODELS / name), "-n", "4", "-c", "512", "--json"]
    refused = subprocess.run([*command, "--dram-budget", "8MiB"], capture_output=True, text=True, timeout=400)
    named = re.search(r"smallest that works is (\d+) MiB", refused.stderr)
    assert named, refused.stderr
    result = run_capped(int(named[1]) * MIB, command, capture_output=True, timeout=400)
    assert result.returncode == 0 and result.oom_kills == 0, result


@pytest.mark.parametrize(
    ("name", "options", "context"),
    [
        ("stdlib-moe-q8_0.gguf", {}, {"n_ctx": 512}),
        pytest.param(
            "stdlib-moe-q8_0.gguf", {"what": "experts"}, {"n_ctx": 1024, "logits_all": True}, marks=pytest.mark.full
        ),
        ("stdlib-arcee-q8_0.gguf", {}, {"n_ctx": 1024}),
        ("stdlib-opt-q8_0-flash.gguf", {}, {"n_ctx": 512}),
        pytest.param(
            "stdlib-opt-q8_0-flash.gguf", {"predictor": "exact", "what": "all"}, SMALL, marks=pytest.mark.full
        ),
        pytest.param("deepseek2", {}, SMALL, marks=pytest.mark.full),
        ("llama", {"what": "ffn"}, SMALL),
    ],
)
def test_a_little_above_the_smallest_budget_a_load_works_and_a_little_below_it_is_refused(
    name: str, options: dict[str, Any], context: dict[str, Any], model_file: ModelFile
) -> None:
    path = MODELS / name if name.endswith(".gguf") else model_file(name)
    smallest = in_a_fresh_process(path, 0, options, context)["smallest"]
    above = in_a_fresh_process(path, int(1.03 * smallest), options, context)
    assert above["works"] and above["total"] <= 1.03 * smallest
    below = in_a_fresh_process(path, int(0.9 * smallest), options, context)
    assert not below["works"]
    assert below["smallest"] == pytest.approx(smallest, rel=0.05), "the refusal names it, too"


@pytest.fixture(autouse=True)
def _tidy() -> None:
    """What other tests have left would go in the middle of a comparison."""
    gc.collect()


def load(path: Path, budget: int | str = "auto", flash: dict[str, Any] | None = None, **options: Any) -> Llama:
    # what is planned is the load; later the memory follows what other tests leave behind
    flash = {**(flash or {}), "dram_budget": budget, "follow": False}
    return Llama(str(path), flash_offload=flash, verbose=False, **{**SMALL, **options})


def compare(plan: LoadPlan, llm: Llama) -> None:
    """Exact where the engine was asked, to a few records where the plugin splits, to 6 MiB where Python allocates."""
    assert llm.flash is not None
    stats = llm.flash.stats()
    how = ((plan.mode, plan.predictor), (stats.mode, stats.predictor))
    assert how[0] == how[1], (how, plan.memory, stats.memory)
    assert (plan.budget.total, plan.budget.reserve) == (stats.budget.total, stats.budget.reserve)
    assert (plan.flash_weights, plan.resident_weights) == (stats.flash_weights, stats.resident_weights)
    assert (plan.memory.kv, plan.memory.compute) == (stats.memory.kv, stats.memory.compute)
    assert plan.memory.outputs == pytest.approx(stats.memory.outputs, rel=0.05)
    assert plan.memory.weights == pytest.approx(stats.memory.weights, rel=0.05, abs=256 << 10)
    of_python = plan.memory.interpreter - stats.memory.interpreter
    assert abs(of_python) <= 6 * MIB, f"{of_python} bytes more are planned than taken"
    if stats.mode == "flash":
        tolerance = 6 * MIB + 0.05 * stats.memory.flash  # what the interpreter does not take, flash gets
        assert plan.memory.slots == pytest.approx(stats.memory.slots, abs=tolerance)
        assert plan.memory.pinned == pytest.approx(stats.memory.pinned, abs=tolerance)
        assert plan.memory.flash == pytest.approx(stats.memory.flash, abs=tolerance)


def alone(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function of this file in a process of its own: what other tests have left is not part of it."""
    program = "import json, sys, test_plan; getattr(test_plan, sys.argv[1])(*json.loads(sys.argv[2]))"
    command = [sys.executable, "-c", program, function.__name__, json.dumps(arguments)]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=with_support(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def planned_as_loaded(path: str, context: dict[str, Any], what: str) -> None:
    plan = llama_flash.plan(path, flash_offload={"what": what}, **{**SMALL, **context})
    llm = load(Path(path), flash={"what": what}, **context)
    try:
        plan_of_auto = {"resident": "auto", "nothing": "experts"}.get(plan.mode)
        assert plan_of_auto in (None, what)
        if plan.mode == "flash":
            # "auto" takes all the memory that is free, which changes all the time
            llm.close()
            budget = plan.smallest + 24 * MIB
            plan = llama_flash.plan(path, budget, flash_offload={"what": what}, **{**SMALL, **context})
            llm = load(Path(path), budget, {"what": what}, **context)
            compare(plan, llm)
    finally:
        llm.close()


def all_planned_as_loaded(path: str) -> None:
    contexts: list[dict[str, Any]] = [{}, {"n_ctx": 512, "n_batch": 512, "n_ubatch": 256}, {"logits_all": True}]
    for context in contexts:
        for what in ("auto", "experts", "ffn", "all"):
            planned_as_loaded(path, context, what)


@pytest.mark.parametrize("form", ["qwen3moe", pytest.param("deepseek2", marks=pytest.mark.full), "llama"])
def test_the_plan_is_what_a_load_does(form: str, model_file: ModelFile) -> None:
    alone(all_planned_as_loaded, str(model_file(form, "Q4_0")))


def bundles_planned_as_loaded() -> None:
    path = MODELS / "stdlib-opt-q8_0-flash.gguf"
    load(path).close()  # 3 MiB above the smallest budget, what the first load leaves on the heap would decide
    all_options: list[dict[str, Any]] = [
        *({}, {"predictor": "exact"}, {"predictor": "lowrank"}, {"predictor": "off"}),
        {"window": 3, "what": "ffn"},
    ]
    for options in all_options:
        smallest = llama_flash.plan(path, flash_offload=options, **SMALL).smallest
        little = 3 if options else 6  # near 3 "auto" chooses otherwise for less than what a plan may be off by
        for budget in (smallest + little * MIB, smallest + 40 * MIB):
            plan = llama_flash.plan(path, budget, flash_offload=options, **SMALL)
            llm = load(path, budget, options)
            compare(plan, llm)
            llm.close()
            assert plan.window == options.get("window")
            assert plan.n_neurons == 18432 and plan.io_depth == 128


def test_the_plan_of_bundles_is_what_a_load_does() -> None:
    alone(bundles_planned_as_loaded)


@pytest.mark.parametrize("layout", ["bundled", "split"])
def test_bundles_with_a_gate_and_both_layouts_can_be_planned(layout: str, model_folder: Path) -> None:
    path = bundled(write_model(model_folder, "llama", "F32", "reglu"), layout=layout)
    flash = {"predictor": "exact"}
    budget = llama_flash.plan(path, flash_offload=flash, **SMALL).smallest + 8 * MIB
    plan = llama_flash.plan(path, budget, flash_offload=flash, **SMALL)
    llm = load(path, budget, flash)
    compare(plan, llm)
    llm.close()


def test_a_width_that_no_block_divides_can_be_planned(model_folder: Path) -> None:
    """Of bundles: a neuron's part of down is n_embd long, whatever n_ff is."""
    plain = write(tiny("arcee", "F32", n_ff=96), model_folder / "narrow.gguf")[0]
    path = model_folder / "narrow-bundled.gguf"
    bundle(plain, path, kind=GGMLQuantizationType.Q4_K, force=True)
    assert llama_flash.plan(path, flash_offload={"what": "ffn"}, **SMALL).smallest > 0


def test_dense_weights_are_read_as_expected(model_file: ModelFile) -> None:
    """What streams is known beforehand: bytes and reads per token are, too."""
    path, flash = model_file("llama"), {"what": "ffn", "panel_bytes": "64KiB"}
    budget = llama_flash.plan(path, flash_offload=flash, **SMALL).smallest + 4 * MIB
    llm = load(path, budget, flash)
    assert llm.flash is not None
    expected = cost_of(llm.flash)(profile_for(path))
    llm.eval(tokens(4, seed=1))
    for token in tokens(30, seed=2):
        llm.eval([token])
    decode = llm.flash.stats().decode
    llm.close()
    assert expected.bytes_per_token == pytest.approx(decode.bytes_per_token, rel=0.15)
    assert expected.reads_per_token == pytest.approx(decode.reads_per_token, rel=0.15)


@pytest.mark.parametrize("name", ["even", "stdlib-moe-q8_0.gguf"])
def test_experts_are_read_as_expected_with_even_routing_and_less_otherwise(name: str, model_file: ModelFile) -> None:
    path = model_file("qwen3moe") if name == "even" else MODELS / name
    llm = load(path, flash={"what": "experts"})
    assert llm.flash is not None
    needs = llm.flash.native.requirements()
    give_memory(llm, 0.6)
    given = llm.flash.native.memory()
    memory = Breakdown(slots=given.slots, pinned=given.pinned, stream=given.stream)
    expected = expect(llm.flash.meta, llm.flash.plan, memory, needs, profile_for(path), lookahead=2)
    for token in tokens(40, seed=3):
        llm.eval([token])
    cold = llm.flash.stats().decode
    for token in tokens(80, seed=2):
        llm.eval([token])
    decode = llm.flash.stats().decode - cold
    llm.close()
    assert 0.1 < expected.traffic[0].hit_rate < 0.9
    assert decode.bytes_per_token <= 1.1 * expected.bytes_per_token
    if name == "even":
        assert decode.bytes_per_token >= 0.8 * expected.bytes_per_token


def test_planning_leaves_no_memory_taken(model_file: ModelFile) -> None:
    path = MODELS / "stdlib-opt-q8_0-flash.gguf"
    llama_flash.plan(path)

    def taken() -> int:
        before = held_by_process()
        for _ in range(5):
            llama_flash.plan(path)
        return held_by_process() - before

    # pages of libraries that others have pushed out of memory come back; what is not freed is taken each time
    assert min(taken() for _ in range(3)) < 4 * MIB


def test_a_model_that_fits_is_planned_resident_and_reads_nothing(model_file: ModelFile) -> None:
    plan = llama_flash.plan(model_file("qwen3moe"), **SMALL)
    assert (plan.mode, plan.flash_weights, plan.bytes_per_token) == ("resident", 0, 0)
    assert plan.tokens_per_second > 0


def test_a_model_without_weights_of_the_kind_is_planned_as_stock(model_file: ModelFile) -> None:
    plan = llama_flash.plan(model_file("llama"), flash_offload={"what": "experts"}, **SMALL)
    assert (plan.mode, plan.memory.reserve, plan.smallest) == ("nothing", 0, 0)


def test_too_small_a_budget_is_refused_with_the_smallest(model_file: ModelFile) -> None:
    path = model_file("qwen3moe")
    smallest = llama_flash.plan(path, **SMALL).smallest
    with pytest.raises(FlashBudgetError, match=r"smallest that works is \d+ MiB") as error:
        llama_flash.plan(path, "16MiB", **SMALL)
    assert error.value.smallest == pytest.approx(smallest, abs=8 * MIB)
    assert llama_flash.plan(path, error.value.smallest + 8 * MIB, **SMALL).smallest <= error.value.smallest + 8 * MIB


def test_other_budgets_are_shares_of_the_file_above_the_smallest_where_that_is_larger(model_file: ModelFile) -> None:
    path = model_file("qwen3moe")
    plan = llama_flash.plan(path, flash_offload={"what": "experts"}, **SMALL)
    assert [other.label for other in plan.others] == [f"smallest + {s}% of the file" for s in (25, 50, 75, 100)]
    assert [other.mode for other in plan.others] == ["flash"] * 4
    costs = [other.cost.bytes_per_token for other in plan.others if other.cost]
    assert costs == sorted(costs, reverse=True) and len(costs) == 4
    assert plan.others[1].budget == plan.smallest + path.stat().st_size // 2


def test_the_kv_cache_and_logits_are_counted_as_asked(model_file: ModelFile) -> None:
    path = model_file("qwen3moe")
    base = llama_flash.plan(path, **SMALL)
    longer = llama_flash.plan(path, **{**SMALL, "n_ctx": 512})
    smaller = llama_flash.plan(path, type_k=8, **SMALL)
    every = llama_flash.plan(path, logits_all=True, **SMALL)
    assert longer.memory.kv > base.memory.kv > smaller.memory.kv
    assert every.memory.outputs > base.memory.outputs
    assert longer.smallest >= base.smallest


def test_a_plan_is_json(model_file: ModelFile) -> None:
    values = json.loads(json.dumps(llama_flash.plan(model_file("qwen3moe"), **SMALL).as_dict()))
    for name in ("smallest", "mode", "memory", "cost", "others", "bytes_per_token", "tokens_per_second", "io_depth"):
        assert name in values


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"n_ctx": -1}, ValueError, "n_ctx: -1"),
        ({"n_batch": 0}, ValueError, "n_batch: 0"),
        ({"n_ctx": "many"}, TypeError, "n_ctx: .*'many'"),
        ({"n_ubatch": True}, TypeError, "n_ubatch"),
        ({"n_ctx": 2.5}, TypeError, "n_ctx"),
        ({"type_k": "q8_0"}, ValueError, r"type_k: 'q8_0' .* 8 \(q8_0\)"),
        ({"type_v": 999}, ValueError, "type_v: 999"),
        ({"dram_budget": "5 parsecs"}, ValueError, r"accepted: .*2GiB.*auto"),
        ({"dram_budget": ""}, ValueError, "accepted"),
        ({"flash_offload": {"budget": 1}}, TypeError, "budget"),
        ({"flash_offload": False}, ValueError, "nothing to plan"),
        ({"type_v": 8}, FlashError, "context"),  # without flash attention the engine has no such cache
        ({"flash_offload": {"predictor": "lowrank"}}, None, None),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: dict[str, Any], error: type[Exception] | None, said: str, model_file: ModelFile
) -> None:
    if error is None:  # an option for bundles is no mistake where there are none
        assert llama_flash.plan(model_file("qwen3moe"), **{**SMALL, **arguments}).predictor == "none"
        return
    with pytest.raises(error, match=said):
        llama_flash.plan(model_file("qwen3moe"), **{**SMALL, **arguments})


def test_predictors_that_are_not_in_the_file_cannot_be_planned_with(model_folder: Path) -> None:
    with pytest.raises(FlashFormatError, match="calibrate"):
        llama_flash.plan(bundled(write_model(model_folder, "arcee", "Q8_0")), flash_offload={"predictor": "lowrank"})


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        llama_flash.plan(tmp_path / "no.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FlashFormatError):
        llama_flash.plan(tmp_path / "x.gguf")


def test_a_budget_above_what_is_there_is_capped_and_said(
    model_file: ModelFile, caplog: pytest.LogCaptureFixture
) -> None:
    plan = llama_flash.plan(model_file("qwen3moe"), "900TiB", **SMALL)
    assert plan.budget.asked == 900 << 40
    assert plan.budget.total < 900 << 40
    assert "that is used" in caplog.text


def test_options_are_taken_as_llama_takes_them(model_file: ModelFile) -> None:
    path = model_file("qwen3moe")
    for flash in (True, {"what": "experts"}, FlashOffload(what="experts", io_depth=7)):
        plan = llama_flash.plan(path, flash_offload=flash, **SMALL)
        assert plan.mode == ("resident" if flash is True else "flash")
    assert plan.io_depth == 7
    stated = FlashOffload(dram_budget="1GiB")
    assert llama_flash.plan(path, flash_offload=stated, **SMALL).budget.asked == 1 << 30
    assert llama_flash.plan(path, "2GiB", flash_offload=stated, **SMALL).budget.asked == 2 << 30
