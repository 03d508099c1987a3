"""Every command in the documentation is run; every link, page and name in it exists.

A fenced block of README.md or docs/**/*.md is `sh`, `python` or `yaml` (a GitHub workflow) and is run, or `text`, which
is no command. A page's blocks run in their order, in a folder of the page's own that holds what they name: MODEL.gguf
is a small model, HF_DIR a small checkpoint. Python blocks of a page share one interpreter. A comment above a block may
say otherwise:

    <!-- not run: WHY -->         counted in NOT_RUN
    <!-- in full: WHY -->         by `make test-full` only
    <!-- stays running: WHY -->   in the background, until the page's end
    <!-- file: NAME -->           what the block holds, for the blocks that follow
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import yaml
from gguf import GGMLQuantizationType
from repository import ROOT
from sparse_models import library_text

import llama_flash.cli  # noqa: F401  # fills the table of commands
from gguf_tools.convert import convert
from llama_flash.cli.later import Group

SHIPPED = ROOT / "python/llama_flash/models"
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
LINKED = [
    *PAGES,
    *(ROOT / name for name in ("CHANGELOG.md", "patches/README.md", "python/llama_flash/models/README.md")),
    *(ROOT / name for name in ("ci/README.md", "tests/README.md", "plugin/src/README.md")),
]
CODE = ("plugin", "python", "gguf_tools", "ci", "tests", "Makefile", "CHANGELOG.md", "README.md")  # that names pages
NOT_RUN = 32  # blocks that no test runs (21: examples of help): raise it only with a reason beside the block
NOT_YET: set[str] = set()  # commands that pages name before they are there
RUN, KINDS = ("sh", "python", "yaml"), ("not run", "in full", "stays running", "file")
SECONDS = 600.0  # that a block may take
PORT = "8080"  # in the pages; replaced by a free one

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- ([a-z ]+): (.+) -->\n\Z")
# not: usage, as `llama-flash run [OPTIONS]`
COMMAND = re.compile(r"^(?:\$ )?(?:llama-flash|python3?|make|pip|git|curl) (?!.*\[OPTIONS\])", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    mark: str = ""  # one of KINDS
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text, 0, match.start())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, *match.groups(), *(mark.groups() if mark else ())))
    return tuple(found)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def to_run(page: Path, *, in_full: bool) -> list[Block]:
    marks = {"", "stays running", "file"} | ({"in full"} if in_full else set())
    return [block for block in blocks_of(page) if block.language != "text" and block.mark in marks]


# --- what is laid out -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(model_folder: Path) -> dict[str, Path]:
    """By the names that the pages use. A page gets copies of those that it names: some commands write into them."""
    library, _ = library_text(model_folder)
    text = model_folder / "text.txt"
    text.write_bytes(library.read_bytes()[:8000])
    checkpoint = checkpoints.opt().write(model_folder / "HF_DIR")
    requests = model_folder / "requests.jsonl"
    requests.write_text(
        '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "import os", "max_tokens": 4}}\n'
    )
    sparse = model_folder / "sparse.gguf"
    convert(checkpoint, sparse, kind=GGMLQuantizationType.Q8_0)
    return {
        "MODEL.gguf": SHIPPED / "stdlib-moe-q8_0.gguf",
        "model.gguf": SHIPPED / "stdlib-moe-q8_0.gguf",
        "ORDINARY.gguf": SHIPPED / "stdlib-arcee-q8_0.gguf",
        "SPARSE.gguf": sparse,
        "home/models/qwen3-30b-a3b-q4_0.gguf": SHIPPED / "stdlib-moe-q8_0.gguf",
        "text.txt": text,
        "requests.jsonl": requests,
        "HF_DIR": checkpoint,
        "wheels": ROOT / "build/dist",
    }


class Page:
    """A folder, an environment and an interpreter in which the blocks of a page run."""

    def __init__(self, page: Path, folder: Path, files: dict[str, Path]) -> None:
        self.folder = folder
        text = page.read_text(encoding="utf-8")
        for name, source in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if Path(name).name in text:
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
        (folder / "bin").mkdir()
        scripts = {"COMMAND": "echo done"}
        if os.geteuid() == 0 and not shutil.which("sudo"):  # a small container: what sudo would do here
            scripts["sudo"] = 'exec "$@"'
        for name, line in scripts.items():
            script = folder / "bin" / name
            script.write_text(f"#!/bin/sh\n{line}\n")
            script.chmod(0o755)
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}
        # bound until the end: nobody else is given the port, and a server that is told its number may listen
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", 0))
        self.port = self.reserved.getsockname()[1]
        self.running: list[subprocess.Popen[bytes]] = []
        self.python: _Interpreter | None = None

    def run(self, block: Block) -> None:
        text = block.text.replace(PORT, str(self.port))
        if block.mark == "file":
            (self.folder / block.reason).write_text(text)
        elif block.mark == "stays running":
            self._start(block, text)
        elif block.language == "sh":
            self._shell(block.place, text)
        elif block.language == "python":
            self.python = self.python or _Interpreter(self.folder, self.environment)
            self.python.run(block.place, text)
        else:
            self._workflow(block.place, yaml.safe_load(text))

    def _shell(self, place: str, text: str) -> None:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert result.returncode == 0, f"{place}: exit code {result.returncode}\n{result.stdout}{result.stderr}"

    def _start(self, block: Block, text: str) -> None:
        log = self.folder / "background.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.running.append(process)
        deadline = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None, f"{block.place}: ended with {process.returncode}\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{block.place}: nothing listens on {self.port}\n{log.read_text()}"
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def _workflow(self, place: str, workflow: dict[Any, Any]) -> None:
        """The `run` steps of a GitHub workflow, in an environment that has our packages."""
        # YAML 1.1 reads the key `on` as true
        assert "push" in workflow[True], place
        job = self.folder / "job"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", job], check=True)
        (packages,) = job.glob("lib/python*/site-packages")
        (here,) = Path(sys.prefix).glob("lib/python*/site-packages")
        (packages / "here.pth").write_text(f"{here}\n")
        self.environment["PATH"] = os.pathsep.join([str(job / "bin"), self.environment["PATH"]])
        steps = [step for each in workflow["jobs"].values() for step in each["steps"]]
        assert all("uses" in step or "run" in step for step in steps), place
        for step in steps:
            if "run" in step:
                self._shell(f"{place}, step {step['name']!r}", step["run"])

    def close(self) -> None:
        if self.python:
            self.python.close()
        for process in self.running:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=SECONDS)
        self.reserved.close()


class _Interpreter:
    """Python that runs one block after the other with the same names."""

    SCRIPT = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {"__name__": "__main__"}
for line in sys.stdin:
    place, text = json.loads(line)
    try:
        exec(compile(text, place, "exec"), names)
    except BaseException:
        traceback.print_exc()
        print("failed", file=answers, flush=True)
    else:
        print("ok", file=answers, flush=True)
"""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.log = folder / "python.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.SCRIPT],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(self, place: str, text: str) -> None:
        assert self.process.stdin and self.process.stdout
        alarm = threading.Timer(SECONDS, self.process.kill)
        alarm.start()
        self.process.stdin.write(json.dumps([place, text]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        alarm.cancel()
        assert answer == "ok\n", f"{place}: {answer or 'killed'}\n{self.log.read_text()}"

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=SECONDS)
        self.process.stdout.close()


@pytest.fixture
def place(page: Path, tmp_path: Path, files: dict[str, Path]) -> Iterator[Page]:
    made = Page(page, tmp_path, files)
    yield made
    made.close()


# --- the tests --------------------------------------------------------------------------------------------------------


def test_every_block_is_run_or_says_why_not() -> None:
    not_run = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks_of(page)), f"{page}: an odd fence"
        for block in blocks_of(page):
            if block.mark != "file":
                assert block.language in (*RUN, "text"), f"{block.place}: say what it is: {', '.join(RUN)} or text"
            if block.language == "text":
                assert not COMMAND.search(block.text), f"{block.place}: a command in a block of text"
            if block.mark:
                assert block.mark in KINDS, f"{block.place}: {block.mark!r} is not one of {KINDS}"
                assert block.mark == "file" or len(block.reason.split()) >= 3, f"{block.place}: a reason"
                not_run += block.mark == "not run"
    assert not_run == NOT_RUN


# pages whose commands take long on a small machine
LONG = {"converting-relu-models", "larger-models", "pictures", "predictors", "traces"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.full if page.stem in LONG else ())
        for page in PAGES
        if to_run(page, in_full=False)
    ],
    ids=page_id,
)
def test_the_commands_run_in(page: Path, place: Page) -> None:
    for block in to_run(page, in_full=False):
        place.run(block)


@pytest.mark.full
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.mark == "in full" for block in blocks_of(page))], ids=page_id
)
def test_also_the_long_commands_run_in(page: Path, place: Page) -> None:
    for block in to_run(page, in_full=True):
        place.run(block)


def test_ci_runs_the_two_commands_and_the_tests_last() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Two commands") :]
    commands = [line.partition("#")[0].split() for line in FENCE.findall(section)[0][1].splitlines()]
    script = [line.split() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert [line[:2] for line in script if line[:1] == ["make"]] == commands
    assert script[-1] == commands[-1] == ["make", "test"]


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs/README.md").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert linked == pages - {"README.md"}
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_pages_that_comments_help_and_messages_name_exist() -> None:
    files = [file for name in CODE for file in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    named = {
        (page, file.relative_to(ROOT))
        for file in files
        if file.suffix in ("", ".py", ".h", ".cpp", ".c", ".txt", ".md") and file.is_file()
        # not: a page of another project
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    missing = [f"{file}: {page}" for page, file in sorted(named) if not (ROOT / page).is_file()]
    assert not missing, "\n".join(missing)


# logs say what was there on their day
@pytest.mark.parametrize("page", [page for page in LINKED if page.parent.name != "measurements"], ids=page_id)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:plugin|python|gguf_tools|ci|tests)/[\w/.-]+\.(?:py|h|cpp|c|txt)\b", text))
    missing = sorted(name for name in named if not (ROOT / name).is_file())
    assert not missing, f"{page.relative_to(ROOT)}: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"`([^`\n]+)`", FENCE.sub("", text)), *(block.text for block in blocks_of(page))])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z][a-z-]*)", code, re.MULTILINE))
    assert named <= targets, named - targets
    commands = set(Group.later)
    named = set(re.findall(r"^llama-flash ([a-z]+)", code, re.MULTILINE))
    assert named <= commands | NOT_YET, named - commands
    assert not NOT_YET & commands, "it is there: run its blocks"


def test_the_reference_is_what_the_docstrings_say() -> None:
    script = [sys.executable, str(ROOT / "ci/tools/api_reference.py"), "--check"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
