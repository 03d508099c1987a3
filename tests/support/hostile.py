"""Requests that no server should fall for: known ones with the answer they get, and random ones without end."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

__all__ = ["CASES", "CHAT", "COMPLETION", "Fuzzer", "Hostile", "chat", "complete", "nested", "post"]

COMPLETION, CHAT = "/completion", "/v1/chat/completions"
_BIG = 2**31 - 1


def complete(**parameters: Any) -> dict[str, Any]:
    return {"prompt": "import os\n", "n_predict": 4, **parameters}


def chat(**parameters: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 4, **parameters}


def nested(n: int, opening: str = "[", inside: str = "", closing: str = "]") -> str:
    return opening * n + inside + closing * n


def post(url: str, path: str, body: bytes, key: str, patience: float) -> tuple[int, str]:
    """Status and answer. Raises OSError or HTTPException if there is none."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=patience)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@dataclass(frozen=True)
class Hostile:
    """A request, and the answer that it gets.

    Attributes:
        body: JSON, or bytes that are none.
        reason: regular expression that the error's message has.
    """

    name: str
    path: str
    body: dict[str, Any] | bytes
    reason: str
    status: int = 400

    @property
    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def _grammar(name: str, grammar: str, reason: str) -> Hostile:
    return Hostile(f"grammar: {name}", COMPLETION, complete(grammar=grammar), reason)


def _schema(name: str, schema: Any, reason: str) -> list[Hostile]:
    """As a parameter, as the format of an answer, and as that of a tool."""
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
    tools = [{"type": "function", "function": tool}]
    return [
        Hostile(f"schema: {name}", COMPLETION, complete(json_schema=schema), reason),
        Hostile(
            f"format: {name}",
            CHAT,
            chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}}),
            reason,
        ),
        Hostile(f"tool: {name}", CHAT, chat(tools=tools, tool_choice="required"), reason),
    ]


def _parameter(name: str, value: Any, reason: str) -> Hostile:
    return Hostile(f"{name}={str(value)[:20]}", COMPLETION, complete(**{name: value}), reason)


def _chain(n: int) -> str:
    return "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"\n'


def _twice(n: int, link: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """A schema of n definitions, each made of the next."""
    return {"$defs": {f"d{i}": link(i + 1) for i in range(n)} | {f"d{n}": {"type": "integer"}}, **link(0)}


def _ref(i: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/d{i}"}


def _types(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(n):
        schema = {"type": ["array", "array"], "items": schema}
    return schema


_AMBIGUOUS = "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} r{i + 1} | r{i + 1} "x" | r{i + 1}\n' for i in range(40))

CASES: list[Hostile] = [
    _grammar("a range that ends before it begins", "root ::= [z-a]", "range of characters"),
    _grammar("a token that the model does not have", "root ::= <[99999999]>", "no token 99999999"),
    _grammar("groups in groups", "root ::= " + nested(20000, "(", '"a"', ")"), "nested too deeply"),
    _grammar("rules that begin with rules", _chain(20000), "begin with another|longer than"),
    _grammar("more rules than that", _chain(9000), "begin with another"),
    _grammar("rules that begin twice with the next", _AMBIGUOUS + 'r40 ::= "a" | "b"\n', "too ambiguous"),
    _grammar("left recursion", 'root ::= root "a" | "b"', "left recursion"),
    _grammar("a rule that is not there", "root ::= nothing", "Undefined rule"),
    _grammar("no root", 'other ::= "a"', "no rule 'root'"),
    _grammar("repetitions of long text", "root ::= " + f'"{"a" * 2000}"{{2000}} ' * 20, "too large"),
    _grammar("a maximum below the minimum", 'root ::= "a"{19,15}', "smaller maximum"),
    _grammar("no grammar", "root ::= (((", "failed to parse grammar"),
    _grammar("long", "# " + "x" * 300_000 + '\nroot ::= "a"', "longer than 262144 bytes"),
    _grammar("no character that can be written", "root ::= [\\U7FFFFFF0-\\U7FFFFFFF]", "allows none"),
    *_schema("a range that ends before it begins", {"type": "string", "pattern": "^[z-a]$"}, "range of characters"),
    *_schema(
        "a billion items",
        {"type": "array", "items": {"type": "string"}, "minItems": 10**6, "maxItems": 10**9},
        "number of repetitions",
    ),
    *_schema(
        "a thousand optional properties",
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
        "optional properties",
    ),
    *_schema("lists of types in lists of types", _types(25), "too large"),
    *_schema(
        "the smallest integers", {"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 1}, "smaller maximum"
    ),
    Hostile("schema: a chain of references", COMPLETION, complete(json_schema=_twice(2000, _ref)), "too large"),
    Hostile(
        "schema: a reference to itself in allOf",
        COMPLETION,
        complete(json_schema={"allOf": [{"$ref": "#/a"}], "a": {"$ref": "#/a"}}),
        "refers to itself",
    ),
    Hostile(
        "schema: nested",
        COMPLETION,
        ('{"prompt":"a","json_schema":' + nested(20000, '{"items":', "{}", "}") + "}").encode(),
        "nests more than 64",
    ),
    Hostile(
        "a name of 300 kB", COMPLETION, complete(json_schema={"properties": {"_" * 300_000: {}}}), "a name of more"
    ),
    Hostile("5000 names", COMPLETION, complete(x={f"k{i}": 1 for i in range(5000)}), "4096 members"),
    Hostile("600 kB and more", COMPLETION, complete(x="a" * 700_000), "more memory than all of them"),
    Hostile("values", COMPLETION, complete(x=[1] * 150_000), "more than 66560 values"),
    Hostile("pieces", "/tokenize", {"content": "a" * 200_000, "with_pieces": True}, "more memory than all of them"),
    *(
        Hostile(
            f"nested: {path}",
            path,
            f'{{"content":"a","messages":[],"prompt":"a","x":{nested(20000)}}}'.encode(),
            "nests more than 64",
        )
        for path in (
            CHAT,
            COMPLETION,
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/tokenize",
            "/apply-template",
        )
    ),
    *(
        Hostile(f"{what}: {path}", path, body, reason)
        for path in (CHAT, COMPLETION, "/v1/responses", "/v1/messages", "/tokenize", "/detokenize")
        for what, body, reason in (
            ("not UTF-8", b'{"content":"\xff\xfe","prompt":"\xff"}', "not UTF-8, at byte 12"),
            ("NaN", b'{"prompt":"a","content":"a","temperature":NaN}', "not JSON"),
            ("infinity", b'{"prompt":"a","content":"a","temperature":1e999}', "not JSON"),
            ("no JSON", b"hello", "not JSON"),
            ("no object", b"[1]", "not a JSON object"),
            ("nothing", b"", "parse error|attempting"),
        )
    ),
    _parameter("grammar_triggers", [{"type": 99, "value": "x"}], "set by the server itself"),
    _parameter("chat_parser", "x", "set by the server itself"),
    _parameter("chat_format", 99, "set by the server itself"),
    _parameter("n_predict", -5, "must be between"),
    _parameter("n", 100, "must be between"),
    Hostile("n_probs", COMPLETION, complete(n_probs=_BIG, n_predict=200), "more memory than all of them"),
    _parameter("repeat_penalty", 0, "greater than 0"),
    _parameter("stop", ["a"] * 50_000, "more than 64"),
    _parameter("samplers", ["top_k"] * 10_000, "more than 64"),
    _parameter("prompt", ["a"] * 100, "more than 64"),
    _parameter("prompt", [], "must not be empty"),
    _parameter("prompt", [-1], "invalid tokens"),
    _parameter("prompt", [99_999_999], "invalid tokens"),
    _parameter("prompt", [0] * 5000, "exceeds the available context"),
    _parameter("prompt", {"prompt_string": "a", "multimodal_data": ["aa"]}, "does not support multimodal"),
    Hostile("messages", CHAT, chat(messages=[{"role": "user", "content": "a"}] * 10_000), "more than 4096"),
    _parameter("lora", "x", "must be an array"),
    Hostile("a token that is none", "/detokenize", {"tokens": [99_999_999]}, "no token 99999999"),
    Hostile(
        "an image",
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "image input is not supported",
    ),
    Hostile("a tool that is none", CHAT, chat(tools=[{"type": "function"}]), "Missing tool function"),
    Hostile("tools that are none", CHAT, chat(tools="x"), "tools"),
    Hostile("an adapter", "/lora-adapters", b"[]", "not changed by clients", 403),
]

_HOSTILE_NUMBERS = (0, -1, 1, 2, 64, _BIG, -_BIG, 2**63, -(2**63), 1e38, -1e38, 1e-45, 0.5, -0.5, 1.5)
_WORDS = ("a", "", "import os\n", "\x00", "é", "🙂", "<|im_start|>", "root", '"', "\\", "[", "{", "x" * 500)
_NUMERIC = (
    *("top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "temperature", "dynatemp_range", "dynatemp_exponent"),
    *("repeat_last_n", "repeat_penalty", "frequency_penalty", "presence_penalty", "dry_multiplier", "dry_base"),
    *("dry_allowed_length", "dry_penalty_last_n", "xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau"),
    *("mirostat_eta", "adaptive_target", "adaptive_decay", "seed", "n_probs", "min_keep", "n_keep", "n_discard"),
    *("n_indent", "n_cache_reuse", "t_max_predict_ms", "id_slot", "n", "n_cmpl", "top_logprobs", "logprobs"),
    *("reasoning_budget_tokens", "thinking_budget_tokens", "sse_ping_interval"),
)
_OTHER = (
    *("stop", "samplers", "logit_bias", "grammar", "json_schema", "response_format", "tools", "tool_choice", "lora"),
    *("dry_sequence_breakers", "response_fields", "cache_prompt", "stream", "stream_options", "echo", "ignore_eos"),
    *("post_sampling_probs", "return_tokens", "return_progress", "timings_per_token", "preserved_tokens", "suffix"),
    *("grammar_lazy", "reasoning_format", "reasoning_effort", "chat_template_kwargs", "parallel_tool_calls", "verbose"),
    *("add_generation_prompt", "continue_final_message", "reasoning_budget_start_tag", "reasoning_budget_end_tags"),
    *("reasoning_control", "best_of", "user", "model", "metadata", "system", "instructions", "backend_sampling"),
)
_SAMPLERS = (
    "dry",
    "top_k",
    "typ_p",
    "top_p",
    "top_n_sigma",
    "min_p",
    "xtc",
    "temperature",
    "infill",
    "penalties",
    "adaptive_p",
)
_PIECES = (
    '"a"',
    '"ab"',
    "[a-z]",
    "[^a]",
    ".",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "{0,3}",
    "{3,}",
    "a",
    "b",
    "root",
    "<[5]>",
    "!<[7]>",
    '" "',
    "\n",
)


class Fuzzer:
    """Requests that depend on the seed alone: a valid one, of which a few things are changed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def request(self) -> tuple[str, bytes]:
        """Path and body."""
        some = self._random
        path, body = some.choice(self._bases())()
        for _ in range(some.choice((0, 1, 1, 2, 4))):
            self._change(body)
        data = json.dumps(body).encode()
        if some.random() < 0.05:
            data = self._damaged(data)
        return path, data

    def _bases(self) -> list[Callable[[], tuple[str, dict[str, Any]]]]:
        word, few = self._word, self._few
        message = {"role": "user", "content": word()}
        return [
            lambda: (COMPLETION, complete(prompt=word(), n_predict=few())),
            lambda: ("/v1/completions", {"prompt": self._prompt(), "max_tokens": few()}),
            lambda: (CHAT, chat(messages=[message, *self._messages()], max_tokens=few())),
            lambda: (
                CHAT,
                chat(tools=[self._tool()], tool_choice=self._random.choice(("auto", "required", "none", "f"))),
            ),
            lambda: (CHAT, chat(response_format={"type": "json_schema", "json_schema": {"schema": self._schema(3)}})),
            lambda: (COMPLETION, complete(grammar=self._grammar())),
            lambda: (COMPLETION, complete(json_schema=self._schema(3))),
            lambda: ("/v1/responses", {"input": word(), "max_output_tokens": few(), "tools": [self._tool()]}),
            lambda: ("/v1/messages", {"messages": [message], "max_tokens": few(), "system": word()}),
            lambda: ("/v1/messages/count_tokens", {"messages": [message]}),
            lambda: (self._random.choice(("/v1/embeddings", "/embedding")), {"input": self._prompt()}),
            lambda: ("/tokenize", {"content": self._prompt(), "with_pieces": True}),
            lambda: ("/detokenize", {"tokens": [self._random.randrange(-2, 5000) for _ in range(few())]}),
            lambda: ("/apply-template", chat(messages=[message, *self._messages()])),
            lambda: ("/infill", {"input_prefix": word(), "input_suffix": word(), "n_predict": few()}),
            lambda: ("/rerank", {"query": word(), "documents": [word()]}),
        ]

    def _few(self) -> int:
        return self._random.choice((0, 1, 2, 4, 8))

    def _word(self) -> str:
        return "".join(self._random.choice(_WORDS) for _ in range(self._few()))

    def _prompt(self) -> Any:
        some = self._random
        kinds: tuple[Callable[[], Any], ...] = (
            self._word,
            lambda: [some.randrange(4000) for _ in range(self._few())],
            lambda: [self._word() for _ in range(some.choice((1, 2)))],
            lambda: [1, self._word(), 2],
            lambda: {"prompt_string": self._word()},
            lambda: self._value(2),
        )
        return some.choice(kinds)()

    def _messages(self) -> list[Any]:
        some = self._random
        call = {
            "id": "1",
            "type": "function",
            "function": {"name": "f", "arguments": some.choice(("{}", "{", '{"a": 1}'))},
        }
        kinds: tuple[Any, ...] = (
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": self._word(), "tool_call_id": "1"},
            {"role": some.choice(("system", "developer", "assistant", "nobody")), "content": self._word()},
            {"role": "user", "content": [{"type": "text", "text": self._word()}]},
            self._value(2),
        )
        return [some.choice(kinds) for _ in range(some.choice((0, 0, 1, 2)))]

    def _tool(self) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {"name": self._random.choice(("f", "", "a b")), "parameters": self._schema(3)},
        }

    def _grammar(self) -> str:
        some = self._random
        rule = " ".join(some.choice(_PIECES) for _ in range(some.choice((1, 2, 4, 8, 16))))
        return f'root ::= {rule}\na ::= "a" | b\nb ::= "b" a?\n'

    def _schema(self, depth: int) -> Any:
        some = self._random
        if depth == 0 or some.random() < 0.1:
            return some.choice(
                ({}, {"type": "string"}, {"type": "nothing"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, True, 5)
            )
        inner = [self._schema(depth - 1) for _ in range(some.choice((1, 2, 3)))]
        number = some.choice(_HOSTILE_NUMBERS)
        kinds: tuple[Any, ...] = (
            {"type": "object", "properties": {f"p{i}": each for i, each in enumerate(inner)}, "required": ["p0"]},
            {"type": "object", "additionalProperties": inner[0]},
            {"type": "array", "items": inner[0], "minItems": some.choice((0, 1, 5, number)), "maxItems": number},
            {"type": "array", "prefixItems": inner},
            {"type": "string", "minLength": number, "maxLength": some.choice((3, number))},
            {
                "type": "string",
                "pattern": some.choice(("^a$", "^[z-a]$", "^(a|b){2,5}$", "^((((", "(?=a)", "^\\d+$", "^.*$")),
            },
            {"type": "integer", "minimum": number, "maximum": some.choice(_HOSTILE_NUMBERS)},
            {"type": ["string", "integer"], "enum": [1, "a", None]},
            {some.choice(("anyOf", "oneOf", "allOf")): inner, "$defs": {"a": inner[0]}},
            {"const": self._value(2)},
            {"type": "string", "format": some.choice(("date", "time", "date-time", "uuid", "email"))},
        )
        return some.choice(kinds)

    def _value(self, depth: int) -> Any:
        some = self._random
        if depth and some.random() < 0.4:
            inner = [self._value(depth - 1) for _ in range(self._few())]
            return inner if some.random() < 0.5 else {self._word()[:20] or str(i): each for i, each in enumerate(inner)}
        return some.choice((None, True, False, self._word(), some.choice(_HOSTILE_NUMBERS), some.choice(_WORDS)))

    def _fitting(self, name: str) -> Any:
        """A value of the right kind, mostly."""
        some = self._random
        kinds: dict[str, Callable[[], Any]] = {
            "stop": lambda: [self._word() for _ in range(self._few())],
            "samplers": lambda: [some.choice(_SAMPLERS) for _ in range(self._few())],
            "logit_bias": lambda: [[some.randrange(-2, 5000), some.choice((False, 100, -100, 1e38))] for _ in range(9)],
            "grammar": self._grammar,
            "json_schema": lambda: self._schema(2),
            "tools": lambda: [self._tool()],
            "stream": lambda: True,
            "dry_sequence_breakers": lambda: [self._word() for _ in range(self._few())],
            "chat_template_kwargs": lambda: {"a": self._value(2), "enable_thinking": some.choice((True, False, "x"))},
        }
        fitting = kinds.get(name)
        return self._value(2) if fitting is None or some.random() < 0.2 else fitting()

    def _change(self, body: dict[str, Any]) -> None:
        some = self._random
        kind = some.random()
        if kind < 0.45:
            body[some.choice(_NUMERIC)] = some.choice(_HOSTILE_NUMBERS) if some.random() < 0.9 else self._value(1)
        elif kind < 0.85:
            name = some.choice(_OTHER)
            body[name] = self._fitting(name)
        elif kind < 0.95 and body:
            body[some.choice(list(body))] = self._value(3)
        elif body:
            del body[some.choice(list(body))]

    def _damaged(self, data: bytes) -> bytes:
        some = self._random
        at = some.randrange(len(data))
        return some.choice(
            (
                data[:at],
                data[:at] + bytes([some.randrange(256)]) + data[at + 1 :],
                data[:at] + b"[" * 500 + data[at:],
                data[:at] + b"NaN" + data[at:],
                data[:at] + b"\\ud800" + data[at:],
            )
        )
