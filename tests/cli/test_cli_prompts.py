"""`llama-flash prompts`: what is kept, for people."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from commands import flash
from conftest import ModelFile
from engines import Model, tokens

from llama_flash import FlashOffload

BEGIN = tokens(300, seed=8)
PROMPTS = [BEGIN + tokens(300, seed=9), BEGIN + tokens(560, seed=10)]  # one block in common


@pytest.fixture(scope="module")
def model(model_file: ModelFile) -> Path:
    return model_file("llama")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "prompts"
    options = FlashOffload(prompt_cache=where)
    with Model(str(model), n_ctx=1024, flash_offload=options, verbose=False) as llm:
        for prompt in PROMPTS:
            list(islice(llm.generate(prompt, temp=0.0), 2))
            llm.flash.keeper.flush()
    yield where


def said(*arguments: object) -> dict[str, object]:
    done = flash("prompts", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_prompts_are_listed_shown_and_dropped(folder: Path, model: Path) -> None:
    found = said("list", "--dir", folder)["prompts"]
    assert isinstance(found, list) and sorted(prompt["tokens"] for prompt in found) == [601, 861]
    assert all(0 < prompt["shared"] < prompt["size"] for prompt in found)
    longest = max(found, key=lambda prompt: int(prompt["tokens"]))
    shown = said("show", longest["key"][:12], "--dir", folder, "--model", model)
    assert shown["token_ids"][:-1] == PROMPTS[1] and shown["text"]  # type: ignore[index]
    said("drop", longest["key"], "--dir", folder)
    assert [prompt["tokens"] for prompt in said("list", "--dir", folder)["prompts"]] == [601]  # type: ignore[attr-defined]
    said("drop", "--all", "--dir", folder)
    assert list(folder.iterdir()) == []


def test_a_chat_keeps_its_prompts_where_it_is_told_to(model: Path, tmp_path: Path) -> None:
    line = " ".join(f"t{number}" for number in range(160))
    command = [sys.executable, "-m", "llama_flash", "chat", str(model), "-n", "2", "-c", "2048", "--json"]
    for options in ([], ["--prompt-cache-dir", str(tmp_path / "prompts")]):
        done = subprocess.run([*command, *options], input=line, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "prompts").exists() == bool(options)
    assert list((tmp_path / "prompts").glob("*.cells"))


def test_damage_is_told(folder: Path) -> None:
    assert said("verify", "--dir", folder) == {"files": 6, "damaged": []}
    file = sorted(folder.iterdir())[0]
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    done = flash("prompts", "verify", "--dir", folder)
    assert done.returncode == 1 and f"{file.name}: its checksum is wrong" in done.stdout


def test_what_is_asked_wrongly_is_one_line(folder: Path, tmp_path: Path) -> None:
    for arguments, why in (
        (("see",), "is not one of list, show, drop, verify"),
        (("show", "--dir", folder), "which one?"),
        (("show", "zz", "--dir", folder), "no such prompt"),
        (("list", "--dir", tmp_path / "nowhere"), "No such file"),
    ):
        done = flash("prompts", *arguments)
        assert done.returncode == 1 and why in done.stderr and len(done.stderr.splitlines()) == 1
