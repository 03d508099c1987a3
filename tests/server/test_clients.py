"""What clients ask of `llama-flash serve`: the packages of OpenAI and Anthropic, a real model, a real memory cap."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from caps import require_caps
from gguf import GGUFValueType
from serving import KEY, PATIENCE, SERVE, Server, eventually, post, serving, smallest_budget

from gguf_tools.source import KeyValue, open_gguf
from gguf_tools.stream import copied, write_gguf

MIB = 1 << 20
CONTEXT = ("-c", "1024", "--parallel", "4")
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": SCHEMA}}


TOOLS = [tool("weather"), tool("time")]


def called(city: str) -> Any:
    arguments = json.dumps({"city": city})
    return {"id": city, "type": "function", "function": {"name": "weather", "arguments": arguments}}


# so small a model calls a tool only after it has seen how
BEFORE: list[Any] = [
    message
    for city, weather in (("Rome", "rainy"), ("Oslo", "cold"))
    for message in (
        {"role": "user", "content": f"What is the weather in {city}?"},
        {"role": "assistant", "content": "", "tool_calls": [called(city)]},
        {"role": "tool", "tool_call_id": city, "content": weather},
        {"role": "assistant", "content": f"It is {weather} in {city}."},
    )
] + QUESTION
# SmolLM2's own template has no place for tools
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' }}{%- if message.content %}{{ message.content }}{%- endif %}
{%- if message.tool_calls %}{%- for call in message.tool_calls %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
"""


@pytest.fixture(scope="module")
def model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real model with a template that knows tools."""
    folder = tmp_path_factory.mktemp("served")
    source = open_gguf(real_model)
    values = {**source.values, "tokenizer.chat_template": KeyValue(TEMPLATE, GGUFValueType.STRING)}
    path = folder / "small.gguf"
    write_gguf(path, values, [copied(tensor) for tensor in source.tensors.values()])
    yield path
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_caps()
    cap = smallest_budget(model, *CONTEXT, command=SERVE) + 64 * MIB
    arguments = [str(model), *CONTEXT, "--api-key", KEY]
    with serving(arguments, tmp_path_factory.mktemp("log") / "server.log", cap, command=SERVE) as server:
        yield server
        assert server.stop() == 128 + signal.SIGTERM, server.text
    found = re.search(r"peak (\S+ \S+) of .* (\d+) OOM kills", server.text)
    assert found and found[2] == "0", server.text


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=PATIENCE)


def in_flight(server: Server) -> float:
    metrics = server.metrics()
    return metrics["llamacpp:requests_processing"] + metrics["llamacpp:requests_deferred"]


# --- OpenAI's chat ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("auto", "weather"),
        ("required", "weather"),
        ({"type": "function", "function": {"name": "weather"}}, "weather"),
        ({"type": "function", "function": {"name": "time"}}, "time"),
    ],
)
def test_the_loop_of_a_tool_goes_round(choice: Any, name: str, client: openai.OpenAI, server: Server) -> None:
    asked = client.chat.completions.create(
        model="any", messages=BEFORE, tools=TOOLS, tool_choice=choice, max_tokens=200, temperature=0
    )
    message = asked.choices[0].message
    assert asked.choices[0].finish_reason == "tool_calls" and message.tool_calls
    call: Any = message.tool_calls[0]
    assert call.function.name == name and list(json.loads(call.function.arguments)) == ["city"]
    said = {"role": "assistant", "tool_calls": [call.model_dump()]}
    answer = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    answers = []
    for what in ({**said, "content": None}, said, {**said, "content": ""}):
        body = {"messages": [*BEFORE, what, answer], "tools": TOOLS, "max_tokens": 12, "temperature": 0}
        status, told = post(server, "/v1/chat/completions", body)
        assert status == 200, told
        answers.append(told["choices"][0]["message"])
    assert answers.count(answers[0]) == 3 and (answers[0]["content"] or answers[0]["tool_calls"])


def test_a_streamed_tool_call_is_the_same_in_pieces(client: openai.OpenAI) -> None:
    pieces = ["", ""]
    for chunk in client.chat.completions.create(
        model="any", messages=BEFORE, tools=TOOLS, tool_choice="required", max_tokens=200, temperature=0, stream=True
    ):
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function is not None
            pieces = [pieces[0] + (call.function.name or ""), pieces[1] + (call.function.arguments or "")]
    assert pieces[0] == "weather" and list(json.loads(pieces[1])) == ["city"]


def test_tools_are_refused_where_the_template_has_no_place_for_them(real_model: Path, tmp_path: Path) -> None:
    with serving([real_model, "-c", "512", "--parallel", "1"], tmp_path / "log", command=SERVE) as server:
        with pytest.raises(openai.BadRequestError, match="no tool calls"):
            server.client().chat.completions.create(model="any", messages=QUESTION, tools=TOOLS, max_tokens=4)
        answer = server.client().chat.completions.create(
            model="any", messages=QUESTION, tools=TOOLS, tool_choice="none", max_tokens=4
        )
        assert answer.choices[0].message.content


def test_no_more_tokens_than_were_asked_for(client: openai.OpenAI) -> None:
    limits: list[dict[str, Any]] = [{"max_completion_tokens": 5}, {"max_tokens": 5}]
    for limit in limits:
        answer = client.chat.completions.create(model="any", messages=QUESTION, temperature=0, **limit)
        assert answer.usage is not None and answer.usage.completion_tokens == 5


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="any", messages=QUESTION, temperature=0, max_tokens=60, response_format=form
    )
    assert list(json.loads(answer.choices[0].message.content or "")) == ["city"]


def test_a_grammar_is_kept(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="any", prompt="Yes?", extra_body={"grammar": 'root ::= "yes" | "no"'})
    assert answer.choices[0].text in ("yes", "no")


def test_several_answers_to_one_question(client: openai.OpenAI) -> None:
    chats = client.chat.completions.create(model="any", messages=QUESTION, n=3, max_tokens=8, temperature=1.5, seed=3)
    assert [choice.index for choice in chats.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in chats.choices}) > 1
    texts = client.completions.create(model="any", prompt=["One, two,", "A, B,"], max_tokens=4, temperature=0)
    alone = [
        client.completions.create(model="any", prompt=p, max_tokens=4, temperature=0) for p in ("One, two,", "A, B,")
    ]
    assert [choice.text for choice in texts.choices] == [one.choices[0].text for one in alone]


def test_a_stream_says_what_it_took_if_it_is_asked_to(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="any", messages=QUESTION, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    assert [chunk.usage.completion_tokens for chunk in stream if chunk.usage] == [5]


def test_the_developer_is_heard(client: openai.OpenAI) -> None:
    def ask(role: str) -> str | None:
        messages: Any = [{"role": role, "content": "Answer in French."}, *QUESTION]
        answer = client.chat.completions.create(model="any", messages=messages, max_tokens=12, temperature=0)
        return answer.choices[0].message.content

    assert ask("developer") == ask("system") != ask("user")


def test_a_prompt_may_be_tokens(client: openai.OpenAI, server: Server) -> None:
    _, told = post(server, "/tokenize", {"content": "One, two,"})
    want = client.completions.create(model="any", prompt="One, two,", max_tokens=6, temperature=0)
    got = client.completions.create(model="any", prompt=told["tokens"], max_tokens=6, temperature=0)
    assert got.choices[0].text == want.choices[0].text != ""


def test_probabilities_have_the_form_of_openai(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="any", messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    told = chat.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 3
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 and len(one.top_logprobs) == 2 for one in told.content)

    text = client.completions.create(model="any", prompt="Äpfel, Öl,", max_tokens=6, temperature=0, logprobs=2)
    probs: Any = text.choices[0].logprobs
    assert "".join(probs.tokens) == text.choices[0].text
    assert probs.text_offset == [sum(map(len, probs.tokens[:i])) for i in range(6)]
    for token, logprob, top in zip(probs.tokens, probs.token_logprobs, probs.top_logprobs, strict=True):
        # two may have one text
        assert 1 <= len(top) <= 2 and top[token] == logprob == max(top.values()) <= 0

    offsets, tokens = [], []
    for chunk in client.completions.create(
        model="any", prompt="Äpfel, Öl,", max_tokens=6, temperature=0, logprobs=2, stream=True
    ):
        if (piece := chunk.choices[0].logprobs) is not None:
            offsets += piece.text_offset or []
            tokens += piece.tokens or []
    assert (tokens, offsets) == (probs.tokens, probs.text_offset)


# --- others -----------------------------------------------------------------------------------------------------------


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="any", input="Say hello.", max_output_tokens=8, temperature=0)
    pieces = [
        event.delta
        for event in client.responses.create(
            model="any", input="Say hello.", max_output_tokens=8, temperature=0, stream=True
        )
        if event.type == "response.output_text.delta"
    ]
    assert whole.output_text == "".join(pieces) != ""


def test_messages_as_anthropic_has_them(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "any", "max_tokens": 8, "system": "Be brief.", "messages": QUESTION}
    whole: Any = claude.messages.create(**options, extra_body={"temperature": 0})
    with claude.messages.stream(**options, extra_body={"temperature": 0}) as stream:
        text = "".join(stream.text_stream)
    assert whole.content[0].text == text != "" and whole.usage.output_tokens == 8
    assert claude.messages.count_tokens(model="any", messages=QUESTION).input_tokens > 5
    used: Any = claude.messages.create(
        model="any",
        max_tokens=200,
        messages=[
            message
            for city, weather in (("Rome", "rainy"), ("Oslo", "cold"))
            for message in (
                {"role": "user", "content": f"What is the weather in {city}?"},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": city, "name": "weather", "input": {"city": city}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": city, "content": weather}]},
                {"role": "assistant", "content": f"It is {weather} in {city}."},
            )
        ]
        + QUESTION,
        tools=[{"name": "weather", "description": "The weather of a city.", "input_schema": SCHEMA}],
        tool_choice={"type": "any"},
        extra_body={"temperature": 0},
    )
    assert used.stop_reason == "tool_use"
    assert [list(block.input) for block in used.content if block.type == "tool_use"] == [["city"]]


# --- what cannot be done is said --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", {"prompt": "a", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {}, "prompt"),
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "tools": TOOLS, "tool_choice": {"function": {"name": "x"}}},
            "x",
        ),
        ("/v1/chat/completions", {"messages": QUESTION, "n": 99}, "'n'"),
        ("/v1/completions", {"prompt": "x " * 5000}, "context size"),
    ],
)
def test_what_is_not_done_is_refused(path: str, body: dict[str, Any], said: str, server: Server) -> None:
    status, told = post(server, path, {"max_tokens": 2, **body})
    assert status == 400 and said in told["error"]["message"], told


def test_what_clients_send_although_it_says_nothing_is_taken(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="any", prompt="a", max_tokens=2, best_of=1, echo=False, suffix=None)
    assert answer.choices[0].finish_reason == "length"


# --- who waits, and who does not --------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_sequence(server: Server) -> None:
    client = server.client()
    streams = [
        client.completions.create(
            model="any", prompt=f"{i},", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        for i in range(4)
    ]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model="any", prompt="b", max_tokens=2)
        assert eventually(lambda: server.metrics()["llamacpp:requests_deferred"] == 1)
        assert not waiting.done()
        streams[0].close()
        assert waiting.result(PATIENCE).choices[0].text
        assert in_flight(server) == 3, "it had to wait for one that was still there"
    for stream in streams[1:]:
        stream.close()
    assert eventually(lambda: in_flight(server) == 0)


@pytest.mark.parametrize("body", [{"prompt": "x = 1\n" * 200, "max_tokens": 100}, {"prompt": "a", "max_tokens": 900}])
def test_what_nobody_waits_for_is_not_computed_to_its_end(body: dict[str, Any], server: Server) -> None:
    before = server.metrics()
    text = json.dumps({**body, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        assert eventually(lambda: in_flight(server) == 1)
    assert eventually(lambda: in_flight(server) == 0)
    after = server.metrics()
    assert after["llamacpp:tokens_predicted_total"] - before["llamacpp:tokens_predicted_total"] < body["max_tokens"]


def test_a_short_prompt_does_not_wait_for_longer_ones(server: Server) -> None:
    """They are computed in pieces, and share each pass; upstream's server would fill the last sequence last."""
    ended: list[str] = []
    lock = threading.Lock()

    clients = [server.client() for _ in range(4)]

    def ask(name: str, prompt: str, sequence: int) -> None:
        body = {"cache_prompt": False, "id_slot": sequence}
        clients[sequence].completions.create(model="any", prompt=prompt, max_tokens=1, extra_body=body)
        with lock:
            ended.append(name)

    def comes_first() -> bool:
        """Unless it was asked when the others had almost ended."""
        ended.clear()
        before = server.metrics()["llamacpp:prompt_tokens_total"]
        with ThreadPoolExecutor(4) as pool:
            longer = [pool.submit(ask, f"long {i}", f"{i} " + "x = 1\n" * 180, i) for i in range(3)]
            while in_flight(server) < 3 and not all(one.done() for one in longer):
                pass
            short = pool.submit(ask, "short", "One, two,", 3)
            for one in (*longer, short):
                one.result(PATIENCE)
        assert server.metrics()["llamacpp:prompt_tokens_total"] - before > 2000
        return ended[0] == "short"

    assert any(comes_first() for _ in range(10)), "each time"


def test_answers_are_those_given_alone_while_others_come_and_go(server: Server) -> None:
    prompts = [f"{name} is a city in" for name in ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Bonn", "Delhi", "Kyiv")]

    def ask(prompt: str) -> str:
        return (
            server.client().completions.create(model="any", prompt=prompt, max_tokens=16, temperature=0).choices[0].text
        )

    alone = [ask(prompt) for prompt in prompts]
    stop = threading.Event()

    def leave(i: int) -> None:
        while not stop.is_set():
            stream = server.client().completions.create(
                model="any", prompt=f"{i} " * 50, max_tokens=500, stream=True, temperature=1.0
            )
            for _ in range(3):
                next(stream, None)
            stream.close()

    with ThreadPoolExecutor(10) as pool:
        others = [pool.submit(leave, i) for i in range(2)]
        try:
            for _ in range(2):
                assert list(pool.map(ask, prompts)) == alone
        finally:
            stop.set()
        for other in others:
            other.result(PATIENCE)
    assert eventually(lambda: in_flight(server) == 0)
