"""Lays out build/engine: the pinned engine with `patches/` applied, the tree that is compiled.

Files that a new set of patches leaves alone keep their modification times, so that only what changed is compiled.
Run by CMake at configure time; does nothing when the tree is up to date.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import patches
import sdist
from report import BuildError, run_main, step

LAYOUT = 4  # change it when SHIPPED or the way files are written changes
STATE = ".llama-flash-tree.json"
# what the build reads, as beginnings of paths; the rest of the sdist (tests, examples) stays in the archive
SHIPPED = (
    "LICENSE.md",
    "llama_cpp/",
    "vendor/llama.cpp/CMakeLists.txt",
    "vendor/llama.cpp/LICENSE",
    "vendor/llama.cpp/cmake/",
    "vendor/llama.cpp/common/",
    "vendor/llama.cpp/ggml/",
    "vendor/llama.cpp/include/",
    "vendor/llama.cpp/licenses/",
    "vendor/llama.cpp/scripts/ui-assets.cmake",
    "vendor/llama.cpp/src/",
    "vendor/llama.cpp/tools/cli/cli",
    "vendor/llama.cpp/tools/imatrix/imatrix.cpp",
    "vendor/llama.cpp/tools/llama-bench/llama-bench.cpp",
    "vendor/llama.cpp/tools/mtmd/",
    "vendor/llama.cpp/tools/perplexity/perplexity.cpp",
    "vendor/llama.cpp/tools/quantize/quantize.cpp",
    "vendor/llama.cpp/tools/server/CMakeLists.txt",
    "vendor/llama.cpp/tools/server/main.cpp",
    "vendor/llama.cpp/tools/server/server",
    "vendor/llama.cpp/tools/ui/CMakeLists.txt",
    "vendor/llama.cpp/tools/ui/sources.cmake",
    "vendor/llama.cpp/tools/ui/ui.",
    "vendor/llama.cpp/vendor/",
)


def members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The regular files of the sdist by their path below its top folder; its .git is left out."""
    for member in archive:
        _, _, path = member.name.partition("/")
        if member.isfile() and path and ".." not in path.split("/") and not path.startswith((".git/", "/")):
            yield path, member


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read()


def _touched(patch_files: list[Path]) -> set[str]:
    touched: set[str] = set()
    for patch in patch_files:
        for line in patch.read_text(encoding="utf-8").splitlines():
            if line.startswith(("--- a/", "+++ b/")):
                touched.add(line[6:].split("\t")[0])
    return touched


def _write(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def lay_out(output: Path, patch_folder: Path, archive_path: Path, archive_sha256: str) -> bool:
    """Brings `output` up to date; False if it was. If a patch does not apply: BuildError, and nothing has changed."""
    patch_files = patches.find(patch_folder)
    digest = hashlib.sha256(f"{LAYOUT} {archive_sha256}".encode())
    for patch in patch_files:
        digest.update(patch.read_bytes())
    key = digest.hexdigest()

    state_path = output / STATE
    state = json.loads(state_path.read_text()) if state_path.is_file() else {}
    if state.get("key") == key:
        return False
    fresh = state.get("sdist") != archive_sha256 or state.get("layout") != LAYOUT
    formerly_touched = set(state.get("touched", []))
    touched = _touched(patch_files)

    with step("laying out the patched engine"):
        pristine: dict[str, bytes] = {}
        laid: dict[str, bytes] = {}
        with tarfile.open(archive_path) as archive:
            for path, member in members(archive):
                shipped = path.startswith(SHIPPED)
                if path in touched or (path in formerly_touched and shipped) or (fresh and shipped):
                    data = content(archive, member)
                    pristine[path] = data
                    if shipped:
                        laid[path] = data
        patched = patches.apply_all(patch_files, pristine.get)

        # no state while files are being written: an interrupted run starts over
        state_path.unlink(missing_ok=True)
        if fresh and output.exists():
            shutil.rmtree(output)
        for path in formerly_touched - laid.keys() - patched.keys():
            _write(output / path, None)
        wanted: patches.Tree = {**laid, **patched}
        for path in wanted:
            _write(output / path, wanted[path])
        output.mkdir(parents=True, exist_ok=True)
        state_path.write_text(
            json.dumps({"key": key, "sdist": archive_sha256, "layout": LAYOUT, "touched": sorted(patched)})
        )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=sdist.ROOT / "build/engine")
    parser.add_argument("--patches", type=Path, default=sdist.ROOT / "patches")
    args = parser.parse_args()
    with _locked(args.output.parent / f".{args.output.name}.lock"):
        archive = sdist.fetch()
        try:
            lay_out(args.output, args.patches, archive, sdist.read_pin().sha256)
        except (OSError, tarfile.TarError) as e:
            raise BuildError(f"cannot lay out {args.output}: {e}") from e


if __name__ == "__main__":
    run_main(main)
