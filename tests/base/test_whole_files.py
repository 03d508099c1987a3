"""Files are there as a whole or not at all; what a killed process leaves, the next one to write there removes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType

from gguf_tools.source import KeyValue
from gguf_tools.stream import write_gguf
from llama_flash import kept_files, whole_files
from llama_flash.archives import write_archive
from llama_flash.planning import hot
from llama_flash.whole_files import temporary_folder, whole_file

# writes the first half and says so, then is killed or waits to be told to go on
WRITER = """
import sys
from pathlib import Path
from llama_flash.whole_files import temporary_folder, whole_file
with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.readline()
    file.write(b" whole")
"""


def begun(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    return process


def test_what_a_killed_process_left_is_removed_and_told_and_nothing_else(tmp_path: Path) -> None:
    path, told = tmp_path / "model.gguf", []
    others = [tmp_path / name for name in (".model.gguf.partial", ".model.gguf.0123456.partial", ".b.01234567.partial")]
    for other in others:
        other.write_bytes(b"not ours")
    with begun(path) as process:
        process.kill()
    (left,) = tmp_path.glob(".model.gguf.????????.partial")
    with whole_file(path, say=told.append) as file:
        file.write(b"new")
        assert not left.exists()
    assert path.read_bytes() == b"new" and sorted(tmp_path.iterdir()) == sorted([path, *others])
    (line,) = told
    assert str(left) in line and "4 B" in line


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with begun(path) as process:
        for _ in range(2):
            with whole_file(path) as file:
                file.write(b"mine")
        assert path.read_bytes() == b"mine"
        process.communicate("\n", timeout=400)
        assert process.returncode == 0
    assert path.read_bytes() == b"half whole" and list(tmp_path.iterdir()) == [path]


def test_many_writers_of_one_file_do_not_remove_each_others(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write(number: int) -> None:
        with whole_file(path) as file:
            file.write(bytes([number]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len(set(path.read_bytes())) == 1 and len(path.read_bytes()) == 1000
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_was_left_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "ordered.gguf"
    code = (
        "import os, sys, pathlib; from llama_flash.whole_files import temporary_folder\n"
        "with temporary_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'sequence').write_bytes(b'x' * 100); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    (left,) = tmp_path.iterdir()
    told: list[str] = []
    with temporary_folder(path, say=told.append) as folder, temporary_folder(path, say=told.append) as second:
        assert {folder, second} == set(tmp_path.iterdir()) and left not in (folder, second)
    assert len(told) == 1 and not list(tmp_path.iterdir())


def killed(command: list[str], folder: Path, pattern: str, **settings: str) -> None:
    """Runs a command and kills it as soon as there is something that fits the pattern; again if it was done before."""
    for _ in range(10):
        with subprocess.Popen(command, env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True) as process:
            while not list(folder.glob(pattern)) and not list(folder.iterdir()):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait(400)
        if list(folder.glob(pattern)):
            return
        for file in folder.iterdir():
            file.unlink()
    raise AssertionError("it was done before it was killed")


@pytest.mark.parametrize(
    "command", ["synthetic", *(pytest.param(name, marks=pytest.mark.full) for name in ("bundle", "reorder"))]
)
def test_a_killed_command_is_run_again_and_leaves_only_its_file(command: str, tmp_path: Path) -> None:
    tools = [sys.executable, "-m", "gguf_tools"]
    out, source, text = tmp_path / "out" / "b.gguf", tmp_path / "a.gguf", tmp_path / "text"
    out.parent.mkdir()
    if command == "synthetic":
        run = [sys.executable, "-m", "gguf_tools.synthetic", "opt-tiny", str(out), "--measure", "0"]
    else:
        make = [sys.executable, "-m", "gguf_tools.synthetic", "opt-tiny", str(source), "--measure", "0"]
        subprocess.run(make, check=True, capture_output=True)
        text.write_text("import os\n" * 20_000)
        run = [*tools, "bundle", str(source), str(out)]
        if command == "reorder":
            run = [*tools, "reorder", str(source), str(out), "--text", str(text), "--tokens", "4500"]
    killed(run, out.parent, ".b.gguf.????????.partial")
    again = subprocess.run(run, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "which a run that was killed had left unfinished" in again.stderr
    assert not [file for file in out.parent.iterdir() if file.name.startswith(".")] and out.exists()


def test_room_that_a_killed_run_takes_is_free_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    with begun(path) as process:
        process.kill()
    seen = []
    usage = whole_files.shutil.disk_usage

    def disk_usage(place: Path) -> object:
        seen.append(list(tmp_path.iterdir()))
        return usage(place)

    monkeypatch.setattr("gguf_tools.stream.shutil.disk_usage", disk_usage)
    write_gguf(path, {"general.architecture": KeyValue("x", GGUFValueType.STRING)}, [])
    assert seen == [[]]


def test_traces_and_snapshots_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with begun(path) as process:
        process.kill()
    assert len(list(tmp_path.iterdir())) == 1
    write_archive(path, a=np.arange(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def aged(path: Path, days: float) -> None:
    at = time.time() - 24 * 3600 * days
    os.utime(path, (at, at))


def test_of_each_kind_the_files_that_were_used_last_are_kept(cache: Path, tmp_path: Path) -> None:
    models = [tmp_path / f"model-{number}.gguf" for number in range(kept_files.MOST + 6)]
    for age, model in enumerate(models[:-1]):
        file = hot.save(model, "mark", np.arange(3, dtype=np.uint64))
        assert file is not None
        aged(file, 1 + age / 100)
    beside = [cache / "hot" / name for name in ("notes.hot", "model-0123456789abcdef.json")]
    for file in beside:
        file.write_bytes(b"somebody else's")
        aged(file, 999)
    oldest = kept_files.MOST + 4
    assert len(hot.load(models[0], "mark")) == 3
    last = hot.save(models[-1], "mark", np.arange(3, dtype=np.uint64))
    kept = [model for model in models if len(hot.load(model, "mark"))]
    assert last is not None and len(kept) == kept_files.MOST
    assert models[-1] in kept and models[0] in kept and models[oldest] not in kept
    assert all(file.exists() for file in beside)


def test_what_was_not_used_for_half_a_year_goes_and_a_use_counts(cache: Path, tmp_path: Path) -> None:
    unused, used, new = (tmp_path / f"{name}.gguf" for name in ("unused", "used", "new"))
    for model in (unused, used):
        file = hot.save(model, "mark", np.arange(3, dtype=np.uint64))
        assert file is not None
        aged(file, 181)
    assert len(hot.load(used, "mark")) == 3
    hot.save(new, "mark", np.arange(3, dtype=np.uint64))
    assert [len(hot.load(model, "mark")) for model in (unused, used, new)] == [0, 3, 3]


def test_processes_that_keep_files_at_the_same_time_do_not_fail(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, numpy as np; from llama_flash import kept_files\n"
        "from llama_flash.planning import hot; kept_files.MOST = 4\n"
        "for i in range(60):\n"
        "    assert hot.save(pathlib.Path(f'{sys.argv[1]}-{i % 9}.gguf'), 'm', np.arange(9, dtype=np.uint64))\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, f"model-{n}"]) for n in range(4)]
    assert [process.wait(900) for process in processes] == [0] * 4
    left = list((cache / "hot").iterdir())
    assert 1 <= len(left) <= 4 + 4 and all(file.suffix == ".hot" for file in left)


def test_a_cache_that_is_full_of_left_files_is_cleared(cache: Path, tmp_path: Path) -> None:
    first = hot.save(tmp_path / "a.gguf", "mark", np.arange(3, dtype=np.uint64))
    assert first is not None
    other = first.with_name("b-0123456789abcdef.hot")
    with begun(other) as process:
        process.kill()
    assert hot.save(tmp_path / "a.gguf", "mark", np.arange(3, dtype=np.uint64)) == first
    assert list(first.parent.iterdir()) == [first]
