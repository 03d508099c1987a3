"""What happens when reads fail. Each scenario runs in a process of its own, started by test_faults.py:

python fault_scenarios.py SCENARIO MODEL.gguf IO_ENGINE [PREDICTOR]

PREDICTOR: the model holds neuron bundles, whose active neurons are found so.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from engines import LEAST, QUARTER, Logits, Model, assert_same_logits, logits_of, open_flash, tokens
from neurons import open_neurons

from llama_flash import FlashReadError

PROMPT, DECODED = tokens(70, seed=1), tokens(6, seed=2)
N = len(PROMPT) + len(DECODED)
EIO, EINTR, SHORT, END_OF_FILE, EIO_SLOWLY = 1, 2, 3, 4, 5  # as in faults.c
PREDICTOR = sys.argv[4] if len(sys.argv) > 4 else None


def opened(path: Path, share: float, io_engine: str) -> Model:
    if PREDICTOR is None:
        return open_flash(path, share=share, io_engine=io_engine)
    return open_neurons(path, predictor=PREDICTOR, share=share, io_engine=io_engine)


def truncated_file_raises_and_the_next_call_works_once_it_is_whole(path: Path, io_engine: str) -> None:
    with opened(path, LEAST, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        with hidden_tail(path) as size:
            error = failing(llm)
            assert Path(error.file) == path, error.file
            assert str(path) in str(error)
            assert error.errno and error.size > 0 and error.tensor, vars(error)
            changed = "changed" in str(error)  # noticed before a read could fail
            assert changed or error.offset + error.size > size, vars(error)
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def changed_file_raises(path: Path, io_engine: str) -> None:
    with opened(path, LEAST, io_engine) as llm:
        logits_of(llm, PROMPT, DECODED)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
        os.utime(path, ns=(0, 1))
        error = failing(llm)
        assert Path(error.file) == path and "changed" in str(error), str(error)
        assert error.errno == errno.ESTALE and error.offset > 0 and error.tensor, vars(error)
        assert "changed" in str(failing(llm)), "it stays changed until the model is loaded again"


def replaced_file_does_not_disturb_a_loaded_model(path: Path, io_engine: str) -> None:
    """The open file is still the old one, as with any program."""
    with opened(path, LEAST, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        other = path.with_suffix(".new")
        other.write_bytes(b"not a model")
        other.replace(path)
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def eio_raises_and_the_next_call_works(path: Path, io_engine: str) -> None:
    with opened(path, LEAST, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        for n_reads in (1, 3, 1 << 30):
            with faults(EIO, n_reads):
                error = failing(llm)
            assert error.errno == errno.EIO and Path(error.file) == path and error.size > 0, vars(error)
            assert error.offset < path.stat().st_size
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)
        assert llm.flash.stats().total.errors >= 3


def eio_while_loading_raises(path: Path, io_engine: str) -> None:
    """Reads of weights that stay in memory."""
    with opened(path, LEAST, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    raised = 0
    for skip in range(12):
        with faults(EIO, 1, skip):
            try:
                opened(path, LEAST, io_engine).close()
            except FlashReadError as error:
                assert error.errno == errno.EIO and Path(error.file) == path, vars(error)
                assert error.tensor and error.size > 0, vars(error)
                raised += 1
    assert raised > 3
    with opened(path, LEAST, io_engine) as llm:
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def errors_of_a_failed_call_do_not_meet_the_next(path: Path, io_engine: str) -> None:
    """Reads that were under way when the decode stopped fail later, and are that call's."""
    with opened(path, QUARTER, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        with faults(EIO_SLOWLY, 1 << 30):
            failing(llm)
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def eio_while_decoding_raises(path: Path, io_engine: str) -> None:
    with opened(path, LEAST, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        llm.reset()
        llm.eval(PROMPT)
        for token in DECODED:
            with faults(EIO, 1 << 30):
                try:
                    llm.eval([token])
                except FlashReadError:
                    pass
                else:
                    raise AssertionError("decoded a token without reading")
            llm.eval([token])  # the failed call has left nothing behind
        assert_same_logits(np.array(llm.scores[:N]), expected, N)


def eio_in_any_read_of_a_token_is_forgotten_by_the_next(path: Path, io_engine: str) -> None:
    """Reads for later layers, too, which nobody waits for when they fail."""
    with opened(path, QUARTER, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED * 4)
        failed = 0
        for skip in (0, 3, 17):  # reads of the prompt
            with faults(EIO, 1, skip):
                failing(llm)
        llm.reset()
        llm.eval(PROMPT)
        for k, token in enumerate(DECODED * 4):
            with faults(EIO, 1 + k % 3, k % 13):
                try:
                    llm.eval([token])
                except FlashReadError:
                    failed += 1
                else:
                    continue
            llm.eval([token])
        assert failed > 3
        assert_same_logits(np.array(llm.scores[: llm.n_tokens]), expected, len(PROMPT) + 4 * len(DECODED))


def a_wrong_guess_that_fails_is_nobodys_error(path: Path, io_engine: str) -> None:
    """An expert read ahead of the router, which then chooses others: more reads fail than decodes."""
    with opened(path, QUARTER, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED * 4)
        before, raised = llm.flash.stats().total.errors, 0
        for _ in range(10):  # several threads read: which read is the n-th is not the same each time
            llm.reset()
            llm.eval(PROMPT)
            for k, token in enumerate(DECODED * 4):
                with faults(EIO, 1, k % 13):
                    try:
                        llm.eval([token])
                    except FlashReadError:
                        raised += 1
                    else:
                        continue
                llm.eval([token])
            failed = llm.flash.stats().total.errors - before
            if failed > raised > 0:
                break
        assert failed > raised > 0, (failed, raised)
        assert_same_logits(np.array(llm.scores[: llm.n_tokens]), expected, len(PROMPT) + 4 * len(DECODED))


def a_warm_start_that_fails_is_nobodys_error(path: Path, io_engine: str) -> None:
    with opened(path, QUARTER, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        native = llm.flash.native
        ids = np.zeros(64, np.uint64)
        hottest = native.hot(len(ids))
        ids[: len(hottest)] = hottest
        native.set_memory(native.memory().total)  # empty again
        with faults(EIO, 1 << 30):
            native.warm(ids)
            end = time.monotonic() + 200
            # a call takes note of what has failed
            while llm.flash.stats().total.errors == 0 and time.monotonic() < end:
                native.warm(ids[:0])
        assert llm.flash.stats().total.errors > 0, "nothing was read"
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def eintr_and_short_reads_are_continued(path: Path, io_engine: str) -> None:
    with opened(path, QUARTER, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        for what in (EINTR, SHORT):
            before = llm.flash.stats().total.retries
            with faults(what, 50):
                assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)
            assert llm.flash.stats().total.retries > before, "nothing was disturbed"


def end_of_file_where_there_should_be_bytes_raises(path: Path, io_engine: str) -> None:
    with opened(path, LEAST, io_engine) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        with faults(END_OF_FILE, 1 << 30):
            error = failing(llm)
        assert Path(error.file) == path and error.size > 0
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def failure_in_one_model_leaves_the_other_alone(path: Path, io_engine: str) -> None:
    other_path = path.with_name("other.gguf")
    other_path.write_bytes(path.read_bytes())
    with (
        opened(path, LEAST, io_engine) as llm,
        opened(other_path, LEAST, io_engine) as other,
    ):
        expected = logits_of(llm, PROMPT, DECODED)
        with hidden_tail(path):
            failing(llm)
            assert_same_logits(logits_of(other, PROMPT, DECODED), expected, N)


def failing(llm: Any) -> FlashReadError:
    try:
        result: Logits = logits_of(llm, PROMPT, DECODED)
    except FlashReadError as error:
        return error
    raise AssertionError(f"no error, logits {result.shape}")


@contextmanager
def hidden_tail(path: Path) -> Iterator[int]:
    """Truncates the file to a third, and puts bytes and time stamp back. Yields the size in between."""
    stat = path.stat()
    size = stat.st_size // 3
    tail = path.read_bytes()[size:]
    os.truncate(path, size)
    try:
        yield size
    finally:
        with path.open("r+b") as file:
            file.seek(size)
            file.write(tail)
            file.flush()
            os.fsync(file.fileno())
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextmanager
def faults(what: int, n_reads: int, skip: int = 0) -> Iterator[None]:
    with Path(os.environ["FAULTS"]).open("r+b") as file, mmap.mmap(file.fileno(), 4096) as control:
        control[4:12] = struct.pack("ii", n_reads, skip)
        control[:4] = struct.pack("i", what)
        try:
            yield
        finally:
            control[:12] = bytes(12)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
