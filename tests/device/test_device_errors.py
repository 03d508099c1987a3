"""A device that fails for real: a file system on a loop device whose backing file is cut short."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ModelFile
from engines import IO_ENGINES, LEAST, assert_same_logits, logits_of, open_flash, tokens
from exclusive import exclusive

from gguf_tools.source import data_bytes, open_gguf
from llama_flash import FlashReadError

PROMPT, DECODED = tokens(70, seed=1), tokens(6, seed=2)
N = len(PROMPT) + len(DECODED)
IMAGE_BYTES = 48 << 20
MERGED = 2 << 20


def command(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode != 0:
        raise OSError(f"{words[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


@dataclass
class Disk:
    image: Path
    folder: Path

    def place(self, name: str, content: bytes) -> int:
        """Offset in the image of what the file has at `content`'s place."""
        at = self.image.read_bytes().find(content)
        assert at > 0, f"{name} is not in the image as a whole"
        return at


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    try:
        command("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", image)
        with exclusive("losetup"):  # the free one that is found may be taken before it is set up
            device = command("losetup", "--find", "--show", image)
    except OSError as problem:  # not root, a container without loop devices, no tools
        pytest.skip(f"no loop device can be had here: {problem}")
    try:
        try:
            command("mount", device, folder)
        except OSError as problem:
            pytest.skip(f"nothing can be mounted here: {problem}")
        try:
            yield Disk(image, folder)
        finally:
            end = time.monotonic() + 400
            gc.collect()  # maps of the file
            while subprocess.run(["umount", folder], capture_output=True, check=False).returncode != 0:
                assert time.monotonic() < end, "the file system stays in use"
                time.sleep(0.1)
    finally:
        command("losetup", "--detach", device)


@pytest.mark.parametrize("io_engine", IO_ENGINES)
@pytest.mark.parametrize("form", ["qwen3moe", "llama"])
def test_an_error_of_the_device_raises_and_the_next_call_works(
    form: str, io_engine: str, disk: Disk, model_file: ModelFile
) -> None:
    path = Path(shutil.copy(model_file(form, "Q4_0"), disk.folder / "model.gguf"))
    os.sync()
    with open_flash(path, share=LEAST, io_engine=io_engine) as llm:
        assert llm.flash.stats().io_engine == io_engine
        expected = logits_of(llm, PROMPT, DECODED)
        names = {tensor.name for tensor in llm.flash.plan.tensors}
        found = [t for name, t in open_gguf(path).tensors.items() if name in names]
        last = max(found, key=lambda tensor: tensor.offset)  # type: ignore[attr-defined]
        middle = (last.offset + data_bytes(last) // 2) // 4096 * 4096  # type: ignore[attr-defined]
        cut = disk.place(path.name, path.read_bytes()[middle : middle + 4096])
        tail = disk.image.read_bytes()[cut:]
        os.truncate(disk.image, cut)
        for _ in range(3):
            with pytest.raises(FlashReadError, match="Input/output error") as caught:
                logits_of(llm, PROMPT, DECODED)
            error = caught.value
            assert error.errno == errno.EIO and Path(error.file) == path and error.tensor in names, vars(error)
            # requests that the kernel has merged fail together
            assert middle - MERGED < error.offset + error.size and error.offset < path.stat().st_size, vars(error)
            assert str(path) in str(error) and str(error.offset) in str(error)
        with disk.image.open("r+b") as file:
            file.seek(cut)
            file.write(tail)
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)
