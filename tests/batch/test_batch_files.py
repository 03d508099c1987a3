"""The files of a batch: what lines say, what is wrong with them, and what a second run finds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from batches import answers, request, write

from llama_flash import FlashError
from llama_flash.batch.answers import Answers
from llama_flash.batch.requests import Requests, tokens_at_most

HASHES = ("0123abcd", "4567cdef")
A, B = "a" * 16, "b" * 16  # keys


def read(text: str | bytes) -> Requests:
    return Requests(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "requests.jsonl")


def opened(path: Path, **options: bool) -> Answers:
    return Answers(path, *HASHES, **options)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("nonsense", "invalid_json_line", "not JSON"),
        ("[1]", "invalid_json_line", "not a JSON object"),
        ('{"custom_id": "x", "url": NaN}', "invalid_json_line", "NaN"),
        ("[" * 100_000, "invalid_json_line", "nested too deeply"),
        ('{"url": "/v1/completions", "body": {}}', "missing_required_parameter", "custom_id"),
        ('{"custom_id": 7, "url": "/v1/completions", "body": {}}', "missing_required_parameter", "custom_id"),
        ('{"custom_id": "x", "url": "/v1/images", "body": {}}', "invalid_url", "/v1/images"),
        ('{"custom_id": "x", "url": ["/v1"], "body": {}}', "invalid_url", "/v1"),
        ('{"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}', "invalid_method", "GET"),
        ('{"custom_id": "x", "url": "/v1/completions", "body": "text"}', "missing_required_parameter", "body"),
        ('{"custom_id": "x", "url": "/v1/completions", "body": {"stream": true}}', "invalid_request", "stream"),
        ('{"custom_id": "first", "url": "/v1/completions", "body": {}}', "duplicate_custom_id", "line 1"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_the_others_are_read(line: str, code: str, says: str) -> None:
    good = [json.dumps(request(name, "import os")) for name in ("first", "last")]
    found = list(read(f"{good[0]}\n\n{line}\n{good[1]}").read(set(), embeddings=False))
    assert [one.custom_id for one in found if one.bad is None] == ["first", "last"]
    (bad,) = [one.bad for one in found if one.bad]
    assert bad.code == code and says in str(bad)
    assert [one.line for one in found] == [1, 3, 4]


def test_bytes_that_are_no_text_are_a_bad_line_and_a_mark_of_byte_order_is_none() -> None:
    found = list(
        read(b"\xef\xbb\xbf" + json.dumps(request("a", "x")).encode() + b"\r\n\xff\xfe\n").read(set(), embeddings=False)
    )
    assert [one.bad is None for one in found] == [True, False]


def test_a_key_is_of_what_is_asked_and_not_of_how_it_is_written() -> None:
    one = '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 3}}'
    same = '{"body": {"max_tokens": 3,   "prompt": "x"}, "method": "POST", "url": "/v1/completions", "custom_id": "a"}'
    for other in (same, one):
        assert list(read(other).keys()) == list(read(one).keys())
    for name, value in (("x", "y"), ('"a"', '"b"'), ("3", "4")):
        assert list(read(one.replace(name, value)).keys()) != list(read(one).keys())


def test_a_file_that_changes_while_it_is_read_is_noticed() -> None:
    file = io.BytesIO(json.dumps(request("a", "x")).encode())
    requests = Requests(file, "requests.jsonl")
    file.getbuffer()[-4:-3] = b"y"
    with pytest.raises(ValueError, match=r"requests\.jsonl: line 1 has changed"):
        list(requests.read(set(), embeddings=False))


def test_the_context_is_enough_for_the_longest_request() -> None:
    lines = [request("a", "x" * 100, max_tokens=50), request("b", "é" * 300, max_tokens=5)]
    lines.append(request("c", ["y" * 5000], "/v1/embeddings"))
    requests = read("\n".join(map(json.dumps, lines)))
    assert 605 <= requests.context(embeddings=False) < 1000
    assert 5000 <= requests.context(embeddings=True) < 5500
    message = [{"role": "user", "content": [{"type": "text", "text": "z" * 4000}]}]
    assert 4007 <= tokens_at_most("/v1/chat/completions", {"messages": message, "max_completion_tokens": 7}) < 4400
    assert tokens_at_most("/v1/completions", {"prompt": "short"}) == 2048
    assert tokens_at_most("/v1/completions", {"prompt": [5] * 900, "max_tokens": 1}) < 1000


def test_answers_are_found_by_a_second_run_and_what_is_left_of_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = opened(path)
    first.begin(retry=False)
    first.write(A, "one", {"status_code": 200, "body": {}}, None)
    first.close()
    whole = path.read_bytes()
    for half in ("", "{", '{"id": "batch_req_', '{"id": "batch_req_01", "custom_id": "two", "resp'):
        path.write_bytes(whole + half.encode())
        second = opened(path)
        second.check({A, B}, retry=False)
        assert second.done == {A} and second.n_errors == 0
        second.begin(retry=False)
        second.write(B, "two", None, {"code": "x", "message": "y"})
        second.close()
        assert [line["custom_id"] for line in answers(path)] == ["one", "two"]
        assert path.read_bytes().startswith(whole)


def test_errors_are_asked_again_if_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = opened(path)
    first.begin(retry=False)
    first.write(A, "one", {"status_code": 500, "body": {}}, None)
    first.write(B, "two", {"status_code": 200, "body": {}}, None)
    first.close()
    again = opened(path)
    assert again.n_errors == 1
    with pytest.raises(FlashError, match=r"answers\.jsonl: 1 of its answers .* line 1 \(one\): --retry"):
        again.check({B}, retry=False)
    again.check({B}, retry=True)
    again.begin(retry=True)
    assert again.done == {B} and again.n_errors == 0
    with pytest.raises(FlashError, match="another run writes it now"):
        opened(path)
    again.write("c" * 16, "three", {"status_code": 200, "body": {}}, None)
    again.close()
    assert [line["custom_id"] for line in answers(path)] == ["two", "three"]


def test_answers_of_another_model_or_seed_or_request_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = opened(path)
    first.begin(retry=False)
    first.write(A, "one", {"status_code": 200, "body": {}}, None)
    first.close()
    before = path.read_bytes()
    for hashes, keys, says in (
        (("f" * 8, HASHES[1]), {A}, "1 of its answers are of another model"),
        ((HASHES[0], "f" * 8), {A}, "1 of its answers are of another seed or predictor"),
        (HASHES, {B}, r"1 of its answers are to other requests than the input has now, as that in line 1 \(one\)"),
    ):
        other = Answers(path, *hashes)
        with pytest.raises(FlashError, match=says + ".*--force"):
            other.check(keys, retry=False)
        other.close()
    assert path.read_bytes() == before
    fresh = Answers(path, "f" * 8, HASHES[1], fresh=True)
    fresh.check({B}, retry=False)
    assert path.read_bytes() == before
    fresh.begin(retry=False)
    fresh.close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "text", ["a letter to my aunt", "a letter\nto my aunt\n", '{"id": "x"}\n', "[1]\n", "\0\0\0\n"]
)
def test_a_file_of_something_else_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_text(text)
    with pytest.raises(FlashError, match="letter: line 1 is no answer of a batch"):
        opened(path)
    assert path.read_text() == text


def test_what_is_no_file_is_refused_and_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    with pytest.raises(FlashError, match="/dev/null: no file"):
        opened(Path("/dev/null"))
    nothing = opened(tmp_path / "nothing")
    nothing.close()
    assert not list(tmp_path.iterdir())


def test_the_helper_writes_what_requests_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "requests.jsonl", [request("a", "x"), "bad"])
    with path.open("rb") as file:
        requests = Requests(file, path.name)
    assert len(requests) == 2 and requests.n_bad == 1
