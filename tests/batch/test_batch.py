"""`llama-flash batch`: files of requests become files of answers, whatever happens in between."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from batches import BATCH, PATIENCE, answers, request, run, said, start, write
from caps import require_caps
from commands import in_this_process
from terminal import Terminal

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20
N = 8  # sequences
TEXTS = ("import os\n", "class Stack:\n", "def main(argv):\n", "    for line in file:\n")
LIMITS = ("-c", "512", "--model", SHIPPED)


def requests() -> list[dict[str, Any]]:
    """Greedy and with a seed, of several lengths, and chats."""
    lines = []
    for i in range(24):
        how = {"temperature": 0} if i % 2 else {"temperature": 0.9, "seed": i}
        text = TEXTS[i % len(TEXTS)] * (1 + i % 5) + f"# {i}\n"
        if i % 6 == 5:
            lines.append(
                request(f"r{i}", [{"role": "user", "content": text}], "/v1/chat/completions", max_tokens=24, **how)
            )
        else:
            lines.append(request(f"r{i}", text, max_tokens=16 + i, **how))
    return lines


BAD = ["no JSON", json.dumps(request("r0", "again")), '{"custom_id": "w", "url": "/v1/images", "body": {}}']
TOO_LONG = request("long", "x = 1\n" * 250, max_tokens=8)


@dataclass(frozen=True)
class Done:
    """A batch that was computed below a cap, with weights on flash."""

    source: Path
    target: Path
    err: str
    cap: int
    answers: dict[str, Any]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    require_caps()
    folder = tmp_path_factory.mktemp("batch")
    source = write(folder / "requests.jsonl", [*requests()[:3], *BAD, TOO_LONG, *requests()[3:]])
    target = folder / "answers.jsonl"
    line = run(source, "-o", target, *LIMITS, "--parallel", str(N), "--dram-budget", "32MiB", "--force", code=1)
    found = re.search(r"smallest that works is (\d+) MiB", line)
    assert found, line
    cap = (int(found[1]) + 8) * MIB
    err = run(source, "-o", target, *LIMITS, "--parallel", str(N), "--force", capped=cap, code=3)
    return Done(source, target, err, cap, said(target))


def test_a_batch_keeps_its_cap_with_weights_on_flash(done: Done) -> None:
    assert re.search(r"resident, .* on flash", done.err), done.err
    found = re.search(r"peak (\S+) MiB of (\S+) MiB .* (\d+) OOM kills", done.err)
    assert found, done.err
    assert float(found[1]) <= float(found[2]) and float(found[2]) * MIB <= done.cap + MIB and found[3] == "0"


def test_eight_at_once_get_what_each_gets_alone(done: Done, tmp_path: Path) -> None:
    alone = tmp_path / "alone.jsonl"
    run(write(tmp_path / "requests.jsonl", requests()), "-o", alone, *LIMITS, "--parallel", "1", capped=done.cap)
    want = said(alone)
    assert len(want) == len(requests()) and len({json.dumps(one) for one in want.values()}) > len(want) // 2
    assert {name: done.answers[name] for name in want} == want


def test_answers_have_openais_form_and_bad_lines_are_errors_in_their_place(done: Done) -> None:
    lines = answers(done.target)
    assert len(lines) == len(requests()) + len(BAD) + 1
    assert all(line.keys() == {"id", "custom_id", "response", "error"} for line in lines)
    assert len({line["id"] for line in lines}) == len(lines)
    bad = [line for line in lines if line["error"]]
    assert [(line["custom_id"], line["error"]["code"]) for line in bad] == [
        (None, "invalid_json_line"),
        ("r0", "duplicate_custom_id"),
        ("w", "invalid_url"),
    ]
    assert [line["error"]["message"].split(":")[0] for line in bad] == ["line 4", "line 5", "line 6"]
    (long,) = [line for line in lines if line["custom_id"] == "long"]
    assert long["response"]["status_code"] == 400 and "context" in long["response"]["body"]["error"]["message"]
    for line in lines:
        if line["response"] and line is not long:
            assert line["response"]["status_code"] == 200 and line["response"]["request_id"]
            assert line["response"]["body"]["choices"][0]["finish_reason"] in ("length", "stop")
    assert "31 of 31" not in done.err and f"{len(lines)} of {len(lines)} answers, 4 of them errors" in done.err


def test_a_second_run_has_nothing_to_do_and_errors_are_asked_again_if_wanted(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, here = Path(shutil.copy(done.target, tmp_path)), in_this_process(capsys, monkeypatch)
    second = here("batch", done.source, "-o", target, *LIMITS)
    assert second.returncode == 3 and "loading" not in second.stderr
    assert target.read_bytes() == done.target.read_bytes()
    source = write(tmp_path / "mended.jsonl", [*requests(), TOO_LONG])
    refused = here("batch", source, "-o", target, *LIMITS)
    assert refused.returncode == 1 and "--retry asks again what ended in an error" in refused.stderr
    run(source, "-o", target, "-c", "2048", "--model", SHIPPED, "--retry", "--parallel", "1")
    found = said(target)
    assert found.keys() == {line["custom_id"] for line in [*requests(), TOO_LONG]}
    assert all(found[line["custom_id"]] == done.answers[line["custom_id"]] for line in requests())


def test_what_has_changed_is_noticed(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = done.source.read_text().replace('"max_tokens": 23', '"max_tokens": 22')
    source = write(tmp_path / "changed.jsonl", changed.splitlines())
    before, here = done.target.read_bytes(), in_this_process(capsys, monkeypatch)
    (n,) = [i for i, line in enumerate(answers(done.target), 1) if line["custom_id"] == "r7"]
    arcee = SHIPPED.with_name("stdlib-arcee-q8_0.gguf")
    for arguments, says in (
        ((source, *LIMITS), f"1 of its answers are to other requests than the input has now, as that in line {n} (r7)"),
        ((done.source, *LIMITS, "--seed", "2"), "are of another seed or predictor"),
        ((done.source, "--model", arcee), "are of another model"),
    ):
        refused = here("batch", *arguments, "-o", done.target)
        assert refused.returncode == 1 and says in refused.stderr and "--force" in refused.stderr
    refused = here("batch", done.source, "-o", done.source, *LIMITS)
    assert refused.returncode == 1 and "cannot go to the file of requests" in refused.stderr
    assert done.target.read_bytes() == before


def endless(folder: Path, n: int = 16) -> Path:
    return write(
        folder / "requests.jsonl",
        [request(f"r{i}", f"{TEXTS[i % 4]}# {i}\n", max_tokens=48, temperature=0, ignore_eos=True) for i in range(n)],
    )


def wait_for_lines(process: subprocess.Popen[str], target: Path, n: int) -> None:
    end = time.monotonic() + PATIENCE
    while not target.exists() or target.read_bytes().count(b"\n") < n:
        assert not process.poll(), process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_a_batch_that_was_ended_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    source, target = endless(tmp_path), tmp_path / "answers.jsonl"
    arguments = (source, "-o", target, *LIMITS, "--parallel", "2")
    for _ in range(5):  # unless the signal came when it had ended by itself
        target.unlink(missing_ok=True)
        process = start(*arguments)
        wait_for_lines(process, target, 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        if process.returncode != 0:
            break
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err
    written = target.read_bytes()
    first = answers(target)
    assert 2 <= len(first) < 16 and all(line["response"]["status_code"] == 200 for line in first)
    if number == signal.SIGKILL:  # in the middle of a line, too
        with target.open("ab") as file:
            file.write(written.splitlines(keepends=True)[0][:200])
    else:
        assert f"{16 - len(first)} are missing: the same command goes on from here" in err and "Traceback" not in err
    err = run(*arguments)
    assert f"{len(first)} of 16 answers are there" in err
    assert target.read_bytes().startswith(written)
    lines = answers(target)
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{i}" for i in range(16))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes. Root only."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    options = f"size={size},mode=700".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) != 0:
        pytest.skip(f"mounting: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        assert libc.umount2(os.fsencode(folder), 0) == 0


def test_a_full_disk_loses_nothing_and_the_batch_goes_on_when_there_is_room(tmp_path: Path) -> None:
    source = endless(tmp_path)
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        filler = disk / "filler"
        filler.write_bytes(b"x" * (56 << 10))  # two pages are left
        target = disk / "answers.jsonl"
        err = run(source, "-o", target, *LIMITS, "--parallel", "4", code=1)
        found = re.search(
            r"No space left on device; the (\d+) answers before are kept: make room, then run the same", err
        )
        assert found, err
        written, first = target.read_bytes(), answers(target)
        assert 0 < len(first) == int(found[1]) < 16 and len(written) <= 8 << 10
        filler.unlink()
        run(source, "-o", target, *LIMITS, "--parallel", "4")
        assert target.read_bytes().startswith(written) and len(said(target)) == 16


def test_embeddings_are_those_of_llama_cpp(tmp_path: Path) -> None:
    texts = ["import os\n", "class Stack:\n    pass\n", "x = 1\n" * 150]
    lines = [request(f"e{i}", text, "/v1/embeddings") for i, text in enumerate(texts)]
    lines += [request("several", texts, "/v1/embeddings"), request("text", TEXTS[0], max_tokens=4)]
    target = tmp_path / "answers.jsonl"
    err = run(write(tmp_path / "requests.jsonl", lines), "-o", target, "--model", SHIPPED, "--parallel", "4")
    assert "for 4 at a time" in err and "for 1 at a time, 1024 tokens each" in err
    assert said(target)["text"][0]["text"]
    llm = llama_cpp.Llama(
        str(SHIPPED),
        n_ctx=2048,
        n_batch=2048,
        n_ubatch=2048,
        embedding=True,
        verbose=False,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    )
    for i, text in enumerate(texts):
        want = np.array(llm.embed(text, normalize=True), dtype=np.float32)
        got = np.array(said(target)[f"e{i}"][0]["embedding"], dtype=np.float32)
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert said(target)["several"][i]["embedding"] == said(target)[f"e{i}"][0]["embedding"]
    llm.close()


def test_requests_come_from_standard_input_and_figures_as_json(tmp_path: Path) -> None:
    source, target = endless(tmp_path, 2), tmp_path / "answers.jsonl"
    command = [*BATCH, "-", "-o", target, *LIMITS, "--json"]
    done = subprocess.run(
        command, input=source.read_text(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["requests"], told["answered"], told["errors"], told["completion_tokens"]) == (2, 2, 0, 96)
    assert told["parallel"] == 2 and told["n_ctx"] == 512 and len(answers(target)) == 2


def test_what_makes_no_sense_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = endless(tmp_path), tmp_path / "answers.jsonl"
    empty, here = write(tmp_path / "empty.jsonl", []), in_this_process(capsys, monkeypatch)
    for arguments, says in (
        ((source, "--parallel", "many"), "--parallel: 'many' is neither auto nor a whole number"),
        ((source, "--dram-budget", "much"), "dram_budget"),
        ((source, "--model", "none.gguf"), "no such model: none.gguf"),
        ((tmp_path / "none.jsonl",), "none.jsonl"),
        ((empty,), "there are no requests in it"),
    ):
        refused = here("batch", *arguments, "-o", target)
        assert refused.returncode == 1 and says in refused.stderr and refused.stderr.count("\n") == 1
    assert not target.exists()


def test_lines_that_are_all_wrong_need_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "requests.jsonl", BAD[:1] * 3), tmp_path / "answers.jsonl"
    result = in_this_process(capsys, monkeypatch)("batch", source, "-o", target)
    assert result.returncode == 3 and "loading" not in result.stderr and len(answers(target)) == 3


def test_a_terminal_shows_how_far_it_is_how_fast_and_what_is_left(tmp_path: Path) -> None:
    source, target = endless(tmp_path, 12), tmp_path / "answers.jsonl"
    with Terminal([*BATCH, source, "-o", target, "--model", SHIPPED, "--parallel", "2"], width=110) as terminal:
        terminal.wait_for(r"[1-9]/12 \d+\.\d+ answers/s, \d+\.\d tokens/s \d:\d\d:\d\d")
        terminal.wait_for("12 of 12 answers; ")
        assert terminal.process.wait(PATIENCE) == 0
