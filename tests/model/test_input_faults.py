"""What users give that is no model, has no vocabulary, is no text, or is shown where Unicode cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from llama_cpp import Llama

import llama_flash
from gguf_tools import GgufToolsError
from gguf_tools.source import KeyValue, open_gguf
from gguf_tools.stream import copied, write_gguf
from llama_flash import FlashFormatError
from llama_flash.cli.common import utf8
from llama_flash.model.gguf import read_gguf

SHIPPED = Path(llama_flash.__file__).parent / "models" / "stdlib-moe-q8_0.gguf"
SMALL: dict[str, Any] = {"n_ctx": 128, "n_batch": 32, "n_ubatch": 32, "verbose": False}
# as in a container without locales, with a Python that is told not to help itself
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}


def flash(*arguments: str | Path | bytes, stdin: bytes = b"", **environment: str) -> tuple[int, bytes, bytes]:
    command = [sys.executable, "-m", "llama_flash", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=400, env={**os.environ, **environment})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=["a pipe (FIFO)", "a folder", "a device"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    path = tmp_path / "model.gguf"
    if request.param == "a pipe (FIFO)":
        os.mkfifo(path)
    elif request.param == "a folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    return request.param, path


def test_what_is_no_file_is_named_by_both_readers(no_file: tuple[str, Path]) -> None:
    kind, path = no_file
    for read, error in ((read_gguf, FlashFormatError), (open_gguf, GgufToolsError)):
        with pytest.raises(error) as caught:
            read(path)  # type: ignore[operator]
        assert f"{path}: {kind}, not a GGUF file" in str(caught.value)
    for offload in (True, False):
        with pytest.raises(FlashFormatError, match=f"{kind[2:6]}.*, not a GGUF file"):
            Llama(str(path), flash_offload=offload, **SMALL)


@pytest.mark.parametrize(
    "command",
    ["run", "inspect", "doctor", "plan", "simulate", "trace -o x.npz --text", "calibrate m.gguf x.gguf --text"],
)
def test_no_command_waits_for_the_writer_of_a_pipe(command: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    model = str(SHIPPED.with_name("stdlib-opt-q8_0-flash.gguf"))
    code, output, errors = flash(*[model if word == "m.gguf" else word for word in command.split()], pipe)
    assert (code, output) == (1, b"")
    assert errors.startswith(b"llama-flash: ") and errors.count(b"\n") == 1 and b"a pipe (FIFO)" in errors


@pytest.fixture(scope="module")
def speechless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model without its vocabulary, by what its file says of that."""
    source = open_gguf(SHIPPED)
    values = {key: value for key, value in source.values.items() if not key.startswith("tokenizer.")}
    n_vocab = source.tensors["token_embd.weight"].shape[1]
    values[f"{values['general.architecture'].value}.vocab_size"] = KeyValue(n_vocab, GGUFValueType.UINT32)
    files = {}
    for kind in ("none", "missing"):
        files[kind] = tmp_path_factory.mktemp("speechless") / f"{kind}.gguf"
        told = {"tokenizer.ggml.model": KeyValue("none", GGUFValueType.STRING)} if kind == "none" else {}
        write_gguf(files[kind], values | told, [copied(tensor) for tensor in source.tensors.values()])
    return files


@pytest.mark.parametrize(
    ("command", "kind"),
    [("run", "none"), ("run", "missing"), ("chat", "none"), ("serve", "none"), ("bench", "none"), ("trace", "none")],
)
def test_a_model_without_a_vocabulary_is_refused_before_it_is_loaded(
    command: str, kind: str, speechless: dict[str, Path], tmp_path: Path
) -> None:
    options = {"trace": ["-p", "x", "-o", str(tmp_path / "x.npz")], "serve": ["--port", "0"]}
    code, output, errors = flash(command, speechless[kind], *options.get(command, []), stdin=b"hello\n")
    assert (code, output) == (1, b"")
    line = errors.decode().splitlines()[-1]
    assert line.startswith(f"llama-flash: {speechless[kind]}: has no vocabulary") and kind in line, errors


def test_in_python_a_model_without_a_vocabulary_takes_tokens_and_refuses_text(speechless: dict[str, Path]) -> None:
    llm = Llama(str(speechless["none"]), flash_offload=True, **SMALL)
    llm.eval([1, 2, 3])
    assert 0 <= next(llm.generate([4, 5, 6])) < llm.n_vocab()
    for ask in (
        lambda: llm.create_completion("import os", max_tokens=2),
        lambda: llm.create_completion([1, 2, 3], max_tokens=2),
        lambda: llm.create_chat_completion([{"role": "user", "content": "x"}], max_tokens=2),
        lambda: llm.tokenize(b"import os"),
        lambda: llm.detokenize([5]),
    ):
        with pytest.raises(ValueError, match="no vocabulary"):
            ask()
    llm.eval([1, 2, 3])
    llm.close()
    with pytest.raises(FlashFormatError, match=r"missing\.gguf: has no vocabulary"):
        Llama(str(speechless["missing"]), flash_offload=True, **SMALL)
    with pytest.raises(FlashFormatError, match=r"missing\.gguf: has no vocabulary"):
        llama_flash.plan(speechless["missing"])


@pytest.mark.parametrize("command", ["run -p", "chat --system", "bench -p", "trace -o x.npz --text"])
def test_a_prompt_that_is_not_utf8_is_refused_before_the_load(command: str, tmp_path: Path) -> None:
    prompt: bytes | Path = b"caf\xe9 au lait"
    if command.endswith("--text"):
        prompt = tmp_path / "text"
        prompt.write_bytes(b"caf\xe9 au lait")
    code, output, errors = flash(*command.split(), prompt)
    assert (code, output) == (1, b"")
    assert b"not UTF-8: byte 0xe9 after 'caf'" in errors and errors.count(b"\n") == 1


def test_a_line_of_chat_that_is_not_utf8_is_told_and_the_next_one_is_answered() -> None:
    code, output, errors = flash("chat", "-n", "3", "--json", stdin=b"caf\xe9\n/system caf\xc3\xa9\nimport os\n")
    assert code == 0 and b"not UTF-8: byte 0xe9 after 'caf'" in errors
    said = json.loads(output)
    assert [turn["user"] for turn in said["turns"]] == ["import os"] and said["system"] == "café"


def test_a_text_to_calibrate_on_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"caf\xe9 au lait" * 1000)
    model = SHIPPED.with_name("stdlib-opt-q8_0-flash.gguf")
    code, _, errors = flash("calibrate", model, tmp_path / "out.gguf", "--text", text)
    assert code == 1 and b"not UTF-8" in errors and not (tmp_path / "out.gguf.calibration").exists()


def test_text_that_the_locale_could_not_read_is_read_as_utf8() -> None:
    assert utf8("x", b"caf\xc3\xa9".decode("ascii", errors="surrogateescape")) == "café"
    assert utf8("x", "café ☕") == "café ☕"


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "bench --help",
        "run -n 4 -p café",
        "run -n 2 -p ☕ --cap 400MiB",
        "plan",
        "inspect MODEL",
    ],
)
def test_a_terminal_without_unicode_is_written_to(command: str) -> None:
    arguments = [str(SHIPPED) if word == "MODEL" else word for word in command.split()]
    if "--cap" in arguments:
        from caps import require_caps

        require_caps()
    code, output, errors = flash(*arguments, **ASCII)
    assert code == 0, errors
    assert (output + errors).isascii() and b"Traceback" not in errors and b"codec" not in errors
    if "café" in arguments:
        assert output.startswith(b"caf\\xe9")
