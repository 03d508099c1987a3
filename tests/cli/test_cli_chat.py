"""`llama-flash chat`, on a real terminal and through pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import pytest
from gguf import GGUFValueType
from terminal import Terminal

from gguf_tools.source import KeyValue, open_gguf
from gguf_tools.stream import copied, write_gguf

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant: {% endif %}"
)
CHAT = [sys.executable, "-m", "llama_flash", "chat"]


@pytest.fixture(scope="module")
def templated(model_folder: Path) -> Path:
    """The shipped model with a chat template."""
    source = open_gguf(SHIPPED)
    out = model_folder / "chat.gguf"
    values = {**source.values, "tokenizer.chat_template": KeyValue(TEMPLATE, GGUFValueType.STRING)}
    write_gguf(out, values, [copied(tensor) for tensor in source.tensors.values()])
    return out


def chat(lines: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [*CHAT, *map(str, options), "--temp", "0"]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=240)


@contextmanager
def terminal(*options: object) -> Iterator[Terminal]:
    with Terminal([*CHAT, *map(str, options)]) as opened:
        opened.wait_for("> $")
        yield opened


def test_without_a_terminal_lines_are_answered_and_nothing_else_is_said(templated: Path) -> None:
    result = chat("import os\nimport sys\n", templated, "-n", 8)
    assert result.returncode == 0, result.stderr
    assert "tokens/s" not in result.stdout + result.stderr and "/help" not in result.stderr
    assert len(result.stdout.splitlines()) >= 2
    again = json.loads(chat("import os\nimport sys\n", templated, "-n", 8, "--json").stdout)
    assert again["chat_template"] is True
    assert result.stdout == "".join(turn["assistant"] + "\n" for turn in again["turns"])
    first, second = again["turns"]
    assert (first["user"], second["user"]) == ("import os", "import sys")
    assert first["tokens_per_second"] > 0 and first["decode"]["tokens"] == 7
    assert again["flash"]["decode"]["tokens"] == 14


def test_an_answer_depends_on_what_was_said_before_until_it_is_cleared(templated: Path) -> None:
    lines = "import os\nclass A:\n/clear\nclass A:\n/system for key in mapping: print(key)\n/clear\nclass A:\n"
    turns = json.loads(chat(lines, templated, "-n", 24, "--json").stdout)["turns"]
    told = json.loads(
        chat("class A:\n", templated, "-n", 24, "--json", "--system", "for key in mapping: print(key)").stdout
    )["turns"]
    alone = json.loads(chat("class A:\n", templated, "-n", 24, "--json").stdout)["turns"]
    answers = [turn["assistant"] for turn in turns]
    assert answers[2] == alone[0]["assistant"] != answers[1]
    assert answers[3] == told[0]["assistant"] != answers[2]


def test_a_model_without_template_continues_what_is_typed() -> None:
    result = chat("def read_lines(path):\\\n    with\n", "-n", 6)
    assert result.returncode == 0
    assert "no chat template" in result.stderr
    free = subprocess.run(
        [sys.executable, "-m", "llama_flash", "run", "-p", "def read_lines(path):\n    with", "-n", "6", "--temp", "0"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert free.stdout == "def read_lines(path):\n    with" + result.stdout


def test_commands_that_are_wrong_are_one_line_and_the_chat_goes_on(templated: Path) -> None:
    lines = "/nothing\n/budget\n/budget 1MiB\n/budget much\n//usr\n/quit\nnot read\n"
    result = chat(lines, templated, "-n", 2, "--json", "--what", "experts", "--dram-budget", "200MiB")
    assert result.returncode == 0, result.stderr
    for said in ("/nothing is not known", "/budget SIZE", "The smallest that works is", "not a size: 'much'"):
        assert said in result.stderr
    assert "Traceback" not in result.stderr
    (turn,) = json.loads(result.stdout)["turns"]
    assert turn["user"] == "/usr"


def test_the_budget_can_be_changed(templated: Path) -> None:
    lines = "import os\n/budget 160MiB\nimport sys\n"
    result = chat(lines, templated, "-n", 4, "--json", "--what", "experts", "--dram-budget", "200MiB")
    assert "budget 160 MiB (dram_budget)" in result.stderr
    assert json.loads(result.stdout)["flash"]["budget"] == 160 << 20


def test_what_the_context_has_no_room_for_is_forgotten(templated: Path) -> None:
    result = chat("import os\n" * 6, templated, "-n", 60, "-c", 250)
    assert result.returncode == 0, result.stderr
    assert "exchanges are forgotten" in result.stderr
    result = chat("import os " * 200 + "\nimport os\n", templated, "-n", 4, "-c", 200)
    assert "longer than the context of 256 tokens" in result.stderr
    assert result.stdout.strip(), "the next question is answered"


def test_under_a_cap_it_is_the_same_conversation(templated: Path) -> None:
    free, capped = (
        json.loads(chat("import os\n", templated, "-n", 16, "--json", *cap).stdout) for cap in ((), ("--cap", "50%"))
    )
    assert capped["turns"][0]["assistant"] == free["turns"][0]["assistant"]
    assert capped["flash"]["total"]["bytes_read"] > 0
    assert 0 < capped["cap"]["peak_bytes"] <= capped["cap"]["limit_bytes"]


def test_on_a_terminal_there_is_a_line_of_figures_below_the_answer(templated: Path) -> None:
    with terminal(templated, "-n", 64, "--dram-budget", "150MiB", "--what", "experts") as opened:
        opened.type("import os\n")
        end = opened.wait_for(r"[\d.]+ tokens/s, \S+ \S*B read per token, \d+% found in memory, .* of 150 MiB\n> $")
        opened.type("/stats\n")
        end = opened.wait_for(r"waited for reads.*\n(.*\n)*> $", after=end)
        opened.type("/help\n")
        end = opened.wait_for(r"/budget SIZE.*\n(.*\n)*> $", after=end)
        opened.type("\x1b[A\x1b[A\n")  # arrow up, twice: what was typed before comes again
        opened.wait_for(r"budget 150 MiB .*\n(.*\n)*> $", after=end)
        assert opened.leave("\x04") == 0
        assert opened.text.count("waited for reads") == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(templated: Path) -> None:
    with terminal(templated, "-c", 30000, "--temp", 0) as opened:
        opened.type("import os\n")
        end = opened.wait_for(r"[1-9][\d.]* tokens/s")
        opened.type("\x03")
        end = opened.wait_for(r"tokens/s.*\n> $", after=end)
        opened.type("half a line")
        end = opened.wait_for("half a line", after=end)  # has been taken: what has not is thrown away by a Ctrl-C
        opened.press("\x03", "Ctrl-D or /quit ends\n> $", after=end)
        opened.type("/quit\n")
        assert opened.end() == 0
        assert "Traceback" not in opened.text


def test_under_a_cap_the_terminal_is_the_chats(templated: Path) -> None:
    with terminal(templated, "-c", 30000, "--temp", 0, "--cap", "50%") as opened:
        opened.type("import os\n")
        end = opened.wait_for(r"[1-9][\d.]* tokens/s")
        opened.type("\x03")
        end = opened.wait_for(r"tokens/s.*\n> $", after=end)
        assert opened.leave("\x04") == 0
        assert "0 OOM kills, exit code 0" in opened.text


def test_what_a_terminal_would_obey_is_not_written_to_it() -> None:
    from llama_flash.cli.answer_view import _visible

    assert _visible("a\x1b[2Jb\rc\td") == "a�[2Jb�c\td"
