"""The tree in which patches are made: build/engine-work, a git repository with one commit per patch.

`apply` lays it out from `patches/`; edit and commit there (amend, rebase: one concern per commit); `export` writes its
commits back to `patches/`. A round trip leaves `patches/` as it was. `rebase` moves the commits onto the engine that
requirements.txt pins by now.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import patches
import sdist
from report import BuildError, run_main, say, step
from tree import content, members

WORK = sdist.ROOT / "build/engine-work"
PATCHES = sdist.ROOT / "patches"
BASE_TAG = "pinned"  # the commit that holds the sdist as it is
CONFIG = {"core.autocrlf": "false", "user.name": "llama-flash", "user.email": "llama-flash@localhost"}
IDENTITY = {
    f"GIT_{role}_{field}": value
    for role in ("AUTHOR", "COMMITTER")
    for field, value in (("NAME", "llama-flash"), ("EMAIL", "llama-flash@localhost"), ("DATE", "2026-01-01T00:00:00Z"))
}


def git(*args: str | Path, env: dict[str, str] | None = None) -> str:
    """Runs git in the work tree without the user's configuration, which could change the patches' form."""
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    result = subprocess.run(
        ["git", *args],
        cwd=WORK,
        env={**inherited, **alone, **(env or {})},
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        wanted = [line for line in lines if line.startswith(("error:", "fatal:", "Patch failed"))]
        raise BuildError(f"git {args[0]}: {(wanted or lines or ['failed'])[0]}")
    return result.stdout


def need_git() -> None:
    if not shutil.which("git"):
        raise BuildError("git is needed to make patches (not to build)")


def base_message(pin: sdist.Pin) -> str:
    return f"{pin.stem}, as pinned"


def commit_base(pin: sdist.Pin) -> None:
    git("add", "--all", "--force")
    git("commit", "--quiet", "--message", base_message(pin), env=IDENTITY)


def unpack(archive_path: Path) -> None:
    with tarfile.open(archive_path) as archive:
        for path, member in members(archive):
            file = WORK / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content(archive, member))
            file.chmod(member.mode & 0o777)


def need_clean_work() -> None:
    if not (WORK / ".git").is_dir():
        raise BuildError(f"{WORK} is not there: run `make patch-apply` first")
    if git("status", "--porcelain"):
        raise BuildError(f"{WORK} has changes that are not committed")
    if (WORK / ".git/rebase-merge").exists():
        raise BuildError(f"{WORK} is in the middle of a rebase: end it (git rebase --continue, or --abort)")


def apply(force: bool) -> None:
    need_git()
    if WORK.exists() and not force:
        raise BuildError(f"{WORK} exists: run `make patch-export` to keep its commits, then `make patch-apply FORCE=1`")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    pin = sdist.read_pin()
    archive_path = sdist.fetch()
    with step("laying out the pinned engine"):
        unpack(archive_path)
        git("init", "--quiet", "--initial-branch=flash")
        for key, value in CONFIG.items():
            git("config", key, value)
        commit_base(pin)
        git("tag", BASE_TAG)
    for patch in patches.find(PATCHES):
        try:
            git("am", "--quiet", "--keep-non-patch", patch, env={k: v for k, v in IDENTITY.items() if "COMMITTER" in k})
        except BuildError as e:
            raise BuildError(f"patches/{patch.name} does not apply: {e}") from e
    say(f"{WORK}: {len(patches.find(PATCHES))} patches applied, one commit each")


def rebase() -> None:
    """Puts the pinned engine below the commits, in place of the one that is there."""
    need_git()
    need_clean_work()
    pin = sdist.read_pin()
    there = git("log", "-1", "--format=%s", BASE_TAG).strip()
    if there == base_message(pin):
        raise BuildError(f"{WORK} is on {pin.stem} already: pin another engine in {sdist.REQUIREMENTS.name} first")
    archive_path = sdist.fetch()
    with step(f"laying out {pin.stem}"):
        git("checkout", "--quiet", "--detach", BASE_TAG)
        git("rm", "-r", "--quiet", ".")
        unpack(archive_path)
        commit_base(pin)
        before, after = git("rev-parse", BASE_TAG).strip(), git("rev-parse", "HEAD").strip()
        git("checkout", "--quiet", "flash")
        git("tag", "--force", BASE_TAG, after)
    try:
        git("rebase", "--quiet", "--onto", after, before, "flash")
    except BuildError as e:
        raise BuildError(
            f"a patch conflicts with {pin.stem}: settle it in {WORK} (git status, git rebase --continue), then run "
            "`make patch-export`"
        ) from e
    say(f"{WORK}: the patches are on {pin.stem}; `make patch-export` writes them")


def export() -> None:
    need_git()
    need_clean_work()
    with tempfile.TemporaryDirectory() as tmp:
        git(
            *("format-patch", "--quiet", "--zero-commit", "--no-numbered", "--no-signature", "--full-index"),
            *("--no-renames", "--diff-algorithm=myers", "--unified=3", "--stat=72"),
            *("--output-directory", tmp, f"{BASE_TAG}..HEAD"),
        )
        written = patches.find(Path(tmp))
        changed = []
        for old in patches.find(PATCHES):
            if old.name not in {new.name for new in written}:
                old.unlink()
                changed.append(f"removed {old.name}")
        for new in written:
            target = PATCHES / new.name
            if not target.exists() or target.read_bytes() != new.read_bytes():
                changed.append(f"wrote {new.name}")
                shutil.copyfile(new, target)
    for line in changed:
        say(line)
    say(f"patches/: {len(written)} patches, {len(changed)} changes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    apply_parser = commands.add_parser("apply")
    apply_parser.add_argument("--force", action="store_true", help="throw an existing work tree away")
    commands.add_parser("rebase")
    commands.add_parser("export")
    args = parser.parse_args()
    if args.command == "apply":
        apply(args.force)
    elif args.command == "rebase":
        rebase()
    else:
        export()


if __name__ == "__main__":
    run_main(main)
