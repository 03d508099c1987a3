"""Files of prompts that are damaged, cut off, swapped or missing, and processes that are killed: no wrong token."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from architectures import write
from conftest import ModelFile
from engines import tokens
from prompts import PROMPT, answer, open_model

from llama_flash.native import prompts as native
from llama_flash.native.prompts import HEAD_BYTES
from llama_flash.prompts.folder import Folder
from llama_flash.prompts.heads import BLOCK, parse_head

LONG = tokens(778, seed=3)  # three blocks, and too little behind them to be kept
SHORT = 6  # tokens of an answer


class Kept:
    """A model with three blocks on flash, and what it answers."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.folder = folder
        self.llm = open_model(path, folder)
        self.text, _ = answer(self.llm, LONG, SHORT)
        assert self.llm.flash is not None and self.llm.flash.keeper is not None
        self.llm.flash.keeper.flush()
        self.whole = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.parts = {name.partition(".")[2] for name in self.whole}
        assert len(self.whole) >= 2

    def put_back(self) -> None:
        for file in self.folder.iterdir():
            if file.name not in self.whole:
                file.unlink()
        for name, content in self.whole.items():
            if not (file := self.folder / name).is_file() or file.read_bytes() != content:
                file.unlink(missing_ok=True)
                file.write_bytes(content)
                file.chmod(0o600)

    def asked(self) -> tuple[list[int], int]:
        """An answer of an empty context, and how many tokens came from the folder."""
        before = self.llm.flash.prompts.stats.recalled
        self.llm.reset()
        self.llm.input_ids[:] = 0
        text, _ = answer(self.llm, LONG, SHORT)
        recalled = self.llm.flash.prompts.stats.recalled - before
        self.llm.flash.keeper.flush()  # or it would mend what is damaged next
        return text, recalled


@pytest.fixture(scope="module")
def kept(model_file: ModelFile, model_folder: Path) -> Iterator[Kept]:
    there = Kept(model_file("llama"), model_folder / "prompts")
    yield there
    there.llm.close()


def damage(files: list[Path], chance: random.Random) -> None:
    """One of the ways in which a file can be wrong."""
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    how = chance.choice(("bit", "bit", "byte", "cut", "longer", "missing", "swapped", "zeros", "empty"))
    if how in ("bit", "byte", "zeros"):
        at = chance.randrange(HEAD_BYTES if chance.random() < 0.3 else len(content))
        n = min(4096, len(content) - at) if how == "zeros" else 1
        before = bytes(content[at : at + n])
        for i in range(at, at + n):
            content[i] = 0 if how == "zeros" else content[i] ^ (1 << chance.randrange(8))
        if bytes(content[at : at + n]) == before:
            content[at] ^= 1
    elif how == "cut":
        del content[chance.randrange(len(content)) :]
    elif how == "longer":
        content += bytes(4096)
    elif how == "empty":
        content.clear()
    elif how == "swapped":
        content = bytearray(chance.choice([other for other in files if other != file]).read_bytes())
    file.unlink()
    if how != "missing":
        file.write_bytes(content)
        file.chmod(0o600)


def faults(kept: Kept, n: int, seed: int) -> None:
    chance = random.Random(seed)
    restored = 0
    for _ in range(n):
        kept.put_back()
        damage([kept.folder / name for name in kept.whole], chance)
        text, recalled = kept.asked()
        assert text == kept.text
        assert recalled < 768 or kept.parts != {"cells"}, "what was damaged was taken"  # of others not all is needed
        restored += recalled
    assert restored > 0, "nothing was restored that could have been wrong"


def test_no_damage_changes_a_token(kept: Kept) -> None:
    kept.put_back()
    assert kept.asked() == (kept.text, 768)
    faults(kept, 16, seed=1)


def wrong_parts(kept: Kept, n_tokens: int) -> list[str]:
    """Parts of what the context has that are not, byte for byte, what was computed."""
    store, context = kept.llm.flash.prompts, kept.llm._ctx.ctx
    wrong = []
    for name, content in kept.whole.items():
        head = parse_head(content[:HEAD_BYTES])
        assert head is not None
        body, end = content[HEAD_BYTES : HEAD_BYTES + head.n_bytes], head.first + BLOCK
        if end > n_tokens or (head.part == "window" and end <= n_tokens - store.kind.window):
            continue
        if head.part == "state":
            same = end != n_tokens or native.state_of(context, 0, end) == body
        else:
            buffer = memoryview(bytearray(len(body)))
            n, total, _ = native.take(context, 0, head.part == "window", (head.first, end), 0, buffer)
            same = (n, total) == (len(body), len(body)) and bytes(buffer) == body
        if not same:
            wrong.append(name)
    return wrong


def restored_faults(kept: Kept, n: int, seed: int) -> int:
    """Damages a file, restores the prompt, and looks at every byte that is in the context then. Returns the tokens."""
    chance, tokens_of = random.Random(seed), np.array([*LONG, 5], np.int32)
    store, context = kept.llm.flash.prompts, kept.llm._ctx.ctx
    n_tokens = 0
    for _ in range(n):
        kept.put_back()
        damage([kept.folder / name for name in kept.whole], chance)
        native.clear(context, 0)
        recalled = store.recall(context, 0, tokens_of, 0)
        assert recalled % BLOCK == 0 and recalled <= (512 if kept.parts == {"cells"} else 768)
        assert wrong_parts(kept, recalled) == []
        n_tokens += recalled
    return n_tokens


@pytest.mark.parametrize("form", ["llama", "gemma3", "jamba", "mamba2"])
@pytest.mark.parametrize("n", [24, pytest.param(2500, marks=pytest.mark.full)])
def test_what_is_restored_is_what_was_computed_whatever_is_damaged(
    form: str, n: int, model_folder: Path, kept: Kept
) -> None:
    if form == "llama":
        there = kept
    else:
        write(form, path := model_folder / f"{form}.gguf")
        there = Kept(path, model_folder / f"{form}-{n}")
    assert restored_faults(there, n, seed=n) > 0
    if there is not kept:
        there.llm.close()


def test_what_was_damaged_is_written_again(kept: Kept) -> None:
    assert kept.llm.flash is not None and kept.llm.flash.keeper is not None
    for name, content in kept.whole.items():
        kept.put_back()
        (kept.folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert kept.asked()[0] == kept.text
        kept.llm.flash.keeper.flush()
        assert {file.name: file.read_bytes() for file in kept.folder.iterdir()} == kept.whole


def test_files_of_others_are_not_there(kept: Kept, tmp_path: Path) -> None:
    """Links, pipes, folders and files that others may write: nothing is followed, nothing is trusted."""
    first, second, third = sorted(kept.whole)
    for replace in (
        lambda file: file.symlink_to(tmp_path / "elsewhere"),
        lambda file: os.mkfifo(file, 0o600),
        lambda file: file.mkdir(),
        lambda file: (file.write_bytes(kept.whole[file.name]), file.chmod(0o666)),
    ):
        kept.put_back()
        for name in (first, second, third):
            (tmp_path / "elsewhere").write_bytes(kept.whole[name])
            (tmp_path / "elsewhere").chmod(0o600)
            (kept.folder / name).unlink()
            replace(kept.folder / name)
        assert kept.asked() == (kept.text, 0)
        for name in (first, second, third):
            file = kept.folder / name
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)


def test_a_folder_that_cannot_be_used_costs_a_line(
    model_file: ModelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    open_to_all.chmod(0o755)
    (tmp_path / "file").write_text("")
    for folder, why in (
        (open_to_all, "others may look into it"),
        (tmp_path / "file", "Not a directory"),
        (Path("/proc/nowhere/prompts"), "No such file"),
    ):
        caplog.clear()
        with open_model(model_file("llama"), folder) as llm:
            assert llm.flash.prompts is None
            assert len(answer(llm, PROMPT, 3)[0]) == 3
        assert [record.message for record in caplog.records if why in record.message]


def test_a_full_disk_costs_a_line(
    model_file: ModelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with open_model(model_file("llama"), tmp_path / "prompts") as llm:
        monkeypatch.setattr(os, "pwrite", full)
        text, _ = answer(llm, PROMPT)
        llm.flash.keeper.flush()
        monkeypatch.undo()
        assert list((tmp_path / "prompts").iterdir()) == []
        assert answer(llm, PROMPT)[0] == text
    lines = [record.message for record in caplog.records if "No space left" in record.message]
    assert len(lines) == 1


WRITER = """
import sys
from pathlib import Path
from engines import tokens
from prompts import answer, open_model
llm = open_model(Path({model!r}), Path({folder!r}))
print("ready", flush=True)
for seed in range(1000):
    answer(llm, tokens(900, seed=seed), 1)
    llm.flash.keeper.flush()
"""


@pytest.mark.full
def test_a_process_that_is_killed_leaves_nothing_wrong(model_file: ModelFile, tmp_path: Path, kept: Kept) -> None:
    folder, model = tmp_path / "prompts", model_file("llama")
    for number in range(12):
        script = WRITER.format(model=str(model), folder=str(folder))
        environment = {
            **os.environ,
            "PYTHONPATH": f"{Path(__file__).parent.parent / 'support'}:{Path(__file__).parent.parent}",
        }
        writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(0.3 + 0.07 * number)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    from llama_flash.prompts.listing import verify

    there = Folder(folder)
    assert list(there.entries()) and list(verify(there)) == []
    with open_model(model, folder) as llm:
        text, _ = answer(llm, LONG, SHORT)
    assert text == kept.text
