"""Batches and many prompts over workers: the answers of one machine; a lost worker ends them, and they go on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batches import PATIENCE
from workers import MOE, WorkerProcess, workers_of

from llama_flash import FlashOffload, FlashWorkerError, complete_many

PROMPTS = ("import os\n", "class Stack:\n", "def main(argv):\n", "    for line in file:\n")
SAMPLING = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    with workers_of(MOE, tmp_path_factory.mktemp("workers")) as workers:
        yield workers


def offload(workers: list[WorkerProcess], **options: Any) -> FlashOffload:
    return FlashOffload(what="all", workers=[worker.endpoint for worker in workers], **options)


def texts(answers: Any) -> list[str]:
    found = sorted(answers, key=lambda answer: answer.index)
    assert not any(answer.error for answer in found)
    return [answer.text for answer in found]


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """Of one machine."""
    return texts(complete_many(MOE, PROMPTS, parallel=2, n_ctx=512, **SAMPLING))


def test_many_prompts_have_the_answers_of_one_machine(two: list[WorkerProcess], alone: list[str]) -> None:
    for parallel in ("auto", 1, 3):
        many = complete_many(MOE, PROMPTS, parallel=parallel, n_ctx=512, flash_offload=offload(two), **SAMPLING)
        assert texts(many) == alone


def test_a_lost_worker_ends_many_prompts_with_its_name(two: list[WorkerProcess], alone: list[str]) -> None:
    endless = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
    many = complete_many(MOE, PROMPTS * 50, parallel=4, n_ctx=512, flash_offload=offload(two), **endless)
    assert next(many).error is None
    os.kill(two[0].guest(), signal.SIGKILL)
    with pytest.raises(FlashWorkerError) as caught:
        for answer in many:
            assert answer.error is None  # those that were there before
    assert caught.value.host == two[0].endpoint
    assert list(many) == []
    again = complete_many(MOE, PROMPTS, parallel=4, n_ctx=512, flash_offload=offload(two), **SAMPLING)
    assert texts(again) == alone


def test_many_prompts_without_their_workers(two: list[WorkerProcess]) -> None:
    with pytest.raises(FlashWorkerError, match="cannot be reached"):
        complete_many(MOE, PROMPTS, flash_offload=FlashOffload(workers="127.0.0.1:1"))


def _batch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_flash", "batch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def _answers(path: Path) -> dict[str, Any]:
    return {line["custom_id"]: line["response"] for line in map(json.loads, path.read_text().splitlines())}


def test_a_batch_that_has_lost_a_worker_goes_on_with_the_same_command(two: list[WorkerProcess], tmp_path: Path) -> None:
    requests, target, expected = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl", tmp_path / "alone.jsonl"
    n = 36
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": PROMPTS[i % 4] + str(i), "max_tokens": 60, "temperature": 0, "ignore_eos": True},
        }
        for i in range(n)
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = ",".join(worker.endpoint for worker in two)
    command = [requests, "-o", target, "--model", MOE, "-c", 512, "--parallel", 4, "--workers", named]
    arguments = [sys.executable, "-m", "llama_flash", "batch", *map(str, command)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not target.exists() or len(target.read_text().splitlines()) < 5:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.kill(two[1].guest(), signal.SIGKILL)
        said = process.stderr.read()
        assert process.wait(PATIENCE) == 1
    assert f"worker {two[1].endpoint} is lost" in said and "the same command goes on from here" in said
    assert 5 <= len(_answers(target)) < n and all(each["status_code"] == 200 for each in _answers(target).values())
    done = _batch(*command)
    assert done.returncode == 0, done.stderr
    assert _batch(requests, "-o", expected, "--model", MOE, "-c", 512, "--parallel", 4).returncode == 0
    told, want = (_answers(path) for path in (target, expected))
    assert {i: one["body"]["choices"] for i, one in told.items()} == {i: o["body"]["choices"] for i, o in want.items()}
