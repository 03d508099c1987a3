"""`llama_flash.complete_many`: many prompts from Python."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import resources
from pathlib import Path

import llama_cpp
import psutil
import pytest
from batches import PATIENCE
from serving import cut_short

import llama_flash
from llama_flash.batch.advice import MOST, parallel_for
from llama_flash.budget.rooms import held_by_process

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20
GREEDY = {"max_tokens": 24, "temperature": 0}
PROMPTS = [f"{text}# {i}\n" for i in range(5) for text in ("import os\n", "class Stack:\n", "def main(argv):\n")]


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith(("llama-server", "batch-"))]


def gone() -> bool:
    """Whether server and clients are: clients end a moment later than who waits for the server."""
    end = time.monotonic() + PATIENCE
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not threads()


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """By stock llama_cpp, one after the other."""
    with closing(llama_cpp.Llama(str(SHIPPED), n_ctx=1024, verbose=False)) as llm:
        return [llm.create_completion(p, repeat_penalty=1.0, **GREEDY)["choices"][0]["text"] for p in PROMPTS]


def test_answers_are_those_of_each_prompt_alone_also_when_two_threads_take_them(alone: list[str]) -> None:
    flash = {"what": "experts", "dram_budget": "1GiB"}
    many = llama_flash.complete_many(SHIPPED, PROMPTS, parallel=8, n_ctx=512, flash_offload=flash, **GREEDY)
    with many, ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(lambda _: list(many), range(2)))
    assert all(taken), "one thread got all of them"
    found = {one.index: one for part in taken for one in part}
    assert len(found) == sum(map(len, taken)) == len(PROMPTS)
    assert [found[i].text for i in range(len(PROMPTS))] == alone
    assert all(one.error is None and one.response["usage"]["completion_tokens"] <= 24 for one in found.values())
    assert gone()


def test_prompts_are_taken_as_they_are_needed_and_an_early_end_frees_the_memory() -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(len(taken))
            yield PROMPTS[len(taken) % len(PROMPTS)]

    many = llama_flash.complete_many(SHIPPED, endless(), parallel=2, n_ctx=512, max_tokens=8)
    for n in range(1, 7):
        assert next(many).error is None
        assert len(taken) < n + 4
    before = psutil.Process().memory_info().rss
    many.close()
    many.close()
    assert gone() and psutil.Process().memory_info().rss < before - 10 * MIB
    assert list(many) == []


def test_an_iterator_that_nobody_has_any_more_and_prompts_that_raise_end_the_work() -> None:
    many = llama_flash.complete_many(SHIPPED, iter(PROMPTS), parallel=2, n_ctx=512, max_tokens=300)
    with pytest.raises(llama_flash.FlashError, match="a server runs in this process already"):
        llama_flash.complete_many(SHIPPED, PROMPTS)
    next(many)
    del many
    gc.collect()
    assert gone()

    def broken() -> Iterator[str]:
        yield from PROMPTS[:3]
        raise KeyError("the fourth")

    with pytest.raises(KeyError, match="the fourth"):
        list(llama_flash.complete_many(SHIPPED, broken(), parallel=2, n_ctx=512, **GREEDY))
    assert gone()


def test_what_one_prompt_does_wrong_is_its_own_error_and_chats_answer() -> None:
    chat = [{"role": "user", "content": "import os"}]
    prompts = ["x = 1\n" * 400, chat, PROMPTS[0]]
    long, answer, text = sorted(
        llama_flash.complete_many(SHIPPED, prompts, parallel=2, n_ctx=256, **GREEDY), key=lambda one: one.index
    )
    assert long.error is not None and "context" in long.error and long.text == ""
    assert answer.text and answer.response["object"] == "chat.completion"
    assert text.text and text.error is None
    with pytest.raises(TypeError, match="prompts: number 1 is neither text nor a list of messages: 7"):
        list(llama_flash.complete_many(SHIPPED, [PROMPTS[0], 7], parallel=1, n_ctx=256, **GREEDY))  # type: ignore[list-item]
    assert gone()


def test_a_read_that_fails_is_an_error_of_those_who_needed_it(tmp_path: Path, alone: list[str]) -> None:
    model = Path(shutil.copy(SHIPPED, tmp_path))
    flash = {"what": "experts", "dram_budget": "1GiB"}
    # taken as they are needed: the only one of another text not before the file is cut
    prompts = (PROMPTS[i] for i in (*[0] * 8, 2, *[0] * 12))
    with llama_flash.complete_many(model, prompts, parallel=1, n_ctx=512, flash_offload=flash, **GREEDY) as many:
        assert [next(many).text for _ in range(2)] == [alone[0]] * 2
        with cut_short(model):
            failed = next(one for one in many if one.index == 8)
        rest = list(many)
    assert failed.error is not None and str(model) in failed.error and not failed.text
    assert max(rest, key=lambda one: one.index).text == alone[0], "what was read before is read again"


def test_an_open_llama_computes_one_after_the_other_and_stays_open(alone: list[str]) -> None:
    with closing(llama_cpp.Llama(str(SHIPPED), n_ctx=512, flash_offload=True, verbose=False)) as llm:
        how = {**GREEDY, "repeat_penalty": 1.0}
        with ThreadPoolExecutor(2) as pool:
            many = llama_flash.complete_many(llm, iter(PROMPTS), **how)
            found = [one for part in pool.map(lambda _: list(many), range(2)) for one in part]
        assert {one.index: one.text for one in found} == dict(enumerate(alone))
        (error,) = llama_flash.complete_many(llm, ["x = 1\n" * 1000], **how)
        assert error.error is not None and "context window" in error.error
        with pytest.raises(ValueError, match="an open Llama computes one answer at a time: give its model's path"):
            llama_flash.complete_many(llm, PROMPTS, parallel=2)
        many = llama_flash.complete_many(llm, PROMPTS, **how)
        assert next(many).text == alone[0]
        many.close()
        assert list(many) == [] and llm("import os", max_tokens=2)["choices"]


def test_no_limit_for_strangers_meets_a_program_that_asks_for_much_at_once() -> None:
    many = llama_flash.complete_many(SHIPPED, ["import os\n"] * 200, parallel=150, n_ctx=256, max_tokens=1)
    assert [one.error for one in many] == [None] * 200


def test_the_engines_log_is_the_programs_again(capfd: pytest.CaptureFixture[str]) -> None:
    list(llama_flash.complete_many(SHIPPED, ["import os"], parallel=1, max_tokens=1))
    assert "llama_model_loader" not in capfd.readouterr().err
    with closing(llama_cpp.Llama(str(SHIPPED), n_ctx=64, verbose=True)):
        assert "llama_model_loader" in capfd.readouterr().err


def test_a_program_that_ends_in_the_middle_ends() -> None:
    code = (
        "import sys, llama_flash; many = llama_flash.complete_many(sys.argv[1], iter(lambda: 'import os', None), "
        "parallel=2, n_ctx=256, max_tokens=200); print(next(many).index)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SHIPPED], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0 and done.stdout.strip().isdecimal(), done.stderr
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parallel": 0}, "parallel: 0 is neither 'auto' nor"),
        ({"parallel": True}, "parallel: True"),
        ({"stream": True}, "stream"),
        ({"flash_offload": False}, "flash_offload"),
        ({"flash_offload": {"dram_budget": "much"}}, "dram_budget"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_a_load(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        llama_flash.complete_many(SHIPPED, PROMPTS, **options)  # type: ignore[arg-type]
    assert not threads()


def test_what_cannot_be_loaded_says_why_and_the_next_one_can(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.gguf"):
        llama_flash.complete_many(tmp_path / "none.gguf", PROMPTS)
    with pytest.raises(llama_flash.FlashBudgetError):
        llama_flash.complete_many(SHIPPED, PROMPTS, parallel=2, n_ctx=512, flash_offload={"dram_budget": "1MiB"})
    assert gone()
    (one,) = llama_flash.complete_many(SHIPPED, PROMPTS[:1], parallel=1, n_ctx=512, **GREEDY)
    assert one.index == 0 and one.text


def test_as_many_at_once_as_bring_the_most_tokens() -> None:
    held = held_by_process()
    plenty = {"dram_budget": held + 2000 * MIB, "what": "experts"}
    assert parallel_for(SHIPPED, plenty, 512) == MOST == 32, "there is room for all experts and for all caches"
    assert parallel_for(SHIPPED, plenty, 512, n_requests=3) == 4 and parallel_for(SHIPPED, plenty, 512, 1) == 1
    little = {"dram_budget": held + 150 * MIB, "what": "experts"}
    short, long = parallel_for(SHIPPED, little, 512), parallel_for(SHIPPED, little, 4096)
    assert long < short, "the caches of long contexts take the memory of experts"
    assert os.environ.get("LLAMA_FLASH_CACHE")
