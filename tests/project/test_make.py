"""Every target of the Makefile is run by a test, at its smallest: here, or where COVERED says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
from exclusive import exclusive
from repository import ROOT

TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
COVERED = {
    "build": "tests/project/test_build.py",
    "wheel": "tests/project/test_wheel.py",
    "test-boards": "tests/project/test_boards.py",
    "demo": ".ci/run",
    "test": ".ci/run",
}
SECONDS = 3600.0  # a target may take, with what it compiles


def make(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # the variables of a make that runs these tests are not for those that they run
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS")}
    with exclusive("make") if folder == ROOT else nullcontext():
        return subprocess.run(
            ["make", "--no-print-directory", *map(str, arguments)],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )


def made(folder: Path, *arguments: str | Path) -> str:
    """What it prints. It ends well."""
    result = make(folder, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tracked(folder: Path) -> dict[Path, bytes]:
    """What a target may have written into the tree: all but what is built, and caches."""
    left_out = {".git", ".venv", "build", "dist", "__pycache__"}
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not left_out & set(path.relative_to(folder).parts)
        and not any(part.endswith("_cache") for part in path.parts)
    }


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the repository that uses what is built here: for targets that change the tree."""
    assert made(ROOT, "build").strip() == "build: up to date"  # so that the copy builds nothing
    target = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, target, ignore=ignored)
    (target / "build").mkdir()
    (target / "build/sdist").symlink_to(ROOT / "build/sdist")
    if (made_before := ROOT / "build/ui/made").exists():  # a part of what was built
        (target / "build/ui").mkdir()
        shutil.copy(made_before, target / "build/ui")
    (target / ".venv").symlink_to(ROOT / ".venv")
    return target


def test_every_target_is_run_by_a_test() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    run_here = set(re.findall(r'(?:make|made)\(\s*(?:ROOT|clone),\s*"([a-z-]+)"', here))
    for target, place in COVERED.items():
        text = (ROOT / place).read_text(encoding="utf-8")
        assert re.search(rf'make {target}\b|"make", .*"{target}"', text), f"{place} does not run `make {target}`"
    assert set(TARGETS) == run_here | set(COVERED)


def test_make_lists_its_targets() -> None:
    listed = re.findall(r"^  make ([a-z-]+) ", made(ROOT, "help"), re.MULTILINE)
    assert sorted([*listed, "integrations"]) == sorted(TARGETS)


@pytest.mark.full
def test_lint_ends_well() -> None:
    assert "Success" in made(ROOT, "lint")


@pytest.mark.full
def test_format_leaves_formatted_code_as_it_is(clone: Path) -> None:
    before = tracked(clone)
    made(clone, "format")
    assert tracked(clone) == before


@pytest.mark.full
def test_the_whole_matrix_is_collected() -> None:
    """Not run: it would start itself."""
    made(ROOT, "integrations")
    collected = made(ROOT, "test-full", "ARGS=--collect-only -q tests/project/test_make.py")
    assert "test_make.py::test_the_whole_matrix_is_collected" in collected


@pytest.mark.full
def test_ui_says_what_it_needs(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With npm it would take packages from the network: without it, it has laid out the page's sources by then."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "python3", "sh"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    refused = make(clone, "ui")
    assert refused.returncode != 0 and "npm is not there" in refused.stderr, refused.stdout + refused.stderr
    assert (clone / "build/ui/sources/package.json").is_file()


@pytest.mark.full
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_a_test_runs_under_the_sanitizer(kind: str) -> None:
    output = made(ROOT, "sanitize", f"ARGS=--kind {kind} tests/answers/test_lookahead.py")
    assert re.search(r"^\d+ passed", output.splitlines()[-2].strip("= ")), output
    assert output.endswith("sanitize: clean\n")


@pytest.mark.full
def test_bench_measures_a_case(tmp_path: Path) -> None:
    out, models = tmp_path / "bench.json", tmp_path / "models"
    made(ROOT, "bench", f"ARGS=--quick --cases moe-50-naive --tokens 8 --out {out} --models {models}")
    (outcome,) = json.loads(out.read_text())["outcomes"]
    assert outcome["case"] == "moe-50-naive" and all(run["ok"] for run in outcome["runs"]), outcome
    assert not list(models.iterdir())


@pytest.mark.full
def test_reproduce_draws_all_that_it_has(tmp_path: Path) -> None:
    out, models = tmp_path / "out", tmp_path / "models"
    made(
        ROOT,
        "reproduce",
        f"ARGS=--quick --layers 1 --rungs window --share 0.9 --tokens 8 --out {out} --models {models}",
    )
    assert {"figure2.png", "figure4.png", "ladder.csv", "tables.md"} <= {path.name for path in out.iterdir()}
    assert not json.loads((out / "reproduce.json").read_text())["failed"]
    assert not list(models.iterdir())


@pytest.mark.full
def test_patches_come_back_as_they_were(clone: Path) -> None:
    before = tracked(clone)
    assert "patches applied" in made(clone, "patch-apply")
    refused = make(clone, "patch-rebase")
    assert refused.returncode != 0 and "pin another engine" in refused.stderr, refused.stderr
    assert made(clone, "patch-export").endswith(" patches, 0 changes\n")
    assert tracked(clone) == before


@pytest.mark.full
def test_what_is_generated_comes_back_as_it_was(clone: Path) -> None:
    before = tracked(clone)
    made(clone, "bindings")
    made(clone, "reference")
    assert tracked(clone) == before


@pytest.mark.full
def test_clean_removes_what_was_built_and_nothing_else(clone: Path) -> None:
    before = tracked(clone)
    made(clone, "clean")
    assert not (clone / "build").exists() and not (clone / ".venv").is_symlink()
    assert tracked(clone) == before
    assert (ROOT / ".venv/bin/python").exists() and (ROOT / "build/sdist").is_dir()
