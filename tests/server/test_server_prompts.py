"""`llama-flash serve --prompt-cache`: a prompt that was computed before is read, also by another server."""

from __future__ import annotations

import inspect
import json
import queue
import shutil
import signal
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import pytest
from architectures import write
from engines import tokens
from lora import write_lora
from serving import KEY, PATIENCE, SERVE, Server, eventually, post, serving

MODELS = Path(str(resources.files("llama_flash") / "models"))
TEXT = inspect.getsource(queue)  # what all prompts begin with
BEGIN = TEXT[:2200]
ENDS = ("\n\ndef put(", "\n\nclass Stack:\n", "\n\nimport os\n")
N = 24  # tokens of an answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(MODELS / "stdlib-moe-q8_0.gguf", tmp_path_factory.mktemp("served") / "moe.gguf"))


def arguments(model: Path, folder: Path, *more: str) -> list[str | Path]:
    return [model, "-c", "2048", "--parallel", "2", "--api-key", KEY, "--prompt-cache-dir", folder, *more]


def ask(server: Server, prompt: str | list[int], n: int = N, **more: Any) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were not computed."""
    status, said = post(server, "/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, **more})
    assert status == 200, said
    return said["content"], said["timings"]["cache_n"]


def kept(folder: Path) -> int:
    return len(list(folder.glob("[0-9a-f]*.cells")))


def test_another_server_reads_what_this_one_has_computed(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    with serving(arguments(model, folder), tmp_path / "1.log", command=SERVE) as server:
        answers = [ask(server, BEGIN + end) for end in ENDS]
        n_tokens = len(json.loads(json.dumps(post(server, "/tokenize", {"content": BEGIN})[1]["tokens"])))
        blocks = n_tokens // 256
        assert blocks >= 2 and answers[0][1] == 0
        assert server.stop() == 128 + signal.SIGTERM, server.text
    assert kept(folder) >= blocks
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    for end, (text, _) in zip(ENDS, answers, strict=True):  # each in a server that has nothing in memory
        with serving(arguments(model, folder), tmp_path / "2.log", command=SERVE) as server:
            again, cached = ask(server, BEGIN + end)
            assert again == text and cached >= blocks * 256, server.text
            told = {name.partition(" ")[0]: value for name, value in server.metrics().items()}
            assert told["llama_flash_prompts_looked_up_total"] == told["llama_flash_prompts_found_total"] == 1
            assert told["llama_flash_prompt_tokens_recalled_total"] == cached
            assert str(tmp_path) not in server.get("/health")
    assert "Traceback" not in server.text


def test_it_is_written_while_the_server_is_idle(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    with serving(arguments(model, folder), tmp_path / "server.log", command=SERVE) as server:
        ask(server, BEGIN)
        assert eventually(lambda: kept(folder) >= 2)
        server.process.kill()  # what is there was there before the end
        server.process.wait()
    with serving(arguments(model, folder), tmp_path / "again.log", command=SERVE) as server:
        assert ask(server, BEGIN)[1] >= 512


def test_a_prompt_is_taken_from_a_sequence_that_is_busy(model: Path, tmp_path: Path) -> None:
    with serving(arguments(model, tmp_path / "prompts"), tmp_path / "server.log", command=SERVE) as server:
        text, _ = ask(server, BEGIN + ENDS[1])
        long = {"n_predict": 1400, "temperature": 0, "id_slot": 0, "ignore_eos": True, "stream": True}

        def taken() -> bool:
            """False: that sequence has come to its end before."""
            ask(server, "x = 1\n", 1, id_slot=1)  # of the text nothing is left there
            body = json.dumps({"prompt": BEGIN + ENDS[0], **long}).encode()
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            request = urllib.request.Request(f"{server.url}/completion", body, headers)
            with urllib.request.urlopen(request, timeout=PATIENCE) as stream:
                stream.readline()
                shutil.rmtree(tmp_path / "prompts", ignore_errors=True)  # not from there
                again, cached = ask(server, BEGIN + ENDS[1], id_slot=1)
                if busies(server) != 1:
                    return False
            assert again == text and cached >= 512
            return True

        assert eventually(taken), "nobody was busy"


def busies(server: Server) -> float:
    return sum(value for name, value in server.metrics().items() if name.startswith("llamacpp:requests_processing"))


def test_nothing_is_kept_unless_asked_for(model: Path, tmp_path: Path) -> None:
    environment = {"LLAMA_FLASH_CACHE": str(tmp_path / "cache")}
    with serving(
        [model, "-c", "2048", "--api-key", KEY], tmp_path / "server.log", command=SERVE, **environment
    ) as server:
        ask(server, BEGIN)
    assert not (tmp_path / "cache" / "prompts").exists()


@pytest.mark.parametrize(("name", "n_cached"), [("gemma3", 512), ("jamba", 512), ("mamba2", 512)])
def test_windows_and_recurrent_states_come_back(name: str, n_cached: int, tmp_path: Path) -> None:
    """gemma3's windows, mamba2's states and jamba's, beside cells: by the next server, with the same answer."""
    path = tmp_path / f"{name}.gguf"
    write(name, path)
    trained = gguf.GGUFReader(path, "r+").fields[f"{name}.context_length"]
    trained.parts[trained.data[0]][0] = 2048  # no server takes longer prompts than that
    folder = tmp_path / "prompts"
    prompt = tokens(600, seed=3)
    answers = []
    for i in range(2):
        with serving(arguments(path, folder), tmp_path / f"{i}.log", command=SERVE) as server:
            answers.append(ask(server, prompt))
            assert server.stop() == 128 + signal.SIGTERM, server.text
    (text, cached), (again, recalled) = answers
    assert (cached, recalled) == (0, n_cached), server.text
    assert again == text


def test_what_an_adapter_has_computed_is_its_own(model: Path, tmp_path: Path) -> None:
    adapter, folder = tmp_path / "adapter.gguf", tmp_path / "prompts"
    write_lora(model, adapter, ["blk.0.attn_q.weight", "blk.1.attn_output.weight"])
    with_adapter = arguments(model, folder, "--lora", adapter)
    seen = []
    for i, given in enumerate((arguments(model, folder), with_adapter, with_adapter, arguments(model, folder))):
        with serving(given, tmp_path / f"{i}.log", command=SERVE) as server:
            seen.append(ask(server, BEGIN + ENDS[0]))
            server.stop()
    (plain, _), (adapted, none), (adapted_again, found), (plain_again, found_plain) = seen
    assert plain != adapted, "the adapter changes nothing"
    assert none == 0 < min(found, found_plain)
    assert (adapted_again, plain_again) == (adapted, plain)
