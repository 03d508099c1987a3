"""A model that nobody here made, SmolLM2-135M-Instruct: every way in answers with flash offload what stock answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import (
    LEAST,
    MOST,
    QUARTER,
    Logits,
    Model,
    assert_read_from_flash,
    assert_same_logits,
    logits_of,
    open_flash,
    open_resident,
)
from repository import ROOT
from serving import KEY, serving, smallest_budget

import llama_flash

MIB = 1 << 20
PROMPT, DECODED = 40, 32  # tokens, at most
TEXT = (
    "The lighthouse keeper climbed the stairs once more. The lamp had to be lit before dusk, whatever the weather, "
    "and tonight the wind came from the north. He thought of the ships out there, of the men who would look for his "
    "light, and of the letter that lay unopened on the table. When the first of them answered, he sat down at last."
)
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
ANSWER = 24  # tokens at most
CHAT_OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 2, "verbose": False}


@pytest.fixture(scope="module")
def text(real_model: Path) -> tuple[list[int], list[int], Logits]:
    """Tokens of a prompt, tokens that are decoded one by one, and the logits of all of them without flash offload."""
    with open_resident(real_model) as llm:
        tokens = llm.tokenize(TEXT.encode())[: PROMPT + DECODED]
        prompt, decoded = tokens[:PROMPT], tokens[PROMPT:]
        assert len(prompt + decoded) >= 64
        expected = logits_of(llm, prompt, decoded)
    return prompt, decoded, expected


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int


@pytest.fixture(scope="module")
def answer(real_model: Path) -> Answer:
    """Stock llama.cpp's."""
    with Model(str(real_model), **CHAT_OPTIONS) as llm:
        return answer_of(llm)


def answer_of(llm: Model) -> Answer:
    done: Any = llm.create_chat_completion(QUESTION, max_tokens=ANSWER, temperature=0)
    return Answer(done["choices"][0]["message"]["content"], done["usage"]["prompt_tokens"])


def tight(path: Path, above: int, **options: Any) -> int:
    """A budget `above` bytes over the smallest that works in this process."""
    of_memory = {name: value for name, value in options.items() if not name.startswith(("n_threads", "verbose"))}
    plan = llama_flash.plan(path, flash_offload={"follow": False}, **of_memory)
    assert plan.smallest > 0
    return plan.smallest + above


def flash(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_flash", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=290, env={**os.environ, "COLUMNS": "160"}
    )


def report(*arguments: object, stdin: str | None = None) -> dict[str, Any]:
    result = flash(*arguments, "--json", stdin=stdin)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def little(real_model: Path) -> str:
    """A budget that a command with a context of 512 keeps only with weights on flash."""
    return str(report("plan", real_model, "-c", 512)["smallest"] + 12 * MIB)


@pytest.mark.parametrize(
    ("what", "share"),
    [
        ("all", QUARTER),
        *[
            pytest.param(what, share, marks=pytest.mark.full)
            for what, share in (("ffn", LEAST), ("ffn", QUARTER), ("ffn", MOST), ("all", LEAST), ("all", MOST))
        ],
    ],
)
def test_logits_are_bit_identical(
    what: str, share: float, real_model: Path, text: tuple[list[int], list[int], Logits]
) -> None:
    prompt, decoded, expected = text
    with open_flash(real_model, what=what, share=share) as llm:
        assert_same_logits(logits_of(llm, prompt, decoded), expected, len(expected))
        assert_read_from_flash(llm, moe=False)


@pytest.mark.parametrize("above", [4 * MIB, pytest.param(16 * MIB, marks=pytest.mark.full)])
def test_logits_are_bit_identical_with_what_the_budget_chooses(
    above: int, real_model: Path, text: tuple[list[int], list[int], Logits]
) -> None:
    prompt, decoded, expected = text
    options: dict[str, Any] = {
        "n_ctx": 640,
        "n_batch": 64,
        "n_ubatch": 64,
        "n_threads": 2,
        "n_threads_batch": 2,
        "logits_all": True,
        "verbose": False,
    }
    budget = tight(real_model, above, **options)
    with Model(str(real_model), flash_offload={"dram_budget": budget, "follow": False}, **options) as llm:
        assert_same_logits(logits_of(llm, prompt, decoded), expected, len(expected))
        assert llm.flash is not None and llm.flash.plan.mode == "flash"
        assert llm.flash.stats().decode.bytes_read > 0


def test_it_answers_in_its_own_chat_template(real_model: Path, answer: Answer) -> None:
    assert "Paris" in answer.text
    budget = tight(real_model, 8 * MIB, **CHAT_OPTIONS)
    with Model(str(real_model), flash_offload={"dram_budget": budget}, **CHAT_OPTIONS) as llm:
        assert "<|im_start|>" in llm.metadata["tokenizer.chat_template"]
        assert answer_of(llm) == answer
        # a system message that nobody gave is the template's own
        rendered = "<|im_start|>user\n" + QUESTION[0]["content"] + "<|im_end|>\n<|im_start|>assistant\n"
        assert answer.prompt_tokens > len(llm.tokenize(rendered.encode(), special=True)) + 10
        assert llm.flash is not None and llm.flash.stats().decode.bytes_read > 0


def test_the_server_answers_openais_client_the_same(real_model: Path, answer: Answer, tmp_path: Path) -> None:
    budget = smallest_budget(real_model, "-c", "512") + 12 * MIB
    arguments = [real_model, "-c", "512", "--api-key", KEY, "--dram-budget", str(budget)]
    with serving(arguments, tmp_path / "server.log") as server:
        client = server.client()
        done = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=ANSWER, temperature=0)
        assert Answer(str(done.choices[0].message.content), done.usage.prompt_tokens) == answer
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(
                model="any", messages=QUESTION, max_tokens=ANSWER, temperature=0, stream=True
            )
        ]
        assert "".join(pieces) == answer.text and len(pieces) > 4
        assert server.metrics()[f"llama_flash_read_bytes_total model={real_model.stem}"] > 0


def test_the_command_chat_answers_the_same(real_model: Path, answer: Answer, little: str) -> None:
    options = ("-c", 512, "--temp", 0, "-n", ANSWER, "--dram-budget", little)
    found = report("chat", real_model, *options, stdin=QUESTION[0]["content"] + "\n")
    assert found["chat_template"] is True
    assert [turn["assistant"].strip() for turn in found["turns"]] == [answer.text.strip()]
    assert found["flash"]["decode"]["bytes_read"] > 0


@pytest.mark.full
def test_the_command_run_says_the_same_with_flash_and_without(real_model: Path, little: str) -> None:
    options = (real_model, "-p", TEXT, "-n", 16, "--temp", 0, "-c", 512)
    expected = report("run", *options, "--no-flash")
    found = report("run", *options, "--dram-budget", little)
    assert found["text"] == expected["text"] and len(found["text"]) > 16
    assert found["flash"]["decode"]["bytes_read"] > 0


def test_plan_and_inspect_say_what_the_file_holds(real_model: Path, little: str) -> None:
    listing = report("inspect", real_model)
    assert listing["architecture"] == "llama" and listing["flash"] is None
    assert {name: total["tensors"] for name, total in listing["by_type"].items()} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert listing["file_bytes"] == real_model.stat().st_size == 98_362_432
    plan = report("plan", real_model, "--dram-budget", little, "-c", 512)
    assert plan["mode"] == "flash" and 0 < plan["smallest"] <= int(little)
    weights = plan["resident_weights"] + plan["flash_weights"]
    assert weights == listing["data_bytes"]


@pytest.mark.full
def test_doctor_finds_the_model_usable(real_model: Path) -> None:
    found = report("doctor", real_model)
    assert found["usable"] is True
    assert {f["check"]: f for f in found["findings"]}["model"]["found"].startswith("llama, 93.8 MiB")


@pytest.mark.full
def test_bench_says_the_same_text_at_every_budget(real_model: Path, little: str) -> None:
    options = ("--dram-budget", little, "--dram-budget", "2GiB", "--repeats", 1, "-n", 12, "-c", 512)
    found = report("bench", real_model, *options)
    assert len(found["rows"]) >= 2 and not [row for row in found["rows"] if row["error"]]
    assert len({run["text"] for row in found["rows"] for run in row["runs"]}) == 1


def test_a_damaged_copy_is_taken_anew_and_what_cannot_be_had_is_one_line(real_model: Path, tmp_path: Path) -> None:
    def take(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "ci/bench/realmodel.py"), "--folder", str(folder)]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=290, check=False
        )

    nothing = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    damaged = tmp_path / real_model.name
    damaged.write_bytes(real_model.read_bytes()[:-1])
    refused = take(tmp_path, **nothing)
    assert refused.returncode == 1 and refused.stdout == ""
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in refused.stderr
    assert real_model.name in errors[0] and "No matching distribution" in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{real_model.name}.lock", real_model.name]
    damaged.unlink()
    shutil.copyfile(real_model, damaged)
    assert take(tmp_path, **nothing).stdout.strip() == str(damaged), "a sound one needs no index"
