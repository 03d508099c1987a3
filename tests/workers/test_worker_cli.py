"""`llama-flash plan`, `run`, `chat` and `bench` with workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from workers import MOE, WorkerProcess, workers_of

from llama_flash import FlashOffload, plan


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    with workers_of(MOE, tmp_path_factory.mktemp("workers")) as workers:
        yield workers


def named(two: list[WorkerProcess]) -> str:
    return ",".join(worker.endpoint for worker in two)


def flash(*arguments: str, said: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_flash", *arguments]
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_plan_says_what_lies_where_and_loads_nothing(two: list[WorkerProcess]) -> None:
    made = json.loads(flash("plan", str(MOE), "--workers", named(two), "--json").stdout)
    assert [worker["worker"] for worker in made["workers"]] == [worker.endpoint for worker in two]
    layers = [layer for worker in made["workers"] for layer in range(worker["layers"][0], worker["layers"][1] + 1)]
    assert layers == [0, 1, 2]
    for worker in made["workers"]:
        assert worker["budget"] == 160 << 20
        used = worker["held"] + worker["reserve"] + worker["resident"] + worker["kv"] + worker["compute"]
        assert used <= worker["budget"]
        assert worker["bytes_up_per_token"] > worker["bytes_down_per_token"] > 1024
    text = flash("plan", str(MOE), "--what", "experts", "--workers", named(two)).stdout
    assert "weights on flash" in text and two[0].endpoint in text and "sent to it for a token" in text


def test_run_gives_the_same_text_and_tells_what_workers_read(two: list[WorkerProcess]) -> None:
    arguments = ("run", str(MOE), "-n", "24", "--temp", "0", "--json")
    alone = json.loads(flash(*arguments, "--no-flash").stdout)
    divided = json.loads(flash(*arguments, "--what", "experts", "--workers", named(two)).stdout)
    assert divided["text"] == alone["text"] and divided["text"]
    assert all(worker["counters"]["bytes_read"] > 0 for worker in divided["workers"])
    shown = flash(*arguments[:-1], "--workers", named(two)).stderr
    assert "held by the process" in shown and two[1].endpoint in shown


def test_chat_shows_them_when_it_is_asked(two: list[WorkerProcess]) -> None:
    done = flash("chat", str(MOE), "-n", "4", "--workers", named(two), said="import os\n/stats\n")
    assert two[0].endpoint in done.stderr and "held by the process" in done.stderr


@pytest.mark.parametrize("command", ["run", "plan", "chat"])
def test_a_worker_that_is_not_there_is_one_line(command: str) -> None:
    done = flash(command, str(MOE), "--workers", "127.0.0.1:9", code=1)
    assert "worker 127.0.0.1:9 cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_what_makes_no_sense_is_refused() -> None:
    for workers in (
        ["nonsense"],
        ["127.0.0.1:1", "127.0.0.1:1"],
        ["127.0.0.1:0"],
        [f"127.0.0.1:{i}" for i in range(1, 18)],
    ):
        with pytest.raises(ValueError, match="workers: "):
            FlashOffload(workers=workers)
    with pytest.raises(ValueError, match="worker_timeout"):
        FlashOffload(worker_timeout=0)
    with pytest.raises(ValueError, match="prompt_cache"):
        FlashOffload(workers=["127.0.0.1:1"], prompt_cache=True)
    with pytest.raises(ValueError, match="plan --workers"):
        plan(MOE, flash_offload=FlashOffload(workers=["127.0.0.1:1"]))


def test_bench_measures_workers_beside_one_machine(two: list[WorkerProcess]) -> None:
    arguments = ("--workers", named(two), "--dram-budget", "auto", "--no-resident", "--repeats", "2", "-n", "8")
    measured = json.loads(flash("bench", str(MOE), *arguments, "--json").stdout)["rows"]
    assert [row["kind"] for row in measured] == ["flash", "workers"] and not any(row["error"] for row in measured)
    over = measured[1]["runs"]
    assert [[one["worker"] for one in run["workers"]] for run in over] == [[w.endpoint for w in two]] * 2
    assert measured[1]["tokens_per_second"]["median"] > 0
    assert {run["text"] for run in over} == {measured[0]["runs"][0]["text"]}
