"""`llama-flash serve` as its users meet it: OpenAI's client, Prometheus' parser, and a real memory cap."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import openai
import pytest
from caps import require_caps
from prometheus_client.parser import text_string_to_metric_families
from serving import KEY, PATIENCE, Server, cut_short, eventually, post, refusal, serving, smallest_budget

from llama_flash.server.settings import ENV_PREFIX, read_settings

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20
N_CTX = 8192
ENDLESS = N_CTX - 200  # tokens: seconds, even on a fast machine
SLOWLY = {f"{ENV_PREFIX}N_BATCH": "64"}  # a prompt can be seen to be computed
PROMPTS = ("import os\n", "class Stack:\n", "def main(argv):\n", "    for line in file:\n")
LABEL = f"model={SHIPPED.stem}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(SHIPPED, tmp_path_factory.mktemp("served") / SHIPPED.name))


@pytest.fixture(scope="module")
def cap(model: Path) -> int:
    """Bytes: what the server needs with the long context, and room for a third of the experts."""
    require_caps()
    return smallest_budget(model, "-c", str(N_CTX), **SLOWLY) + 12 * MIB


@pytest.fixture(scope="module")
def server(model: Path, cap: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [model, "-c", str(N_CTX), "--api-key", KEY]
    with serving(arguments, tmp_path_factory.mktemp("log") / "server.log", cap, **SLOWLY) as server:
        yield server
        assert server.stop() == 143  # SIGTERM
    found = re.search(r"peak (\S+ \S+) of .* (\d+) OOM kills", server.text)
    assert found and found[2] == "0", server.text
    assert "Exception in ASGI application" not in server.text


def chat(client: openai.OpenAI, prompt: str, n: int = 48, **options: Any) -> str:
    answer = client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": prompt}], max_tokens=n, temperature=0, **options
    )
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.choices[0].finish_reason == "stop" or answer.usage.completion_tokens == n
    return str(answer.choices[0].message.content)


def streamed(client: openai.OpenAI, prompt: str, n: int = 48) -> str:
    pieces, reason = [], None
    for chunk in client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": prompt}], max_tokens=n, temperature=0, stream=True
    ):
        pieces.append(chunk.choices[0].delta.content or "")
        reason = chunk.choices[0].finish_reason
    assert reason in ("length", "stop") and len(pieces) > 2
    return "".join(pieces)


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    client, gone = server.client(), "llama_flash_requests_total path=/v1/chat/completions status=499"
    assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 0)
    before = server.metrics().get(gone, 0)
    for prompt in PROMPTS[:2]:
        assert streamed(client, prompt) == chat(client, prompt)
    assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 0)
    assert server.metrics().get(gone, 0) == before, "nobody has left"


def test_four_clients_at_once_get_the_answers_of_one_after_the_other(server: Server) -> None:
    alone = [chat(server.client(), prompt) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS) and all(len(text) > 20 for text in alone)
    together = threading.Barrier(len(PROMPTS))

    def ask(i: int) -> str:
        client = server.client()
        together.wait(PATIENCE)
        return (streamed if i % 2 else chat)(client, PROMPTS[i])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(len(PROMPTS)))) == alone


def test_a_client_that_leaves_a_stream_makes_room_for_the_next(server: Server) -> None:
    want = chat(server.client(), PROMPTS[0])
    before = server.metrics()
    stream = server.client().chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": PROMPTS[1]}],
        max_tokens=ENDLESS,
        stream=True,
        extra_body={"min_tokens": ENDLESS},
    )
    for _ in range(3):
        next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, server.client(), PROMPTS[0])
        assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 2)
        assert not waiting.done()
        stream.close()
        assert waiting.result(PATIENCE) == want
    assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 0)
    after = server.metrics()
    generated = f"llama_flash_tokens_total kind=generated {LABEL}"
    assert 3 <= after[generated] - before[generated] < ENDLESS
    gone = "llama_flash_requests_total path=/v1/chat/completions status=499"
    assert after[gone] == before.get(gone, 0) + 1


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("generated", {"prompt": "import", "max_tokens": ENDLESS, "min_tokens": ENDLESS}),
        ("prompt", {"prompt": "x = 1\n" * (ENDLESS // 4), "max_tokens": 1}),
        ("prompt", {"prompt": "y = 1\n" * (ENDLESS // 4), "max_tokens": 1, "stream": True}),
    ],
)
def test_what_nobody_waits_for_is_not_computed_to_its_end(kind: str, body: dict[str, Any], server: Server) -> None:
    count = f"llama_flash_tokens_total kind={kind} {LABEL}"
    gone = "llama_flash_requests_total path=/v1/completions status=499"
    before = server.metrics()
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        assert eventually(lambda: server.metrics()[count] > before[count])
    assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 0)
    after = server.metrics()
    assert after[count] - before[count] < ENDLESS * 3 // 4
    assert after[gone] == before.get(gone, 0) + 1


def test_the_key_is_asked_for(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        chat(server.client("another key"), PROMPTS[0])
    for path in ("/metrics", "/v1/models"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.get(path, key=None)
        assert refused.value.code == 401
    assert json.loads(server.get("/health", key=None))["status"] == "ok"


def test_health_tells_what_is_on_flash_but_no_path(server: Server, model: Path, cap: int) -> None:
    chat(server.client(), PROMPTS[0])
    assert eventually(lambda: json.loads(server.get("/health", key=None))["requests_in_flight"] == 0)
    text = server.get("/health", key=None)
    health = json.loads(text)
    assert health["model"] == SHIPPED.stem
    assert health["flash"]["mode"] == "flash" and 0 < health["flash"]["budget"] <= cap
    assert health["flash"]["total"]["tokens"] > 0
    assert str(model.parent) not in text


def test_metrics_are_what_prometheus_reads(server: Server, cap: int) -> None:
    chat(server.client(), PROMPTS[0])
    assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 0)
    families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics"))}
    ours = {name: family for name, family in families.items() if name.startswith("llama_flash_")}
    assert len(ours) > 15
    for name, family in ours.items():
        assert family.documentation and family.type in ("gauge", "counter"), name
        assert all(s.name == (f"{name}_total" if family.type == "counter" else name) for s in family.samples), name
    values, stats = server.metrics(), json.loads(server.get("/health"))["flash"]
    for metric, key in (("hits", "hits"), ("misses", "misses"), ("read_bytes", "bytes_read"), ("reads", "reads")):
        assert values[f"llama_flash_{metric}_total {LABEL}"] == stats["total"][key] > 0, metric
    assert values[f"llama_flash_wait_seconds_total {LABEL}"] > 0
    assert values[f"llama_flash_tokens_total kind=prompt {LABEL}"] == stats["prompt"]["tokens"] > 0
    assert values[f"llama_flash_budget_bytes {LABEL}"] <= cap
    assert 0 < values[f"llama_flash_slots_in_use_bytes {LABEL}"] <= values[f"llama_flash_granted_bytes {LABEL}"]
    assert values[f"llama_flash_loads_total {LABEL}"] == values[f"llama_flash_model_loaded {LABEL}"] == 1


def test_a_read_that_fails_is_an_error_for_that_client_only(model: Path, cap: int, tmp_path: Path) -> None:
    damaged = Path(shutil.copy(model, tmp_path))  # what was not read before it was damaged is refused for good
    with serving([damaged, "-c", str(N_CTX), "--api-key", KEY], tmp_path / "server.log", cap, **SLOWLY) as server:
        client = server.client()
        want = chat(client, PROMPTS[2])
        with cut_short(damaged):
            with pytest.raises(openai.InternalServerError, match=re.escape(str(damaged))):
                chat(client, PROMPTS[3])
            with pytest.raises(openai.APIError, match=re.escape(str(damaged))) as told:
                streamed(client, PROMPTS[3])
            assert told.value.type == "flash_read_error"
        assert chat(client, PROMPTS[2]) == want
        failed = "llama_flash_requests_total path=/v1/chat/completions status=500"
        assert eventually(lambda: server.metrics().get(failed) == 2)


def test_a_question_longer_than_the_context_is_an_error(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat(client, "x = 1\n" * N_CTX)
    with pytest.raises(openai.APIError, match="exceed context window"):
        streamed(client, "x = 1\n" * N_CTX)


def test_what_a_client_asks_wrongly_is_said_to_it_and_ends_nothing(server: Server) -> None:
    client = server.client()
    want = chat(client, PROMPTS[0])
    quoted = {"name": "f", "parameters": {"type": "object", "properties": {'a"b': {"type": "string"}}}}
    forced = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": quoted}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    for path, body, said in (
        ("/v1/completions", {"prompt": "a", "grammar": "root ::= ("}, "the grammar cannot be parsed"),
        ("/v1/chat/completions", forced, "the grammar cannot be parsed"),
        ("/extras/detokenize", {"tokens": [99999999]}, "token 99999999 is not one of the model's"),
        ("/extras/detokenize", {"tokens": [-1]}, "token -1 is not one of the model's"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "a list of several prompts"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, "body.temperature"),
        ("/v1/completions", {"prompt": "a", "logprobs": 1}, "logits_all"),
        ("/v1/completions", b"{", "body"),
    ):
        status, answer = post(server, path, body)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error", (body, answer)
        assert said in answer["error"]["message"], answer
    with pytest.raises(openai.APIError, match="the grammar cannot be parsed") as told:
        list(client.completions.create(model="x", prompt="a", stream=True, extra_body={"grammar": "root ::= ("}))
    assert told.value.type == "invalid_request_error"
    more_than_it_allows = {"prompt": "a", "grammar": 'root ::= "a"', "min_tokens": 10, "max_tokens": 20}
    assert post(server, "/v1/completions", more_than_it_allows)[1]["choices"][0]["text"] == "a"
    assert chat(client, PROMPTS[0]) == want
    tokens = post(server, "/extras/tokenize", {"input": PROMPTS[1]})[1]["tokens"]
    assert post(server, "/extras/detokenize", {"tokens": tokens})[1]["text"].strip() == PROMPTS[1].strip()


def test_an_answer_names_the_model_and_not_its_file(server: Server) -> None:
    assert post(server, "/v1/completions", {"prompt": "import", "max_tokens": 1})[1]["model"] == SHIPPED.stem


def test_metrics_are_told_whatever_format_is_asked_for(server: Server) -> None:
    for accept in ("application/openmetrics-text; version=foo", "text/plain; version=x", "text/html", "application/*"):
        request = urllib.request.Request(f"{server.url}/metrics")
        request.add_header("Authorization", f"Bearer {KEY}")
        request.add_header("Accept", accept)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            assert b"llama_flash_loads_total" in response.read(), accept


def test_memory_does_not_grow(server: Server) -> None:
    client, clients = server.client(), [server.client() for _ in range(4)]

    def some() -> float:
        for i in range(20):
            chat(client, PROMPTS[i % 4], 4)
            streamed(client, PROMPTS[i % 4], 4)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda one: streamed(one, PROMPTS[0], 4), clients))
        return server.metrics()["process_resident_memory_bytes"]

    some()

    def grows() -> bool:
        before = some()
        return some() - before >= 4 * MIB

    # pages of libraries that were taken from it come back at any time; what is kept of requests grows each time
    assert not all(grows() for _ in range(4))


def test_models_of_a_settings_file_take_turns(model: Path, tmp_path: Path) -> None:
    budget = smallest_budget(model) + 8 * MIB
    entries: list[dict[str, Any]] = [
        {"model": str(model), "model_alias": "one", "flash_offload": {"dram_budget": budget}},
        {"model": str(model), "model_alias": "two", "flash_offload": {"dram_budget": budget}, "n_ctx": 512},
        {"model": str(model), "model_alias": "small", "flash_offload": {"dram_budget": "32MiB"}},
        {"model": str(model), "model_alias": "plain", "flash_offload": False},
    ]
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"api_key": KEY, "port": 1, "models": entries}))
    with serving(["--config-file", file], tmp_path / "log") as server:
        client = server.client()
        assert [one.id for one in client.models.list()] == ["one", "two", "small", "plain"]

        def ask(name: str) -> str:
            answer = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=16, temperature=0)
            return answer.choices[0].text

        first = ask("one")
        n = server.metrics()["llama_flash_tokens_total kind=generated model=one"]
        assert ask("two") == ask("plain") == first and n > 0
        with pytest.raises(openai.InternalServerError, match=r"32\.0 MiB is too small.*smallest that works"):
            ask("small")
        with pytest.raises(urllib.error.HTTPError) as unwell:
            server.get("/health")
        assert unwell.value.code == 503
        assert ask("one") == first
        health, values = json.loads(server.get("/health")), server.metrics()
        assert health["model"] == "one" and health["flash"]["budget"] == budget
        assert values["llama_flash_loads_total model=one"] == 2 and values["llama_flash_loads_total model=two"] == 1
        assert values["llama_flash_tokens_total kind=generated model=one"] == 2 * n
        assert values["llama_flash_model_loaded model=two"] == 0


# in place of five seconds: for answers under way when a signal comes
IMPATIENT = """
import runpy, sys
from llama_flash.server import listen

listen._PATIENCE = 1
sys.argv[0] = "llama-flash"
runpy.run_module("llama_flash", run_name="__main__")
"""


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM,), pytest.param((signal.SIGINT, signal.SIGINT), marks=pytest.mark.full)]
)
def test_a_signal_ends_it_in_the_middle_of_an_answer(
    signals: tuple[signal.Signals, ...], model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    environment = {"LLAMA_FLASH_CACHE": str(cache), "LLAMA_FLASH_WARM_START": "1"}
    context = ["-c", str(N_CTX)]
    budget = ["--dram-budget", str(smallest_budget(model, *context) + 8 * MIB)]
    command = [sys.executable, "-c", IMPATIENT, "serve", "--classic"]
    with serving([model, *context, *budget], tmp_path / "log", command=command, **environment) as server:
        stream = server.client().chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": PROMPTS[1]}],
            max_tokens=ENDLESS,
            stream=True,
            extra_body={"min_tokens": ENDLESS},
        )
        next(stream)
        with ThreadPoolExecutor(2) as pool:
            options = {"extra_body": {"min_tokens": ENDLESS}}
            whole = [pool.submit(chat, server.client(), PROMPTS[0], ENDLESS, **options) for _ in range(2)]
            assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 3)
            for one in signals:
                server.process.send_signal(one)
                time.sleep(0.5)
            assert server.process.wait(PATIENCE) == 128 + signals[0]
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
            # 503; or the connection is gone with the process before it is read
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError), match=r"503|Connection"):
                [one.result(PATIENCE) for one in whole]
        assert "Traceback" not in server.text
    assert list(cache.glob("hot/*")), "the model was not closed"


def test_what_cannot_be_served_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in refusal(model, "--port", port)
    assert "no such model: none.gguf" in refusal("none.gguf")
    nested = {"LLAMA_FLASH_SERVE_FLASH_OFFLOAD__DRAM_BUDGET": "32MiB"}
    assert "32.0 MiB is too small" in refusal(model, **nested)
    file = tmp_path / "settings.yaml"
    file.write_text(f"models: [{{model: {model}, flash_offload: {{budget: 1GiB}}}}]")
    assert re.search(
        r"settings\.yaml: models\.0\.flash_offload: there is no option budget", refusal("--config-file", file)
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("flash_offload: {dram_budget: }", "models.0.flash_offload: dram_budget: .*None"),
        ("7: 8", "there is no setting 7"),
        ("flash_offload: {7: 8}", "there is no option 7"),
    ],
)
def test_settings_that_make_no_sense_are_named(entry: str, said: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"models: [{{model: {model}, {entry}}}]")
    with pytest.raises(ValueError, match=rf"settings\.yaml: .*{said}"):
        read_settings(file, {}, {}, {})


def test_flags_come_before_the_file_and_the_file_before_the_environment(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = {"window": 4, "predictor": "off"}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"port": 2, "models": [{"model": str(model), "n_batch": 64, "flash_offload": flash}]}))
    for name, value in {"PORT": "3", "API_KEY": "k", "N_BATCH": "32", "N_CTX": "99", "SEED": "7"}.items():
        monkeypatch.setenv(f"{ENV_PREFIX}{name}", value)
    monkeypatch.setenv("PORT", "4")  # upstream's name, which much else has too
    service, (served,) = read_settings(file, {}, {"n_ctx": 55}, {"window": 9})
    assert (service.port, service.api_key, service.host) == (2, "k", "127.0.0.1")
    assert not service.interrupt_requests
    assert (served.n_ctx, served.n_batch, served.seed, served.logits_all) == (55, 64, 7, False)
    assert served.flash_offload == {"window": 9, "predictor": "off"}
    assert served.model_alias == SHIPPED.stem
    monkeypatch.setenv(f"{ENV_PREFIX}FLASH_OFFLOAD__WINDOW", "3")
    monkeypatch.setenv(f"{ENV_PREFIX}FLASH_OFFLOAD__DRAM_BUDGET", "50%")
    service, (served,) = read_settings(None, {"port": 1}, {}, {"dram_budget": "1GiB"}, default_model=model)
    assert service.port == 1 and served.model == str(model)
    assert served.flash_offload == {"dram_budget": "1GiB", "window": 3}


def test_two_models_of_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"models": [{"model": str(model)}, {"model": str(model)}]}))
    with pytest.raises(ValueError, match="several models are called stdlib-moe-q8_0: give each a model_alias"):
        read_settings(file, {}, {}, {})


def test_without_its_packages_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; from llama_flash.cli import main; "
        "sys.argv[1:] = ['serve', '--classic']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "uvicorn" in done.stderr and "pip install 'llama_cpp_python[server]'" in done.stderr


def test_upstreams_own_server_takes_flash_offload(model: Path) -> None:
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--logits_all", "false"]
    options = ["--flash_offload", '{"dram_budget": "32MiB"}']
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "FlashBudgetError: a DRAM budget of 32.0 MiB is too small" in done.stderr
