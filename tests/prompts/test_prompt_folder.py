"""The folder of prompts: whose it is, what is followed, what goes when it is full."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llama_flash.prompts import folder as folders
from llama_flash.prompts.folder import Folder, FolderError

KEYS = [f"{number:064x}" for number in range(6)]


def put(folder: Folder, name: str, size: int, used: float) -> None:
    partial, fd = folder.begin()
    os.close(fd)
    (folder.path / partial).write_bytes(bytes(size))
    folder.finish(partial, name)
    folder.touch(name, used)


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a" / "prompts")
    put(folder, f"{KEYS[0]}.cells", 10, 1.0)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / f"{KEYS[0]}.cells").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o770, 0o707])
def test_one_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts").chmod(mode)
    with pytest.raises(FolderError, match="others may look into it"):
        Folder(tmp_path / "prompts")


def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(FolderError, match="belongs to another user"):
        Folder(tmp_path / "prompts")


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    folder, now = Folder(tmp_path / "prompts"), time.time()
    for number, key in enumerate(KEYS):
        put(folder, f"{key}.cells", 64 << 10, now - 100 * number)
    sizes = {entry.name: entry.size for entry in folder.entries()}
    assert set(sizes.values()) == {64 << 10}
    assert folder.evict(6 << 16) == 6 << 16  # all of it fits
    assert folder.evict(4 << 16) <= 4 << 16
    assert {entry.name for entry in folder.entries()} == {f"{key}.cells" for key in KEYS[:3]}


def test_only_names_of_ours_are_counted_or_removed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "prompts")
    others = ["notes.txt", f"{KEYS[0]}.txt", "../x", f"{KEYS[0][1:]}.cells", f"{KEYS[0].upper()}A.cells", ".hidden"]
    for name in (name for name in others if "/" not in name):
        (folder.path / name).write_bytes(bytes(100_000))
    (folder.path / f"{KEYS[1]}.cells").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(b"mine")
    before = sorted(os.listdir(folder.path))
    assert list(folder.entries()) == [] and folder.evict(0) == 0
    assert folder.open(f"{KEYS[1]}.cells") is None and not folder.holds(f"{KEYS[1]}.cells")
    assert sorted(os.listdir(folder.path)) == before and (tmp_path / "elsewhere").read_bytes() == b"mine"


def test_what_a_killed_process_has_begun_goes_when_it_is_old(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "prompts")
    names = [folder.begin()[0] for _ in range(2)]
    os.utime(folder.path / names[0], (1.0, 1.0))
    assert list(folder.entries()) == []
    assert os.listdir(folder.path) == [names[1]]


def test_a_folder_with_too_many_files_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MOST_ENTRIES", 3)
    folder = Folder(tmp_path / "prompts")
    for key in KEYS[:4]:
        put(folder, f"{key}.state", 1, 1.0)
    with pytest.raises(FolderError, match="more than 3 files"):
        folder.evict(0)
