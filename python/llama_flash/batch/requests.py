"""The lines of a batch file, in OpenAI's form: what each asks, or what is wrong with it.

The file is read twice: once to know all lines (where each begins, its key, how long a context has to be), and again
line by line as they are computed. Of the first reading a few dozen bytes are kept for each line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

__all__ = ["CHAT", "COMPLETIONS", "EMBEDDINGS", "BadLine", "Request", "Requests"]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_URLS = (CHAT, COMPLETIONS, EMBEDDINGS)
_KEY_BYTES = 8  # of the hash that tells requests of one file apart from what they were before
_BOM = b"\xef\xbb\xbf"


class BadLine(ValueError):
    """What is wrong with a line. code: as in OpenAI's error files."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True)
class Request:
    """One line."""

    line: int  # its number, from 1 on
    key: str  # hash of all that it says; of a line that is wrong, of its text and number
    custom_id: str | None
    url: str = ""
    body: Any = None
    bad: BadLine | None = None  # then there is nothing to ask


@dataclass(frozen=True, slots=True)
class _Place:
    line: int
    offset: int  # bytes
    key: str
    is_embedding: bool


class Requests:
    """Of one file, which must not change while they are read.

    Attributes:
        n_bad: lines that are wrong.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Reads all of it once. file: can be read from any offset. name: for messages. Raises OSError."""
        self._file, self._name = file, name
        self._places: list[_Place] = []
        self.n_bad = 0
        self._seen: dict[bytes, int] = {}  # hash of a custom_id: the line that has it
        self._needs: dict[bool, int] = {}  # tokens of context of the longest request; embeddings: True
        file.seek(0)
        for line, offset, raw in _lines(file):
            request = self._parsed(line, raw, self._seen)
            self.n_bad += request.bad is not None
            is_embedding = request.url == EMBEDDINGS
            self._places.append(_Place(line, offset, request.key, is_embedding))
            if request.bad is None:
                most = tokens_at_most(request.url, request.body)
                self._needs[is_embedding] = max(most, self._needs.get(is_embedding, 0))

    def __len__(self) -> int:
        return len(self._places)

    def keys(self) -> Iterator[str]:
        """Of all lines, in their order."""
        return (place.key for place in self._places)

    def context(self, *, embeddings: bool) -> int:
        """Tokens that are enough for each embedding, or each other request; 0: there is none."""
        return self._needs.get(embeddings, 0)

    def read(self, done: set[str], *, embeddings: bool) -> Iterator[Request]:
        """The lines whose key is not in `done`: embeddings, or all others and what is wrong.

        Raises:
            ValueError: the file has changed.
        """
        for place in self._places:
            if place.key in done or place.is_embedding != embeddings:
                continue
            self._file.seek(place.offset)
            request = self._parsed(place.line, self._file.readline(), self._seen)
            if request.key != place.key:
                raise ValueError(f"{self._name}: line {place.line} has changed while the batch ran")
            yield request

    @staticmethod
    def _parsed(line: int, raw: bytes, seen: dict[bytes, int]) -> Request:
        try:
            custom_id, url, body = _checked(raw)
            first = seen.setdefault(_hash(custom_id), line)
            if first != line:
                raise BadLine("duplicate_custom_id", f"custom_id is that of line {first}, too", custom_id)
        except BadLine as bad:
            return Request(line, _hash([line, raw.decode("latin-1")]).hex(), bad.custom_id, bad=bad)
        return Request(line, _hash([custom_id, url, body]).hex(), custom_id, url, body)


def prompt_at_most(url: str, body: Any) -> int:
    """Tokens of a prompt, of the longest where there are several: a token has a byte at least."""
    prompts = body.get({CHAT: "messages", COMPLETIONS: "prompt"}.get(url, "input"))
    several = isinstance(prompts, list) and url != CHAT
    n_bytes = max((_n_bytes(one) for one in prompts), default=0) if several else _n_bytes(prompts)
    if several and any(isinstance(one, int) for one in prompts):  # one prompt, as tokens
        n_bytes = len(prompts)
    n_bytes += _n_bytes(body.get("tools")) + _n_bytes(body.get("suffix"))
    return n_bytes + _TEMPLATE * (1 + (len(prompts) if url == CHAT and isinstance(prompts, list) else 0))


def tokens_at_most(url: str, body: Any) -> int:
    """Tokens of prompt and answer. Requests without max_tokens count as 2048 tokens."""
    prompt = prompt_at_most(url, body)
    if url == EMBEDDINGS:
        return prompt
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    if not isinstance(asked, int) or asked < 0:
        return max(_UNLIMITED, prompt + _ANSWER)
    return prompt + asked


_TEMPLATE = 32  # tokens that a chat template puts around a message
_UNLIMITED = 2048  # tokens, as in serve
_ANSWER = 512  # tokens that an answer has at least, whose length nobody limits


def _n_bytes(value: Any) -> int:
    """Of all text in it, names of fields too."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(_n_bytes(name) + _n_bytes(one) + 4 for name, one in value.items())
    if isinstance(value, list):
        return sum(_n_bytes(one) + 2 for one in value)
    return 8


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and text of each line that is not empty."""
    offset = 0
    for line, raw in enumerate(file, 1):
        if raw.removeprefix(_BOM).strip():
            yield line, offset, raw
        offset += len(raw)


def _checked(raw: bytes) -> tuple[str, str, dict[str, Any]]:
    """custom_id, url and body. Raises BadLine."""
    try:
        said = json.loads(raw.removeprefix(_BOM).decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadLine("invalid_json_line", f"not JSON: {reason}") from None
    if not isinstance(said, dict):
        raise BadLine("invalid_json_line", "not a JSON object")
    custom_id = said.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("missing_required_parameter", "custom_id: text is expected, by which the answer is found")
    if said.get("method", "POST") != "POST":
        raise BadLine("invalid_method", f"method: {said['method']!r} is not POST", custom_id)
    url, body = said.get("url"), said.get("body")
    if url not in _URLS:
        raise BadLine("invalid_url", f"url: {url!r} is not one of {', '.join(_URLS)}", custom_id)
    if not isinstance(body, dict):
        raise BadLine("missing_required_parameter", "body: a JSON object is expected", custom_id)
    if body.get("stream"):
        raise BadLine("invalid_request", "stream: an answer of a batch is one line, and comes as a whole", custom_id)
    return custom_id, str(url), body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _hash(value: Any) -> bytes:
    """Of a JSON value, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:_KEY_BYTES]
