"""What `llama-flash serve` takes beside a model and a budget, in a running server."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import openai
import pytest
from caps import require_caps
from lora import write_lora
from serving import KEY, PATIENCE, SERVE, Server, eventually, refusal, serving, smallest_budget

import llama_flash
from llama_flash.server.figures import COUNTERS, EVENTS, GAUGES
from llama_flash.sizes import parse_size

MODELS = Path(str(resources.files("llama_flash") / "models"))
SHIPPED = MODELS / "stdlib-moe-q8_0.gguf"
MIB = 1 << 20
CONTEXT = ("-c", "1024", "--parallel", "2")
PROMPTS = ("import os\n", "class Stack:\n", "def main(argv):\n")
N = 24  # tokens of an answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(SHIPPED, tmp_path_factory.mktemp("served") / SHIPPED.name))


@pytest.fixture(scope="module")
def budget(model: Path) -> int:
    """With room for a part of the experts."""
    return smallest_budget(model, *CONTEXT, command=SERVE) + 8 * MIB


@pytest.fixture(scope="module")
def server(model: Path, budget: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a settings file, with a config file of llama.cpp's beside it that would change what is counted."""
    folder = tmp_path_factory.mktemp("settings")
    file = folder / "settings.json"
    settings = {"model": str(model), "model_alias": "the model", "flash_offload": {"dram_budget": budget}}
    file.write_text(json.dumps({"port": 0, "models": [{**settings, "n_ctx": 512, "parallel": 2}]}))
    environment = {"LLAMA_FLASH_SERVE_API_KEY": KEY, "LLAMA_ARG_CTX_SIZE": "8192", "LLAMA_API_KEY": "another"}
    with serving(
        ["--config-file", file, "-c", "1024"],
        folder / "log",
        command=SERVE,
        **environment,
        **config_of_llama_cpp(folder),
    ) as server:
        yield server
    assert "Traceback" not in server.text


def config_of_llama_cpp(folder: Path) -> dict[str, str]:
    """A user's own, for all programs of llama.cpp's; returns the environment in which it is found."""
    for home in (folder / "llama.cpp", folder / ".config" / "llama.cpp"):
        home.mkdir(parents=True)
        lines = ("[*]", "cache-ram = 1024", "ctx-size = 8192", "spec-type = ngram-simple", "api-key = from the file")
        (home / "config.ini").write_text("\n".join((*lines, "slots = true", "n-predict = 1")) + "\n")
    return {"XDG_CONFIG_HOME": str(folder), "HOME": str(folder)}


def complete(client: openai.OpenAI, prompt: str, n: int = N) -> str:
    answer = client.completions.create(model="any", prompt=prompt, max_tokens=n, temperature=0)
    return answer.choices[0].text


def test_settings_come_from_the_file_and_the_environment_and_not_from_llama_cpp(server: Server) -> None:
    props = json.loads(server.get("/props"))
    assert props["total_slots"] == 2 and props["default_generation_settings"]["n_ctx"] == 1024
    assert json.loads(server.get("/v1/models"))["data"][0]["id"] == "the model"
    assert len(complete(server.client(), PROMPTS[0])) > 20, "n-predict is of llama.cpp's config file"
    for key in ("from the file", "another"):
        with pytest.raises(openai.AuthenticationError):
            complete(server.client(key), PROMPTS[0])
    with pytest.raises(urllib.error.HTTPError):
        server.get("/slots")


def test_health_is_open_and_has_the_statistics_of_flash(server: Server, budget: int) -> None:
    before = json.loads(server.get("/health", key=None))
    complete(server.client(), PROMPTS[1])
    after = json.loads(server.get("/health", key=None))
    assert (after["status"], after["model"], after["parallel"]) == ("ok", "the model", 2)
    flash = after["flash"]
    assert "path" not in flash and str(server.log.parent) not in json.dumps(after)
    assert flash["mode"] == "flash" and flash["budget"] == budget
    assert 0 < flash["slots_in_use"] <= flash["granted"] < budget and flash["throttled"] >= 0
    generated = flash["decode"]["tokens"] - before["flash"]["decode"]["tokens"]
    assert N - 1 <= generated <= N, "the first token comes of the prompt's pass"
    assert flash["decode"]["hits"] > 0 and flash["decode"]["bytes_per_token"] > 0


def test_the_plan_of_so_many_sequences_is_what_the_server_takes(server: Server, model: Path, budget: int) -> None:
    memory = json.loads(server.get("/health"))["flash"]["memory"]
    planned = llama_flash.plan(model, budget + 1024 * MIB, n_ctx=1024, parallel=2).memory.as_dict()
    for part in ("kv", "compute", "outputs"):
        assert planned[part] == memory[part] > 0, part
    command = [sys.executable, "-m", "llama_flash", "plan", str(model), *CONTEXT, "--json"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout)
    assert abs(said["smallest"] - (budget - 8 * MIB)) <= 4 * MIB, "the smallest budget is the server's, about"


def test_metrics_have_the_classic_servers_names_beside_llama_cpps_and_ask_for_the_key(server: Server) -> None:
    complete(server.client(), PROMPTS[2])
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/metrics", key=None)
    assert refused.value.code == 401
    values, name = server.metrics(), "model=the model"
    for metric in [f"{gauge}" for gauge, _, _ in GAUGES] + [f"{counter}_total" for counter, *_ in COUNTERS]:
        assert f"llama_flash_{metric} {name}" in values
    for kind in EVENTS:
        assert f"llama_flash_events_total kind={kind} {name}" in values
    for kind in ("prompt", "generated"):
        assert values[f"llama_flash_tokens_total kind={kind} {name}"] > 0
    assert values[f"llama_flash_read_bytes_total {name}"] > 0 == values[f"llama_flash_read_errors_total {name}"]
    assert values["llama_flash_throttled_total"] >= 0 and values[f"llama_flash_loads_total {name}"] == 1
    assert values["process_resident_memory_bytes"] > 10 * MIB and values["process_cpu_seconds_total"] > 0
    assert values["llamacpp:tokens_predicted_total"] > 0


def test_statistics_are_told_while_a_prompt_is_computed(server: Server) -> None:
    prompt = "x = 1\n" * 200
    done = threading.Event()

    def ask() -> None:
        client = server.client()
        while not done.is_set():
            complete(client, prompt, 64)

    def told() -> bool:
        assert json.loads(server.get("/health", key=None))["status"] == "ok"
        return server.metrics()["llamacpp:requests_processing"] == 1.0

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        try:
            assert eventually(told), "none was asked while it computed"
        finally:
            done.set()
        asked.result(PATIENCE)


def test_a_prompt_seen_before_is_not_computed_again_and_its_memory_is_counted(
    model: Path, budget: int, tmp_path: Path
) -> None:
    cache = "16MiB"
    arguments: list[str | Path] = [model, "-c", "1024", "--parallel", "1", "--prompt-cache-ram", cache]
    said = refusal(*arguments, "--dram-budget", str(budget - 8 * MIB), command=SERVE)
    assert re.search(r"too small: .*outputs 16\.\d MiB", said), said
    arguments += ["--dram-budget", str(budget + parse_size(cache))]
    texts = [prompt + "    pass  # and more\n" * 30 for prompt in PROMPTS]
    with serving(arguments, tmp_path / "log", command=SERVE) as server:
        client = server.client()
        first = [complete(client, text, 4) for text in texts]
        again = client.completions.create(model="any", prompt=texts[0], max_tokens=4, temperature=0)
        assert again.choices[0].text == first[0]
        usage = again.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached is not None and cached > usage.prompt_tokens - 10, "it came back from the cache"
        memory = json.loads(server.get("/health"))["flash"]["memory"]
        assert 16 * MIB <= memory["outputs"] < 18 * MIB
    without = [argument for argument in arguments if argument not in ("--prompt-cache-ram", cache)]
    with serving(without, tmp_path / "log", command=SERVE) as server:
        client = server.client()
        assert [complete(client, text, 4) for text in texts] == first
        plain = client.completions.create(model="any", prompt=texts[0], max_tokens=4, temperature=0)
        assert plain.usage is not None and plain.usage.prompt_tokens_details is not None
        assert (plain.usage.prompt_tokens_details.cached_tokens or 0) < 10
        assert json.loads(server.get("/health"))["flash"]["memory"]["outputs"] < MIB


@pytest.mark.full
def test_prompts_are_kept_within_a_limit_of_the_kernels(model: Path, budget: int, tmp_path: Path) -> None:
    require_caps()
    limit = budget + 24 * MIB
    arguments = [model, "-c", "1024", "--parallel", "2", "--prompt-cache-ram", "8MiB"]
    texts = [f"# {i}\n" + "    pass  # and more\n" * 80 for i in range(8)]  # 1.3 MiB of KV cells each, or more
    with serving(arguments, tmp_path / "log", limit, command=SERVE) as server:
        client = server.client()
        first = [complete(client, text, 8) for text in texts]
        for _ in range(2):
            with ThreadPoolExecutor(2) as pool:
                assert list(pool.map(lambda text: complete(client, text, 8), texts)) == first
        memory = json.loads(server.get("/health"))["flash"]["memory"]
        assert memory["outputs"] > 8 * MIB
        server.stop()
    assert re.search(r"peak .* of .*, 0 OOM kills", server.text), server.text


def test_an_adapter_gives_the_answers_of_a_resident_run(model: Path, budget: int, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    write_lora(model, adapter, ["blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight", "blk.2.attn_output.weight"])
    arguments: list[str | Path] = [model, *CONTEXT, "--lora", f"{adapter}:1.5"]
    with serving([*arguments, "--dram-budget", str(budget + 8 * MIB)], tmp_path / "log", command=SERVE) as server:
        assert re.search(r"resident, .* on flash", server.text), server.text
        answers = [complete(server.client(), prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda prompt: complete(server.client(), prompt), PROMPTS)) == answers
        assert json.loads(server.get("/lora-adapters"))[0]["scale"] == 1.5
    settings: dict[str, Any] = {"n_ctx": 1024, "verbose": False, "lora_path": str(adapter)}
    with contextlib.closing(llama_cpp.Llama(str(model), **settings, lora_scale=1.5)) as resident:
        for prompt, text in zip(PROMPTS, answers, strict=True):
            want = resident.create_completion(prompt, max_tokens=N, temperature=0.0, repeat_penalty=1.0)
            assert text == want["choices"][0]["text"]
    with contextlib.closing(llama_cpp.Llama(str(model), n_ctx=1024, verbose=False)) as plain:
        without = [plain.create_completion(p, max_tokens=N, temperature=0.0, repeat_penalty=1.0) for p in PROMPTS]
        assert answers != [answer["choices"][0]["text"] for answer in without], "the adapter changes nothing"


def test_embeddings_are_those_of_a_resident_run(model: Path, budget: int, tmp_path: Path) -> None:
    arguments: list[str | Path] = [model, "-c", "256", "--embeddings", "--pooling", "mean"]
    with serving([*arguments, "--dram-budget", str(budget + 64 * MIB)], tmp_path / "flash", command=SERVE) as server:
        found = [one.embedding for one in server.client().embeddings.create(model="any", input=list(PROMPTS)).data]
    with serving([*arguments, "--dram-budget", "8GiB"], tmp_path / "resident", command=SERVE) as server:
        assert "nothing on flash" in server.text
        want = [one.embedding for one in server.client().embeddings.create(model="any", input=list(PROMPTS)).data]
    assert found == want and len({tuple(vector) for vector in found}) == len(PROMPTS)


def test_options_of_flash_and_a_chat_template_are_used_and_a_broken_one_refused(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}: {{ m.content }}>{% endfor %}")
    arguments: list[str | Path] = [model, "-c", "256", "--parallel", "1"]
    options = (
        "--what",
        "all",
        "--reserve",
        "0",
        "--io-engine",
        "pread",
        "--no-follow",
        "--no-lookahead",
        "--type-k",
        "q8_0",
    )
    arguments += options
    with serving([*arguments, "--chat-template-file", template], tmp_path / "log", command=SERVE) as server:
        flash = json.loads(server.get("/health"))["flash"]
        assert (flash["io_engine"], flash["memory"]["reserve"], flash["reads_ahead"]) == ("pread", 0, False)
        assert flash["flash_weights"] > 0.9 * SHIPPED.stat().st_size
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
        request = urllib.request.Request(f"{server.url}/apply-template", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            assert json.load(response)["prompt"] == "<user: hello>"
    said = refusal(*arguments, "--chat-template", "{% for %}", command=SERVE)
    assert "--chat-template: llama-server cannot use it: " in said


def test_what_cannot_be_served_says_why(model: Path, tmp_path: Path) -> None:
    assert "--classic" in refusal(model, "--chat-format", "chatml", command=SERVE)
    assert "--parallel and --classic" in refusal(model, "--classic", "--parallel", "2", command=SERVE)
    assert "LLAMA_FLASH_SERVE_NO_SUCH" in refusal(model, command=SERVE, LLAMA_FLASH_SERVE_NO_SUCH="1")
    (tmp_path / "adapter.gguf").write_text("no adapter")
    assert "adapter.gguf: not a GGUF file" in refusal(model, "--lora", tmp_path / "adapter.gguf", command=SERVE)
    assert "q8_0.gguf: not a LoRA adapter" in refusal(model, "--lora", model, command=SERVE)


def test_the_line_about_the_load_says_how_many_answers_at_once_and_why(model: Path, tmp_path: Path) -> None:
    with serving([model, "-c", "512"], tmp_path / "log", command=SERVE) as server:
        many = json.loads(server.get("/props"))["total_slots"]
        assert many >= 4
        assert re.search(rf"; {many} answers at the same time \(--parallel; their KV cache of [\d.]+ MiB ", server.text)
    tight = smallest_budget(model, "-c", "2048", "--parallel", "1", command=SERVE)
    arguments: list[str | Path] = [model, "-c", "2048", "--dram-budget", str(tight)]
    with serving(arguments, tmp_path / "log", command=SERVE) as server:
        assert "; 1 answer at the same time (--parallel; the KV cache of 2, " in server.text
