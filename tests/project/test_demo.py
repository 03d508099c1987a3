"""`make demo`, and the other scripts of ci/: they start, they end in a table, and they leave nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT
from terminal import Terminal

from llama_flash import FlashCapError, run_capped
from llama_flash.budget.cgroup import memory_controller

DEMO = [sys.executable, ROOT / "ci/tools/demo.py"]
SMALL = ["--layers", "1", "--seconds", "1"]
# what trains needs torch
SCRIPTS = sorted(
    path
    for path in ROOT.glob("ci/*/*.py")
    if "__main__" in path.read_text(encoding="utf-8") and (path.parent.name != "train" or path.name == "flash.py")
)
TABLE = re.compile(r"what ran .*^│ stock llama\.cpp.*^│ flash offload .* yes +│ *$.*^│ stock llama\.cpp ", re.M | re.S)
# the demo's last part alone, on one layer
LAST_PART = """
import sys
from pathlib import Path
import demo
from benchlib.models import MOE_SKEWED
from demolib.compare import compare
from demolib.screen import Screen

screen, model = Screen(1), MOE_SKEWED.ensure(Path(sys.argv[1]), 1).stock
result = compare(screen, model, seconds=0.5, no_limit=sys.argv[2])
demo.show_result(screen, result)
sys.exit(not result.ok)
"""


def memory_can_be_limited() -> bool:
    try:
        run_capped("64MiB", ["true"])
    except FlashCapError:
        return False
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)  # pytest would keep what a failed test has left


@pytest.mark.full
def test_the_demo_ends_in_one_table_that_fits_a_terminal(folder: Path) -> None:
    command = [sys.executable, "-c", LAST_PART, folder, ""]
    with Terminal(command, width=80, height=24, env={"PYTHONPATH": str(ROOT / "ci/tools")}) as terminal:
        code = terminal.end()
    assert code == 0, terminal.text
    last = terminal.text[terminal.text.rindex("┏") :]
    assert len(last.splitlines()) < 24 and max(map(len, last.splitlines())) <= 80, last
    if memory_can_be_limited():
        assert TABLE.search(last), last
    assert re.search(
        r"^A model of 0\.\d\d GB in 0\.\d\d GB of memory: with flash offload it ran .*\n.*answers\.$", last, re.M
    )


@pytest.mark.full
def test_the_demo_says_what_it_leaves_out_where_memory_cannot_be_limited(folder: Path) -> None:
    command = [sys.executable, "-c", LAST_PART, folder, "nobody may"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "ci/tools")}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^Left out, stock llama\.cpp in 0\.\d\d GB: nobody may$", result.stdout, re.M)
    assert result.stdout.count("│ stock llama.cpp") == 1
    assert re.search(r"^│ flash offload .* yes +│ *$", result.stdout, re.M)


@pytest.mark.full
def test_the_whole_demo_leaves_nothing_behind(folder: Path) -> None:
    result = subprocess.run([*DEMO, *SMALL, "--folder", folder], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert TABLE.search(result.stdout) or not memory_can_be_limited(), result.stdout
    assert not list(folder.iterdir())


def test_a_disk_without_room_is_told_before_anything_is_done(folder: Path) -> None:
    result = subprocess.run(
        [*DEMO, "--layers", "20000", "--folder", folder], capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 1
    assert not result.stdout
    assert re.fullmatch(
        rf'error: the demo needs [\d.]+ GB of disk, most of it until it ends, but {folder} has [\d.]+ GB free\. .*"\n',
        result.stderr,
    )
    assert not list(folder.iterdir())


def test_a_stopped_demo_leaves_nothing_behind_and_removes_what_a_killed_one_left(folder: Path) -> None:
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    left, foreign = folder / f"demo-{gone}-x", folder / "demo-recording"
    left.mkdir()
    foreign.mkdir()
    with subprocess.Popen([*DEMO, "--folder", folder], stdout=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout
            assert any("1 of 3" in line for line in demo.stdout)
            assert {path for path in folder.iterdir() if not path.name.startswith(f"demo-{demo.pid}-")} == {foreign}
            demo.send_signal(signal.SIGTERM)
            assert "nothing is left behind" in demo.stdout.read()
            assert demo.wait(timeout=400) == 130
        finally:
            demo.kill()
    assert list(folder.iterdir()) == [foreign]


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_demo_stopped_in_a_limited_run_leaves_nothing_behind(number: signal.Signals, folder: Path) -> None:
    with subprocess.Popen([*DEMO, *SMALL, "--folder", folder], stdout=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout
            assert any(line.startswith("flash offload, 0.") for line in demo.stdout)
            time.sleep(1)  # it has begun
            demo.send_signal(number)
            assert "no memory limit" not in demo.stdout.read()
            assert demo.wait(timeout=400) == 130
        finally:
            demo.kill()
    assert not list(folder.iterdir())
    controller = memory_controller()
    groups = [group for parent in controller.lineage() for group in parent.glob("llama-flash-*")] if controller else []
    assert not [group for group in groups if group.name.startswith(f"llama-flash-{demo.pid}-")]


def test_every_script_of_ci_lists_its_options() -> None:
    assert len(SCRIPTS) > 10
    started = {
        path: subprocess.Popen(
            [sys.executable, path, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for path in SCRIPTS
    }
    for path, process in started.items():
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0 and output.startswith("usage: ") and "--help" in output, f"{path}: {output}"
        for option in set(re.findall(r'\bparser\.add_argument\(\s*"(-?-?[a-z-]+)"', path.read_text(encoding="utf-8"))):
            assert option in output, f"{path}: {option}"


def test_cases_that_pages_and_scripts_name_exist() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("ci/**/*.py")]
    named = {name for page in pages for name in re.findall(r"--cases[ =]([\w,-]+)", page.read_text(encoding="utf-8"))}
    assert len(named) > 3
    code = f"import bench; [bench._chosen(name) for name in {sorted(named)}]; bench._chosen('moe-51')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "ci/bench", capture_output=True, text=True, timeout=400
    )
    assert result.stderr.startswith("error: no case 'moe-51', known: "), result.stderr
