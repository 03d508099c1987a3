"""The build: what it refuses, in one line, and what it does not do twice. No test here compiles the engine."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from exclusive import exclusive
from repository import ROOT

import llama_flash

SDIST = ROOT / "build/sdist"
SOURCE = "vendor/llama.cpp/src/weights.cpp"
ORIGINAL = "".join(f"line {i}\n" for i in range(20))
PATCH = f"""\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: llama-flash <llama-flash@localhost>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH] weights: change line 10

Because.
---
 {SOURCE} | 2 +-
 1 file changed, 1 insertion(+), 1 deletion(-)

diff --git a/{SOURCE} b/{SOURCE}
--- a/{SOURCE}
+++ b/{SOURCE}
@@ -8,7 +8,7 @@ line 6
 line 7
 line 8
 line 9
-line 10
+line ten
 line 11
 line 12
 line 13
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the repository without what was built."""
    target = tmp_path / "clone"
    shutil.copytree(
        ROOT,
        target,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.gguf", "__pycache__", ".*_cache"),
    )
    return target


@pytest.fixture
def small(clone: Path) -> Path:
    """A clone whose pinned engine is two files, already taken."""
    shutil.rmtree(clone / "patches")
    (clone / "patches").mkdir()
    pin_tiny_engine(clone, "1.0", ORIGINAL)
    return clone


def pin_tiny_engine(clone: Path, version: str, source: str) -> None:
    archive = clone / f"build/sdist/tiny_engine-{version}.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in ((SOURCE, source), ("llama_cpp/__init__.py", "x = 1\n"), (".git/HEAD", "ref\n")):
            member = tarfile.TarInfo(f"tiny_engine-{version}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (clone / "ci/engine/requirements.txt").write_text(f"tiny-engine=={version} --hash=sha256:{digest}\n")


def run(folder: Path, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True
    )


def lay_out(clone: Path) -> subprocess.CompletedProcess[str]:
    return run(clone, sys.executable, "ci/engine/tree.py")


def the_error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_second_build_has_nothing_to_do() -> None:
    def made() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for part in ("build/dist", ".venv/bin") for path in (ROOT / part).iterdir()
        }

    with exclusive("make"):
        before = made()
        result = run(ROOT, "make", "--no-print-directory", "build")
        after = made()
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "build: up to date"
    assert after == before


def test_wheel_holds_all_three_packages_and_each_library_once() -> None:
    (wheel,) = (ROOT / "build/dist").glob("*.whl")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and wheel.name.startswith(f"llama_cpp_python-{version[1]}-py3-none-")
    assert re.fullmatch(r"0\.3\.36\+flash\.\d+\.\d+\.\d+", version[1])
    assert llama_flash.__version__ == version[1].partition("+flash.")[2]
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "llama_cpp",
        "llama_flash",
        "gguf_tools",
    }
    libraries = {Path(name).name for name in names if "/lib/" in name}
    built = (
        "llama",
        "ggml",
        "ggml-base",
        "ggml-cpu",
        "ggml-rpc",
        "mtmd",
        "llama-common",
        "llama-server-impl",
        "llama-tools",
    )
    assert libraries == {f"lib{x}.so" for x in (*built, "llama_flash", "llama_flash_cpu")}
    for needed in ("llama_cpp/llama.py", "llama_flash/py.typed", "llama_flash/native/bindings.py"):
        assert needed in names


def test_patches_apply_to_the_pinned_engine(clone: Path) -> None:
    (clone / "build").mkdir()
    (clone / "build/sdist").symlink_to(SDIST)
    result = lay_out(clone)
    assert result.returncode == 0, result.stderr
    assert (clone / "build/engine/vendor/llama.cpp/CMakeLists.txt").is_file()


def test_patched_tree_is_laid_out_once_and_untouched_files_stay(small: Path) -> None:
    assert lay_out(small).returncode == 0
    tree = small / "build/engine"
    assert (tree / SOURCE).read_text() == ORIGINAL
    assert not (tree / ".git").exists()

    def times() -> dict[str, int]:
        return {str(path.relative_to(tree)): path.stat().st_mtime_ns for path in tree.rglob("*.*") if path.is_file()}

    before = times()
    assert lay_out(small).stdout == ""
    assert times() == before

    patch = small / "patches/0001-weights-change-line-10.patch"
    patch.write_text(PATCH)
    assert lay_out(small).returncode == 0
    assert (tree / SOURCE).read_text() == ORIGINAL.replace("line 10\n", "line ten\n")
    after = times()
    assert after["llama_cpp/__init__.py"] == before["llama_cpp/__init__.py"]
    assert after[SOURCE] != before[SOURCE]

    patch.unlink()
    assert lay_out(small).returncode == 0
    assert (tree / SOURCE).read_text() == ORIGINAL


def test_patch_may_add_and_remove_files(small: Path) -> None:
    added = "vendor/llama.cpp/src/new.cpp"
    (small / "patches/0001-add.patch").write_text(
        f"diff --git a/{added} b/{added}\nnew file mode 100644\n--- /dev/null\n+++ b/{added}\n@@ -0,0 +1 @@\n+int x;\n"
    )
    removed = "llama_cpp/__init__.py"
    (small / "patches/0002-remove.patch").write_text(
        f"diff --git a/{removed} b/{removed}\ndeleted file mode 100644\n"
        f"--- a/{removed}\n+++ /dev/null\n@@ -1 +0,0 @@\n-x = 1\n"
    )
    assert lay_out(small).returncode == 0
    tree = small / "build/engine"
    assert (tree / added).read_text() == "int x;\n"
    assert not (tree / removed).exists()
    for patch in (small / "patches").iterdir():
        patch.unlink()
    assert lay_out(small).returncode == 0
    assert not (tree / added).exists()
    assert (tree / removed).read_text() == "x = 1\n"


def test_patch_may_change_a_last_line_without_newline(small: Path) -> None:
    # the first patch takes the file's last newline away, the second builds on that
    change = "diff --git a/{0} b/{0}\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n{1}".format
    no_newline = "\\ No newline at end of file\n"
    name = "llama_cpp/__init__.py"
    (small / "patches/0001-a.patch").write_text(change(name, f"-x = 1\n+x = 2\n{no_newline}"))
    (small / "patches/0002-b.patch").write_text(change(name, f"-x = 2\n{no_newline}+x = 3\n{no_newline}"))
    result = lay_out(small)
    assert result.returncode == 0, result.stderr
    assert (small / "build/engine" / name).read_text() == "x = 3"


def test_patch_that_does_not_apply_is_one_line(small: Path) -> None:
    (small / "patches/0001-weights-change-line-10.patch").write_text(PATCH.replace("line 8", "line eight"))
    error = the_error(lay_out(small))
    assert "0001-weights-change-line-10.patch does not apply" in error
    assert SOURCE in error
    assert not (small / "build/engine").exists()


def test_wrong_hash_of_a_kept_sdist_is_one_line(small: Path) -> None:
    with next((small / "build/sdist").iterdir()).open("ab") as archive:
        archive.write(b"\0")
    assert "wrong hash" in the_error(lay_out(small))


def test_wrong_hash_of_a_taken_sdist_is_one_line(clone: Path) -> None:
    requirements = clone / "ci/engine/requirements.txt"
    text = requirements.read_text()
    requirements.write_text(text.replace("sha256:8", "sha256:9"))
    # pip itself takes it, from the folder where the build keeps it
    result = run(clone, sys.executable, "ci/engine/tree.py", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(SDIST))
    assert "wrong hash" in the_error(result)
    assert not list((clone / "build/sdist").iterdir())


def test_missing_compiler_is_one_line(clone: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "env"):
        found = shutil.which(tool)
        assert found
        (tools / tool).symlink_to(found)
    result = run(clone, "make", "build", f"PYTHON={sys.executable}", PATH=str(tools), CC="", CXX="")
    assert "no C++17 compiler found" in the_error(result)


def test_compiler_that_does_not_work_is_one_line(clone: Path) -> None:
    result = run(clone, "make", "build", f"PYTHON={sys.executable}", CXX="/no/such/compiler")
    assert "/no/such/compiler" in the_error(result)


@pytest.mark.skipif(not shutil.which("git"), reason="git is needed to make patches, not to build")
def test_patches_survive_a_round_trip_through_the_work_tree(small: Path) -> None:
    def worktree(*command: str) -> subprocess.CompletedProcess[str]:
        result = run(small, sys.executable, "ci/engine/worktree.py", *command)
        assert result.returncode == 0, result.stderr
        return result

    def patches() -> dict[str, str]:
        return {patch.name: patch.read_text() for patch in (small / "patches").iterdir()}

    (small / "patches/0001-weights-change-line-10.patch").write_text(PATCH)
    worktree("apply")
    work = small / "build/engine-work"
    assert "line ten" in (work / SOURCE).read_text()
    worktree("export")
    first = patches()

    (work / "llama_cpp/__init__.py").write_text("x = 2\n")
    refused = run(small, sys.executable, "ci/engine/worktree.py", "export")
    assert "not committed" in the_error(refused)
    assert run(work, "git", "commit", "--quiet", "--all", "--message", "llama_cpp: x is 2").returncode == 0
    worktree("export")
    second = patches()
    assert sorted(second) == ["0001-weights-change-line-10.patch", "0002-llama_cpp-x-is-2.patch"]
    assert second["0001-weights-change-line-10.patch"] == first["0001-weights-change-line-10.patch"]

    assert "exists" in the_error(run(small, sys.executable, "ci/engine/worktree.py", "apply"))
    worktree("apply", "--force")
    worktree("export")
    assert patches() == second
    assert lay_out(small).returncode == 0
    assert (small / "build/engine/llama_cpp/__init__.py").read_text() == "x = 2\n"


def test_patches_move_to_another_engine(small: Path) -> None:
    (small / "patches/0001-weights-change-line-10.patch").write_text(PATCH)
    assert run(small, sys.executable, "ci/engine/worktree.py", "apply").returncode == 0
    assert "already" in the_error(run(small, sys.executable, "ci/engine/worktree.py", "rebase"))

    # upstream has changed lines right beside the patch's: as text it applies no more, git can still place it
    moved = "a new first line\n" + ORIGINAL.replace("line 7\n", "line seven\n")
    pin_tiny_engine(small, "1.1", moved)
    assert "does not apply" in the_error(lay_out(small))
    rebased = run(small, sys.executable, "ci/engine/worktree.py", "rebase")
    assert rebased.returncode == 0, rebased.stderr
    assert run(small, sys.executable, "ci/engine/worktree.py", "export").returncode == 0
    assert lay_out(small).returncode == 0
    assert (small / "build/engine" / SOURCE).read_text() == moved.replace("line 10\n", "line ten\n")


def test_a_conflict_with_another_engine_is_settled_with_git(small: Path) -> None:
    (small / "patches/0001-weights-change-line-10.patch").write_text(PATCH)
    assert run(small, sys.executable, "ci/engine/worktree.py", "apply").returncode == 0
    changed = ORIGINAL.replace("line 10\n", "line X\n")
    pin_tiny_engine(small, "1.1", changed)
    assert "conflicts with tiny_engine-1.1" in the_error(run(small, sys.executable, "ci/engine/worktree.py", "rebase"))

    work = small / "build/engine-work"
    assert "not committed" in the_error(run(small, sys.executable, "ci/engine/worktree.py", "export"))
    (work / SOURCE).write_text(ORIGINAL.replace("line 10\n", "line ten\n"))
    assert run(work, "git", "add", "--all").returncode == 0
    assert run(work, "git", "-c", "core.editor=true", "rebase", "--continue").returncode == 0
    assert run(small, sys.executable, "ci/engine/worktree.py", "export").returncode == 0
    assert lay_out(small).returncode == 0
    assert "line ten" in (small / "build/engine" / SOURCE).read_text()
