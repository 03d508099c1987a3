"""File trees with /proc and /sys/fs/cgroup as machines have them, one text file each: "--- path", then the content."""

from __future__ import annotations

from pathlib import Path

from repository import TESTS

TREES = TESTS / "data/cgroup"
NAMES = sorted(path.stem for path in TREES.glob("*.txt"))


def unpack_all(root: Path) -> Path:
    """Writes each tree below `root`, in a directory with its name. Returns `root`."""
    for name in NAMES:
        for part in f"\n{(TREES / name).with_suffix('.txt').read_text()}".split("\n--- ")[1:]:
            path, _, content = part.partition("\n")
            file = root / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content + "\n")
    return root
