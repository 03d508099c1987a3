"""A file that is written to while a model is loaded from it: FlashReadError or the right answer, whatever its times."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bundled_experts import TinyExperts
from conftest import ModelFile
from engines import LEAST, QUARTER, assert_same_logits, give_memory, logits_of, open_flash, tokens
from neurons import bundled, give_neurons, open_neurons, some_active, with_predictors, write_model

from gguf_tools.source import data_bytes, open_gguf
from llama_flash import FlashReadError

PROMPT, DECODED = tokens(70, seed=1), tokens(6, seed=2)
N = len(PROMPT) + len(DECODED)
TICK = 0.02  # seconds; times of files are as coarse as the kernel's ticks
ROUNDS = 4 if "LLAMA_FLASH_SANITIZE" in os.environ else 20

# what is on flash -> (how it is opened, share of memory)
KINDS: dict[str, tuple[str, float]] = {
    "experts": ("", LEAST),
    "experts in slots": ("", 0.6),
    "panels": ("", LEAST),
    "panels, some pinned": ("", QUARTER),
    "neurons exact": ("exact", 0.25),
    "neurons lowrank": ("lowrank", 0.25),
    "neurons off": ("off", 0.1),
    "bundled experts exact": ("exact", 0.25),
    "bundled experts off": ("off", 0.25),
}


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, model_folder: Path, model_file: ModelFile) -> Path:
    """A copy, which the test may change."""
    kind: str = request.param
    if kind.startswith("bundled"):
        return TinyExperts().write_bundled(tmp_path / "model.gguf")
    if kind.startswith("neurons"):
        source = model_folder / "changed-bundles.gguf"
        if not source.exists():
            with_predictors(bundled(write_model(model_folder, "llama", "F32", "reglu")), source, some_active)
    else:
        source = model_file("qwen3moe" if kind.startswith("experts") else "llama", "Q4_0")
    return Path(shutil.copy(source, tmp_path / "model.gguf"))


def opened(kind: str, path: Path) -> Any:
    predictor, share = KINDS[kind]
    if predictor:
        return open_neurons(path, predictor=predictor, share=share)
    return open_flash(path, share=share)


def on_flash(llm: Any, path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of the tensors that stay in the file."""
    plan = llm.flash.plan
    names = {t.name for t in plan.tensors}
    names |= {layer.tensor.name for layer in plan.bundles.layers} if plan.bundles else set()
    source = open_gguf(path)
    found = [(name, t.offset, data_bytes(t)) for name, t in source.tensors.items() if name in names]  # type: ignore[attr-defined]
    assert found
    return found


def write_at(path: Path, offset: int, content: bytes) -> None:
    """In place, with the modification time put back."""
    stat = path.stat()
    time.sleep(TICK)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_ctime_ns != stat.st_ctime_ns


@contextmanager
def other_bytes(path: Path, offset: int, size: int) -> Iterator[None]:
    was = path.read_bytes()[offset : offset + size]
    write_at(path, offset, bytes(byte ^ 0x5A for byte in was))
    try:
        yield
    finally:
        write_at(path, offset, was)


def params(kinds: Iterable[str], full: Iterable[str] = (), sanitize: Iterable[str] = ()) -> pytest.MarkDecorator:
    def marks(kind: str) -> list[pytest.MarkDecorator]:
        return [pytest.mark.full] * (kind in full) + [pytest.mark.sanitize] * (kind in sanitize)

    cases = [pytest.param(kind, kind, id=kind, marks=marks(kind)) for kind in kinds]
    return pytest.mark.parametrize(("model", "kind"), cases, indirect=["model"])


@params(
    KINDS,
    full=(
        "experts in slots",
        "panels, some pinned",
        "bundled experts off",
        "bundled experts exact",
        "neurons exact",
        "neurons off",
    ),
    sanitize=("experts", "panels", "neurons lowrank", "neurons off"),
)
def test_bytes_changed_behind_the_files_time_raise_or_do_no_harm(kind: str, model: Path) -> None:
    rng = random.Random(kind)
    raised = 0
    with opened(kind, model) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        tensors = on_flash(llm, model)
        for _ in range(ROUNDS):
            name, begin, size = rng.choice(tensors)
            offset = begin + rng.randrange(size - 64)
            with other_bytes(model, offset, 64):
                try:
                    actual = logits_of(llm, PROMPT, DECODED)
                except FlashReadError as error:
                    raised += 1
                    assert error.tensor.removesuffix(".weight") in name, (error.tensor, name)
                    assert Path(error.file) == model and error.errno == errno.ESTALE, vars(error)
                    assert error.offset - 64 < offset < error.offset + error.size, (offset, vars(error))
                    assert "changed since it was loaded" in str(error)
                else:  # what was changed is in memory, as it was before
                    assert_same_logits(actual, expected, N)
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)  # once it is itself again
    assert raised >= (ROUNDS // 4 if KINDS[kind][1] == LEAST else 1), "nothing that was changed is read again"


def renamed(path: Path) -> Path:
    return path.rename(path.with_name("renamed.gguf"))


def unlinked(path: Path) -> Path:
    path.unlink()
    return path


def linked(path: Path) -> Path:
    path.with_name("link.gguf").hardlink_to(path)
    return path


def other_mode(path: Path) -> Path:
    path.chmod(0o440)
    return path


@pytest.mark.parametrize("action", [renamed, unlinked, linked, other_mode])
@params(["experts", "panels", "neurons lowrank", "neurons exact"], full=["neurons exact"])
def test_what_changes_no_byte_is_no_error(kind: str, action: Callable[[Path], Path], model: Path) -> None:
    """Before anything was read, so that there is nothing to compare with; and after."""
    with opened(kind, model) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    with opened(kind, model) as llm:
        time.sleep(TICK)
        before = model.stat().st_ctime_ns
        path = action(model)
        assert not path.exists() or path.stat().st_ctime_ns != before
        for _ in range(3):
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)
            if path.exists() and action is not other_mode:
                time.sleep(TICK)
                path.chmod(path.stat().st_mode ^ 0o040)
        assert llm.flash.stats().total.errors == 0


@params(["experts", "neurons lowrank"])
def test_bytes_that_cannot_be_compared_are_refused(kind: str, model: Path) -> None:
    """Of what was not read before nobody knows what it was."""
    with opened(kind, model) as llm:
        offset = on_flash(llm, model)[-1][1]
        write_at(model, offset, model.read_bytes()[offset : offset + 64])
        with pytest.raises(FlashReadError, match=r"not\s+read before: load the model again") as caught:
            logits_of(llm, PROMPT, DECODED)
        assert caught.value.tensor and caught.value.size > 0 and Path(caught.value.file) == model
    with opened(kind, model) as llm:
        logits_of(llm, PROMPT, DECODED)


@params(["panels", "neurons exact"])
def test_what_is_kept_resident_is_checked_when_it_is_read_again(kind: str, model: Path) -> None:
    give = give_neurons if kind.startswith("neurons") else give_memory
    with opened(kind, model) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        _, begin, size = on_flash(llm, model)[0]
        with other_bytes(model, begin, size), pytest.raises(FlashReadError, match="since it was loaded"):
            give(llm, 2.0)
        if kind.startswith("panels"):
            give(llm, 2.0)
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)
