"""Under the limits that a shell or a service manager sets (ulimit): a model runs, or an error names the limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ModelFile
from engines import IO_ENGINES

# argv: limit, how much more than now, model, I/O engine, threads, user
PROGRAM = """
import logging, os, resource, sys
import llama_cpp
from llama_flash import FlashError, FlashOffload

what, more, path, io_engine, n_threads, user = sys.argv[1:]
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
if what == "NPROC":
    os.setuid(int(user))  # root may start as many as it likes; nobody else runs as this user
now = {
    "NOFILE": len(os.listdir("/proc/self/fd")) - 1,
    "NPROC": len(os.listdir("/proc/self/task")),
    "AS": int(open("/proc/self/statm").read().split()[0]) * 4096,
    "MEMLOCK": 0,
}[what]
limit = now + int(more) * (1 << 20 if what == "AS" else 1)
resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
options = FlashOffload(what="ffn", io_engine=io_engine, dram_budget="1GiB")
try:
    llm = llama_cpp.Llama(path, n_ctx=640, verbose=False, n_threads=int(n_threads), n_threads_batch=int(n_threads),
                          flash_offload=options)
    llm.eval(list(range(40)))
    llm.eval([1])
    assert llm.flash.stats().total.reads > 0
    llm.close()
    print("works")
except FlashError as error:
    print("error:", error)
"""


@pytest.fixture(scope="module")
def place(model_file: ModelFile) -> Iterator[Path]:
    """A model where every user may read it."""
    folder = Path(tempfile.mkdtemp(prefix="llama-flash-limits-"))
    shutil.copy(model_file("qwen3moe", "Q4_0"), folder / "model.gguf")
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def run(place: Path, what: str, more: int, io_engine: str = "auto", n_threads: int = 2) -> str:
    environment = os.environ | {"HOME": str(place), "LLAMA_FLASH_CACHE": str(place), "LLAMA_FLASH_RUNTIME": str(place)}
    user = 100000 + os.getpid()
    arguments = [what, str(more), str(place / "model.gguf"), io_engine, str(n_threads), str(user)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("more", [2, 3])
def test_too_few_open_files(more: int, place: Path) -> None:
    said = run(place, "NOFILE", more)
    assert (
        said.startswith("error:") and "Too many open files" in said and "`ulimit -n`" in said and "model.gguf" in said
    ), said


@pytest.mark.parametrize(("more", "part"), [(4, "reader threads"), (9, "n_threads"), (10, "n_threads")])
def test_too_few_threads(more: int, part: str, place: Path) -> None:
    """For the pool of readers (8), or for computing: the engine would go on with fewer than were asked for."""
    if os.getuid() != 0:
        pytest.skip("only root can become a user that runs nothing else")
    said = run(place, "NPROC", more, "pread")
    assert said.startswith(("error:", "WARNING")) and part in said and "`ulimit -u`" in said, said


@pytest.mark.skipif("io_uring" not in IO_ENGINES, reason="io_uring is not available here: pread needs threads")
def test_without_a_thread_for_the_controller_a_model_runs(place: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become a user that runs nothing else")
    said = run(place, "NPROC", 0, "io_uring", n_threads=1)
    assert "memory limits are not followed" in said and "`ulimit -u`" in said and "works" in said, said


@pytest.mark.parametrize("more", [1, 20, 40])
def test_too_few_addresses(more: int, place: Path) -> None:
    """Where the engine is refused memory it may crash."""
    said = run(place, "AS", more)
    assert said.startswith("error:") and "`ulimit -v`" in said, said


@pytest.mark.full
@pytest.mark.parametrize("more", range(44, 140, 8))
def test_with_any_number_of_addresses_it_works_or_says_why_not(more: int, place: Path) -> None:
    said = run(place, "AS", more)
    assert "works" in said or ("error:" in said and "`ulimit -v`" in said), said


@pytest.mark.skipif("io_uring" not in IO_ENGINES, reason="io_uring is not available here")
def test_without_locked_memory_a_model_runs(place: Path) -> None:
    """Rings of io_uring count against it before Linux 5.12."""
    said = run(place, "MEMLOCK", 0)
    assert "works" in said or "`ulimit -l`" in said, said
