"""The probe reads what it says it reads, leaves nothing behind, and what is kept of it is used or passed over."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from engines import IO_ENGINES
from hypothesis import given
from hypothesis import strategies as st

import llama_flash
from llama_flash import DeviceProfile, FlashError, FlashOffload, FlashReadError
from llama_flash.device import kept as profiles
from llama_flash.device import profile as device_profile
from llama_flash.device.identity import Device, device_of
from llama_flash.device.profile import (
    CHUNKS,
    DEPTHS,
    ReadRate,
    default_profile,
    measure,
    measure_dram,
    probe_reads,
    quick_profile,
)
from llama_flash.kept_files import cache_folder
from llama_flash.planning.reads import io_choice

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("probe") / "file"
    path.write_bytes(os.urandom(8 * MIB + 1234))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    yield path
    path.unlink()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured, but not for long."""
    monkeypatch.setattr(device_profile, "_TEMPORARY", 40 * MIB)
    monkeypatch.setattr(device_profile, "_CELL_SECONDS", 0.002)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(folder))
    return folder


# the probe


def open_files() -> list[str]:
    """What this process has open; other threads open and close files at any time."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return found


def device_bytes() -> int:
    """Bytes that this process has had read from devices."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


@pytest.mark.parametrize("io_engine", IO_ENGINES)
@pytest.mark.parametrize(("chunk", "depth"), [(4 * KIB, 1), (4 * KIB, 128), (64 * KIB, 7), (MIB, 32), (8 * MIB, 4)])
def test_every_read_is_counted_and_the_depth_is_kept(io_engine: Any, chunk: int, depth: int, file: Path) -> None:
    before = device_bytes()
    probe = probe_reads(file, chunk, depth, 0.02, io_engine)
    assert probe.reads >= depth
    assert probe.bytes == probe.reads * chunk
    assert probe.in_flight == depth
    assert 0 < probe.latency_ns <= probe.ns
    assert 0 < probe.latency_p99_ns <= probe.ns
    # no more reads can have been under way at once than there were, on average over the time
    assert probe.latency_ns * probe.reads <= 1.01 * depth * probe.ns
    assert probe.io_engine == {"io_uring": 1, "pread": 2}[io_engine]
    if probe.direct:
        assert device_bytes() - before >= probe.bytes, "they came from the device, not from the page cache"


def test_it_reads_for_as_long_as_told(file: Path) -> None:
    assert probe_reads(file, 4 * KIB, 1, 0.1).ns >= 100_000_000


def test_a_missing_file_is_a_read_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FlashReadError, match=r"missing\.gguf") as error:
        probe_reads(tmp_path / "missing.gguf", 4 * KIB, 1, 0.01)
    assert (error.value.errno, error.value.file) == (errno.ENOENT, str(tmp_path / "missing.gguf"))


@pytest.mark.parametrize("io_engine", IO_ENGINES)
def test_a_read_that_fails_is_an_error(io_engine: Any, tmp_path: Path) -> None:
    with pytest.raises(FlashReadError) as error:
        probe_reads(tmp_path, 4 * KIB, 32, 0.01, io_engine)  # a directory can be opened, not read
    assert error.value.errno == errno.EISDIR


@pytest.mark.parametrize(
    ("chunk", "depth", "said"),
    [
        (16 * MIB, 1, "fewer than one chunk"),
        (1000, 1, "multiple of 4096"),
        (0, 1, "multiple"),
        (4096, 5000, "at most 4096"),
    ],
)
def test_chunks_and_depths_that_make_no_sense_are_refused(chunk: int, depth: int, said: str, file: Path) -> None:
    with pytest.raises(FlashError, match=said):
        probe_reads(file, chunk, depth, 0.01)


# the profile


@pytest.mark.usefixtures("quick")
def test_a_directory_is_measured_with_a_file_that_nobody_ever_sees(tmp_path: Path, cache: Path) -> None:
    seen: list[tuple[float, str, list[str]]] = []
    profile = llama_flash.profile(tmp_path, report=lambda share, what: seen.append((share, what, os.listdir(tmp_path))))
    assert profile.source == "measured"
    assert profile.device == device_of(tmp_path)
    assert profile.file_bytes == 40 * MIB
    assert {read.chunk for read in profile.reads} == set(CHUNKS)
    assert {read.depth for read in profile.reads} == set(DEPTHS)
    assert all(read.bytes_per_second > 0 and read.latency > 0 and read.reads >= read.depth for read in profile.reads)
    assert 1e8 < profile.dram < 1e13
    shares = [share for share, *_ in seen]
    assert (shares[0], shares[-1]) == (0.0, 1.0) and shares == sorted(shares)
    assert all(names in ([], ["cache"]) for *_, names in seen), "the file has no name"
    assert os.listdir(tmp_path) == ["cache"] and len(os.listdir(cache)) == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("when", ["writing", "reads of"])
def test_an_interrupt_leaves_nothing_behind(when: str, tmp_path: Path) -> None:
    def interrupt(_: float, what: str) -> None:
        if when in what:
            raise KeyboardInterrupt

    # a file without a name is gone with its last descriptor and mapping (free bytes of the disk are others', too)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, report=interrupt)
    assert os.listdir(tmp_path) == []
    assert not [target for target in open_files() if target.startswith(f"{tmp_path}/")]
    assert f"{tmp_path}/" not in Path("/proc/self/maps").read_text(), "a mapping would keep the file's bytes"


@pytest.mark.usefixtures("quick")
def test_a_large_file_is_read_itself(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_profile, "_LARGE_FILE", MIB)
    assert measure(file).file_bytes == file.stat().st_size
    monkeypatch.setattr(device_profile, "_LARGE_FILE", 9 * MIB)
    assert measure(file).file_bytes == 40 * MIB, "a small one is not: a temporary one beside it"


def test_a_missing_path_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        llama_flash.profile(tmp_path / "no")


def test_what_is_neither_file_nor_directory_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        llama_flash.profile("/dev/null")


def test_a_file_that_may_not_be_read_is_a_permission_error(file: Path) -> None:
    script = f"""
import os
from llama_flash.device import profile as device_profile
device_profile._LARGE_FILE = 1
if os.geteuid() == 0:
    os.setuid(65534)
try:
    device_profile.measure({str(file)!r})
except PermissionError as error:
    print("refused", error.filename)
"""
    file.chmod(0)
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400)
    finally:
        file.chmod(0o644)
    assert done.stdout.strip() == f"refused {file}", done.stderr


def test_a_directory_without_space_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 * MIB))
    with pytest.raises(OSError, match=r"32\.0 MiB") as error:
        measure(tmp_path)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("limit", "file_bytes"), [(36 * MIB, 32 * MIB), (20 * MIB, None)])
def test_a_device_that_fills_up_while_writing(limit: int, file_bytes: int | None, tmp_path: Path) -> None:
    """The file is as large as it could be, or that is an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores SIGXFSZ: writes fail
    try:
        if file_bytes is None:
            with pytest.raises(OSError, match="needs") as error:
                measure(tmp_path)
            assert error.value.errno == errno.ENOSPC
        else:
            assert measure(tmp_path).file_bytes == file_bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_a_profile_the_model_file_is_probed_and_without_that_defaults_are_taken(
    file: Path, tmp_path: Path, cache: Path
) -> None:
    assert quick_profile(file).source == profiles.profile_for(file).source == "quick probe"
    tiny = tmp_path / "tiny"
    tiny.write_bytes(bytes(100))
    assert quick_profile(tiny).source == profiles.profile_for(tiny).source == "defaults"
    assert not cache.exists(), "neither is kept"


def test_the_defaults_cover_everything_and_promise_little(tmp_path: Path) -> None:
    profile = default_profile(tmp_path)
    assert {(read.chunk, read.depth) for read in profile.reads} == {(c, d) for c in CHUNKS for d in DEPTHS}
    assert max(read.bytes_per_second for read in profile.reads) <= 500e6
    assert profile.dram <= 10e9
    assert profile.rate(4096, 1) < profile.rate(4096, 32) < profile.rate(MIB, 32)


def test_memory_is_not_measured_where_there_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_profile, "_room", lambda: 10 * MIB)
    assert measure_dram() == device_profile._DEFAULT_DRAM


# rates


def made_of(rates: dict[tuple[int, int], float]) -> DeviceProfile:
    reads = tuple(ReadRate(chunk, depth, rate, 1e-4, 2e-4, 10) for (chunk, depth), rate in rates.items())
    device = Device("8:0", "sda", "MODEL", "SERIAL", "ext4")
    return DeviceProfile(device, "2026-01-01T00:00:00+00:00", "measured", "pread", True, 1 << 30, 1e10, reads)


SOME = made_of({(4096, 1): 50e6, (4096, 32): 200e6, (65536, 1): 400e6, (65536, 32): 1600e6})


def test_measured_rates_are_given_back_and_the_ends_hold_beyond_them() -> None:
    for read in SOME.reads:
        assert SOME.rate(read.chunk, read.depth) == pytest.approx(read.bytes_per_second)
    assert SOME.rate(1 << 30, 1000) == pytest.approx(1600e6)
    assert SOME.rate(4096, 0.5) == pytest.approx(50e6)
    assert SOME.rate(1024, 1) == pytest.approx(50e6 / 4), "as many reads per second, of fewer bytes"


def test_between_measured_rates_is_the_middle_on_logarithmic_scales() -> None:
    assert SOME.rate(16384, 1) == pytest.approx((50e6 * 400e6) ** 0.5)
    assert SOME.rate(65536, 32**0.5) == pytest.approx(800e6)


@given(st.floats(512, 1 << 24), st.floats(1, 500), st.floats(1, 4), st.floats(1, 4))
def test_larger_reads_and_more_of_them_are_never_slower_where_none_of_the_measured_is(
    chunk: float, depth: float, more: float, deeper: float
) -> None:
    assert SOME.rate(chunk * more, depth * deeper) >= SOME.rate(chunk, depth) * (1 - 1e-9)


# what is kept


@pytest.fixture
def kept(tmp_path: Path, cache: Path) -> tuple[DeviceProfile, Path]:
    """A profile of the device of tmp_path, and its file."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    profile = replace(SOME, device=device_of(tmp_path), measured=now)
    path = profiles.remember(profile)
    assert path is not None and path.parent == cache
    return profile, path


def test_a_profile_is_kept_for_the_device(kept: tuple[DeviceProfile, Path], tmp_path: Path) -> None:
    profile, path = kept
    (tmp_path / "model.gguf").touch()
    assert profiles.recall(tmp_path / "model.gguf") == replace(profile, source="cached")
    assert profiles.profile_for(tmp_path / "model.gguf").source == "cached"
    assert json.loads(path.read_text())["measured"] == profile.measured


def changed(profile: DeviceProfile, **values: Any) -> bytes:
    return json.dumps({**profile.as_dict(), **values}).encode()


@pytest.mark.parametrize(
    "content",
    [
        lambda _: b"",
        lambda _: b"{",
        lambda _: b"[" * 100_000,
        lambda _: b"\xff\xfe",
        lambda _: b"[]",
        lambda _: b"{}",
        lambda p: changed(p, version=0),
        lambda p: changed(p, version="1"),
        lambda p: changed(p, measured=(datetime.now(timezone.utc) - timedelta(days=200)).isoformat()),
        lambda p: changed(p, measured=(datetime.now(timezone.utc) + timedelta(days=2)).isoformat()),
        lambda p: changed(p, measured="yesterday"),
        lambda p: changed(p, measured=None),
        lambda p: changed(p, device={**p.as_dict()["device"], "serial": "another"}),
        lambda p: changed(p, device="sda"),
        lambda p: changed(p, dram=float("nan")),
        lambda p: changed(p, dram="fast"),
        lambda p: changed(p, dram=-1.0),
        lambda p: changed(p, reads=[]),
        lambda p: changed(p, reads=[{"chunk": 4096}]),
        lambda p: changed(p, reads=[{**p.as_dict()["reads"][0], "bytes_per_second": 0}]),
        lambda p: changed(p, surprise=1),
    ],
)
def test_a_damaged_or_stale_profile_is_passed_over_with_one_line(
    content: Any, kept: tuple[DeviceProfile, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile, path = kept
    path.write_bytes(content(profile))
    with caplog.at_level(logging.DEBUG, logger="llama_flash"):
        assert profiles.recall(tmp_path) is None
    (record,) = caplog.records
    assert path.name in record.getMessage()
    assert "\n" not in record.getMessage()


def test_no_profile_is_no_news(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="llama_flash"):
        assert profiles.recall(tmp_path) is None
    assert not caplog.records


@pytest.mark.usefixtures("quick")
def test_a_cache_folder_that_cannot_be_written_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path / "file" / "folder"))
    assert llama_flash.profile(tmp_path).source == "measured"
    assert ["not kept" in record.getMessage() for record in caplog.records] == [True]
    monkeypatch.setenv("LLAMA_FLASH_CACHE", "/proc/nothing")
    assert profiles.remember(SOME) is None


def test_a_write_that_fails_leaves_the_old_profile_and_no_other_file(
    kept: tuple[DeviceProfile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, path = kept
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert profiles.remember(replace(profile, dram=1.0)) is None
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_folder_is_the_named_one_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_FLASH_CACHE", "/named")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/named")
    monkeypatch.delenv("LLAMA_FLASH_CACHE")
    assert cache_folder() == Path("/xdg/llama-flash")
    monkeypatch.setenv("HOME", "/home/user")
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == Path("/home/user/.cache/llama-flash")


# devices


def tree(tmp_path: Path, root: Path, mounted: str, files: dict[str, str]) -> Device:
    """device_of(tmp_path) in a /proc and /sys with one disk, nvme0n1, where tmp_path is on its first partition."""
    number = os.stat(tmp_path).st_dev
    number_text = f"{os.major(number)}:{os.minor(number)}"
    disk = root / "sys/devices/pci/nvme0n1"
    (disk / "p1").mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(
        f"22 1 0:5 / /proc rw - proc proc rw\n23 1 {number_text} / /data rw shared:1 - {mounted} rw,discard\n"
    )
    for name, content in files.items():
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_text(content)
    if files:
        (root / "sys/dev/block").mkdir(parents=True)
        (root / f"sys/dev/block/{number_text}").symlink_to(disk / "p1")
    return device_of(tmp_path, root)


def test_a_partition_is_known_by_its_disk(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = {
        "p1/partition": "1\n",
        "device/model": "FAST SSD  \n",
        "device/serial": "S123\n",
        "queue/rotational": "0\n",
    }
    device = tree(tmp_path, tmp_path_factory.mktemp("root"), "ext4 /dev/nvme0n1p1", files)
    assert (device.name, device.model, device.serial, device.file_system) == ("nvme0n1", "FAST SSD", "S123", "ext4")
    assert not device.rotational
    assert device.key != replace(device, serial="S124").key
    assert str(device) == "nvme0n1 (FAST SSD, ext4)"


def test_without_a_block_device_it_is_what_is_mounted(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    device = tree(tmp_path, tmp_path_factory.mktemp("root"), "nfs4 server:/a\\040b", {})
    assert (device.name, device.model, device.file_system) == ("server:/a b", "", "nfs4")


def test_a_profile_decides_what_the_options_leave_open(file: Path) -> None:
    """Reads in flight and I/O engine of a load; what is no measurement decides nothing."""
    guessed = default_profile(file)
    reads = tuple(
        ReadRate(chunk, depth, 1e9 * min(depth, 16), 1e-4, 1e-4)
        for chunk in (4 * KIB, 1024 * KIB)
        for depth in (1, 16, 128)
    )
    known = replace(guessed, source="cached", faster="pread", reads=reads)
    assert io_choice(FlashOffload(), None, known) == ("pread", 16)
    assert io_choice(FlashOffload(io_engine="io_uring", io_depth=5), None, known) == ("io_uring", 5)
    for profile in (None, guessed, replace(known, source="quick probe")):
        assert io_choice(FlashOffload(), None, profile) == ("auto", 32)
