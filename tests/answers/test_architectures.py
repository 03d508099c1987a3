"""Every architecture that the engine knows: the same bits with weights on flash, and few weights that stay in memory.

Tiny random models of each (architectures.py) are run in workers (architecture_runs.py): a prompt, then tokens one by
one, or whole texts where an architecture encodes; all logits or embeddings, bit by bit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from architecture_page import ALL, EXCEPTIONS, rows_of_page
from architecture_runs import Case, Outcome, run_all
from architectures import architectures, write

# What may stay in memory: less than this share of the weights, for so many of all architectures.
SHARE, OF_ARCHITECTURES = 0.15, 0.90

# one of each kind of graph; the others are `full`
DEFAULT = [
    Case("llama"),
    Case("llama", "q4_0", "wide"),
    Case("qwen3moe"),
    Case("qwen3moe", "q4_k_m", "fused"),
    Case("deepseek2"),
    Case("qwen3next"),
    Case("gemma3", variant="tied"),
    Case("gpt2"),
    Case("mamba2"),
    Case("rwkv7"),
    Case("lfm2moe", "mxfp4_moe"),
    Case("qwen3moe", "iq3_s"),
    Case("t5"),
    Case("bert"),
    Case("llada"),
]
_TYPES = """
    plain f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k_m q4_k_m q5_k_m q6_k iq4_nl tq1_0 tq2_0 q1_0 q2_0 mxfp4_moe
"""
_SLOW_TYPES = "iq4_xs iq3_s iq3_xxs iq2_s iq2_xs iq2_xxs iq1_s iq1_m"  # to be made
TYPES = [Case("llama", ftype, "wide") for ftype in _TYPES.split()]
TYPES += [Case("qwen3moe", ftype) for ftype in (_TYPES + _SLOW_TYPES).split()]
TYPES += [
    Case(arch, ftype, "wide")
    for arch in ("mamba2", "rwkv7", "qwen3next")
    for ftype in ("f16", "q4_0", "q4_k_m", "q6_k", "q2_k", "iq4_xs", "iq3_s")
]
TYPES += [Case("gpt-oss", "mxfp4_moe"), Case("deepseek2", "q4_k_m"), Case("gemma3n", "q4_0")]
VARIANTS = [
    *(
        Case(arch, variant="tied")
        for arch in ("llama", "qwen2", "gpt2", "qwen3moe", "mamba2", "falcon-h1", "qwen3next")
    ),
    *(Case(arch, variant="fused") for arch in ("llama", "qwen3", "bert", "deepseek", "lfm2moe", "gpt-oss")),
    *(Case(arch, variant="mixture") for arch in ("llama", "granite", "mistral3", "minicpm", "gemma4")),
]
ALTERED = [
    Case("llama", altered="blk.1.ffn_up.weight"),
    Case("qwen3moe", altered="blk.1.ffn_down_exps.weight"),
    Case("qwen3", altered="token_embd.weight"),
]


def _listed(cases: list[Case]) -> list[Case]:
    return list(dict.fromkeys(cases))


FULL = [case for case in _listed([*ALL, *TYPES, *VARIANTS]) if case not in DEFAULT]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[Case, Outcome]:
    """Of the cases of all tests that were chosen; run once, in as few workers as there are crashes and one more."""
    wanted: list[Case] = []
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module:
            if callspec := getattr(item, "callspec", None):
                wanted += [value for value in callspec.params.values() if isinstance(value, Case)]
            if item.originalname in ("test_few_weights_stay_in_memory", "test_the_page_says_what_was_measured"):
                wanted += ALL
    cases = _listed(wanted)
    return dict(zip(cases, run_all(cases), strict=True))


def _check(outcome: Outcome) -> None:
    if outcome.error:
        pytest.fail(outcome.error)
    assert outcome.finite and outcome.answers > 4, "these values say nothing"
    assert outcome.bytes_read > outcome.flash_bytes, "what is on flash was read once, and not again"
    assert outcome.different == 0, f"{outcome.different} of {outcome.rows} rows differ"
    if outcome.expert_bytes:
        assert outcome.expert_misses > 0


@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_values_are_bit_identical(case: Case, outcomes: dict[Case, Outcome]) -> None:
    _check(outcomes[case])


@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=str)
def test_values_are_bit_identical_for_every_architecture(case: Case, outcomes: dict[Case, Outcome]) -> None:
    _check(outcomes[case])


@pytest.mark.parametrize("case", ALTERED, ids=str)
def test_other_rows_of_one_weight_change_the_values(case: Case, outcomes: dict[Case, Outcome]) -> None:
    """Shows that the tests above can fail, and that it is the file that flash offload computes on."""
    assert outcomes[case].rows
    assert outcomes[case].different > 0


@pytest.mark.full
def test_few_weights_stay_in_memory(outcomes: dict[Case, Outcome]) -> None:
    shares = {case.arch: outcomes[case].share for case in ALL}
    for arch, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{arch:20} {share:6.1%}  {', '.join(outcomes[Case(arch)].resident)}")
    many = {arch: f"{share:.0%}" for arch, share in shares.items() if share >= SHARE}
    assert len(many) <= (1 - OF_ARCHITECTURES) * len(shares), many


def test_every_architecture_of_the_engine_is_on_the_page() -> None:
    """One that is new in the engine is refused here until it was measured, or has a reason not to be."""
    assert set(architectures()) >= EXCEPTIONS.keys()
    assert sorted(rows_of_page()) == sorted(architectures()), "python tests/support/architecture_page.py"


@pytest.mark.full
def test_the_page_says_what_was_measured(outcomes: dict[Case, Outcome]) -> None:
    rows = rows_of_page()
    for case in ALL:
        said = re.search(r"(\d+) %", rows[case.arch])
        assert said, rows[case.arch]
        assert abs(int(said[1]) / 100 - outcomes[case].share) < 0.011, (
            f"{case}: python tests/support/architecture_page.py"
        )


@pytest.mark.parametrize("arch", [arch for arch in EXCEPTIONS if EXCEPTIONS[arch].says])
def test_what_is_not_run_is_refused_by_the_engine(arch: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=EXCEPTIONS[arch].says):
        write(arch, tmp_path / "model.gguf")
