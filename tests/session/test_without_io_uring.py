"""A kernel without io_uring (before 5.1), and containers that forbid it: the pread threads do all of it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ModelFile
from engines import IO_ENGINES
from system_calls import refuse_io_uring

PROGRAM = """
import sys
import llama_cpp
from llama_flash import FlashError, FlashOffload

try:
    llm = llama_cpp.Llama(sys.argv[1], n_ctx=640, n_threads=2, verbose=False, logits_all=True,
                          flash_offload=FlashOffload(what="experts", io_engine=sys.argv[2], dram_budget="1GiB"))
    llm.eval(list(range(1, 40)))
    llm.eval([1])
    stats = llm.flash.stats()
    assert stats.total.reads > 0
    print(stats.io_engine, hash(llm.scores[: llm.n_tokens].tobytes()))
except FlashError as error:
    print("error:", error)
"""


def run(model: Path, io_engine: str, refused: int | None = None) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, io_engine],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=400,
        preexec_fn=None if refused is None else refuse_io_uring(refused),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("refused", [errno.ENOSYS, errno.EPERM, errno.EACCES], ids=errno.errorcode.get)
def test_the_same_bits_are_computed_through_the_pread_threads(refused: int, model_file: ModelFile) -> None:
    model = model_file("qwen3moe", "Q4_0")
    engine, bits = run(model, "auto", refused).split()
    assert engine == "pread"
    assert run(model, "auto").split() == [IO_ENGINES[0], bits]


@pytest.mark.skipif("io_uring" not in IO_ENGINES, reason="io_uring is not built in or not allowed here")
def test_where_it_is_asked_for_by_name_the_error_says_why_not(model_file: ModelFile) -> None:
    said = run(model_file("qwen3moe", "Q4_0"), "io_uring", errno.ENOSYS)
    assert said.startswith("error:") and "io_uring is not allowed here: Function not implemented" in said, said
