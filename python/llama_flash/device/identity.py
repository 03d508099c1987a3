"""Which device a file lies on: what a profile is remembered by."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Device", "device_of"]

_ESCAPED = re.compile(r"\\([0-7]{3})")  # spaces and such in /proc/self/mountinfo


@dataclass(frozen=True)
class Device:
    """A block device, or what stands for one, and the file system on it."""

    number: str  # major:minor of the file system
    name: str  # of the whole device: "nvme0n1"; else what is mounted: "tmpfs", "server:/export"
    model: str  # "" where it is not told
    serial: str
    file_system: str  # "ext4", "" where it is not known
    rotational: bool = False

    @property
    def key(self) -> str:
        """The same for the same device and file system, after a reboot too unless devices are numbered anew."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if name != "rotational")

    def __str__(self) -> str:
        about = ", ".join(part for part in (self.model, self.file_system) if part)
        return f"{self.name} ({about})" if about else self.name


def device_of(path: str | os.PathLike[str], root: Path = Path("/")) -> Device:
    """The device that holds `path`.

    Args:
        root: root of the file system whose /proc and /sys are read.

    Raises:
        OSError: there is no such file.
    """
    number = os.stat(path).st_dev
    major, minor = os.major(number), os.minor(number)
    file_system, source = _mount(f"{major}:{minor}", root)
    block = root / f"sys/dev/block/{major}:{minor}"
    if not block.exists() and source.startswith("/dev/"):
        # btrfs, overlays of one device: the number is the file system's own
        try:
            behind = os.stat(source).st_rdev
            block = root / f"sys/dev/block/{os.major(behind)}:{os.minor(behind)}"
        except OSError:
            pass
    if not block.exists():
        return Device(f"{major}:{minor}", source or f"{major}:{minor}", "", "", file_system)
    whole = block.resolve()
    if (whole / "partition").exists():
        whole = whole.parent
    name = _text(whole / "dm/name") or whole.name
    return Device(
        f"{major}:{minor}",
        name,
        _text(whole / "device/model"),
        _text(whole / "device/serial") or _text(whole / "serial") or _text(whole / "wwid"),
        file_system,
        _text(whole / "queue/rotational") == "1",
    )


def _mount(number: str, root: Path) -> tuple[str, str]:
    """Type and source of the file system with this number; empty where it is not mounted here."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [number] and len(fields := after.split()) >= 2:
            return fields[0], _ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), fields[1])
    return "", ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
