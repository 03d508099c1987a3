"""`llama-flash draft`, and --draft where text is generated: a model's copy at few bits drafts for it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

from mtp_models import write_mtp

ARCEE = Path(str(resources.files("llama_flash") / "models/stdlib-arcee-q8_0.gguf"))


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama_flash", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_a_copy_at_few_bits_drafts_for_its_model(tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    made = command("draft", ARCEE, copy, "--type", "q4_0")
    assert made.returncode == 0 and copy.stat().st_size < 0.7 * ARCEE.stat().st_size, made.stderr
    again = command("draft", ARCEE, copy)
    assert again.returncode == 1 and "--force" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["copy.gguf"]

    options = ("-p", "def main(argv):\n", "-n", "40", "--temp", "0", "--what", "all", "--json")
    plain, drafted = (json.loads(command("run", ARCEE, *options, "--draft", draft).stdout) for draft in ("off", copy))
    assert drafted["text"] == plain["text"]
    # how many tokens are drafted for a pass depends on the machine's speed, and so how many passes there are
    drafts = drafted["flash"]["drafts"]
    assert drafts["source"] == "model" and 0 < drafts["passes"] <= 40
    assert drafted["flash"]["memory"]["draft"] > copy.stat().st_size > plain["flash"]["memory"]["draft"] == 0


def test_what_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    failed = command("draft", broken, tmp_path / "copy.gguf")
    assert failed.returncode == 1 and len(failed.stderr.strip().splitlines()) < 30
    assert not (tmp_path / "copy.gguf").exists()
    unknown = command("draft", ARCEE, tmp_path / "copy.gguf", "--type", "q9")
    assert unknown.returncode == 1 and "q2_k, q2_0" in unknown.stderr


def test_the_file_s_own_head_drafts_and_a_plan_says_what_it_takes(tmp_path: Path) -> None:
    path = write_mtp("glm4moe", tmp_path / "head.gguf")
    options = ("-p", "some text to go on with", "-n", "30", "--temp", "0", "--what", "all", "--json", "-c", "512")
    plain, drafted = (json.loads(command("run", path, *options, "--draft", draft).stdout) for draft in ("off", "mtp"))
    assert drafted["text"] == plain["text"]
    drafts = drafted["flash"]["drafts"]
    assert drafts["source"] == "mtp" and 0 < drafts["passes"] <= 30
    said = command("plan", path, "--draft", "mtp", "-c", "512")
    assert said.returncode == 0 and "drafts from the file's head, of" in said.stdout, said.stderr
    refused = command("run", ARCEE, "--draft", "mtp", "-p", "x")
    assert refused.returncode == 1 and "--draft ngram" in refused.stderr and ARCEE.name in refused.stderr
