"""A live CPU quota: what a plan, the doctor and a load say of it, and what the statistics count."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import ModelFile

CONTROLLER = Path("/sys/fs/cgroup/cpu").resolve()  # often a link to cpu,cpuacct
PERIOD = 100_000  # microseconds
QUOTA = PERIOD // 5  # less than a thread gets where many others run: it is used up on a busy machine, too

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not (CONTROLLER / "cgroup.procs").exists(),
    reason="makes a cgroup v1 group for CPU time; there is no such controller here, or no right to",
)


@pytest.fixture
def group() -> Iterator[Path]:
    """A group that may use a fifth of a core."""
    path = CONTROLLER / f"llama-flash-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:  # a container, mostly
        pytest.skip(f"no group can be made: {error}")
    try:
        try:
            (path / "cpu.cfs_period_us").write_text(str(PERIOD))
            (path / "cpu.cfs_quota_us").write_text(str(QUOTA))
        except OSError as error:  # a kernel without quotas, or less than that is allowed above
            pytest.skip(f"the group takes no quota: {error}")
        yield path
    finally:
        _remove(path)


def _remove(group: Path) -> None:
    """With whatever a test that failed has left in it."""
    for _ in range(100):
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError:  # they have yet to end
            time.sleep(0.1)
    pytest.fail(f"{group} is left behind")


def within(group: Path, command: Sequence[str]) -> str:
    """What the command says that runs in the group."""
    enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", ["plan", "doctor"])
def test_a_quota_decides_the_threads_and_is_named(command: str, group: Path, model_file: ModelFile) -> None:
    model = [str(model_file("llama", "Q4_0"))] if command == "plan" else []
    said = within(group, [sys.executable, "-m", "llama_flash", command, *model])
    assert f"1 thread: the quota of {group} is 0.2 of" in " ".join(said.split())


LOADED = """
import json, sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False, flash_offload={"what": "ffn"}, **json.loads(sys.argv[2]))
while not llm.flash.stats().throttled_seconds:  # counted at a stop's end; periods are counted before
    llm.reset()
    llm.eval(list(range(32)))
stats = llm.flash.stats()
print(json.dumps([llm.n_threads, llm.flash.summary, stats.throttled, stats.throttled_seconds, str(stats)]))
"""


def test_a_load_takes_the_quotas_threads(group: Path, model_file: ModelFile) -> None:
    arguments = [str(model_file("llama", "Q4_0")), "{}"]
    n_threads, summary, times, seconds, text = json.loads(within(group, [sys.executable, "-c", LOADED, *arguments]))
    assert n_threads == 1 and f"the quota of {group}" in summary
    assert times > 0 and seconds > 0
    assert "a CPU quota stopped the process" in text
    assert "use fewer threads" not in text, "there is one"


EXPECTED = """
import sys, llama_cpp
from llama_flash.session.expected import cost_of
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False, flash_offload={"what": "ffn"})
print(cost_of(llm.flash).keywords["awake"])
"""


def test_a_quota_counts_in_what_is_expected(group: Path, model_file: ModelFile) -> None:
    model = str(model_file("llama", "Q4_0"))
    planned = within(group, [sys.executable, "-m", "llama_flash", "plan", "--json", model])
    assert "a CPU quota lets the threads run for 20% of the time" in planned
    assert float(within(group, [sys.executable, "-c", EXPECTED, model])) == 0.2


def test_threads_that_a_user_asks_for_stay(group: Path, model_file: ModelFile) -> None:
    arguments = [str(model_file("llama", "Q4_0")), json.dumps({"n_threads": 2})]
    n_threads, summary, times, _, _ = json.loads(within(group, [sys.executable, "-c", LOADED, *arguments]))
    assert n_threads == 2 and "2 threads as asked for (default: 1 thread: the quota of" in summary
    assert times > 0
