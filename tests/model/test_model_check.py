"""A file that does not load says why, the same to everybody, and no file ends the process."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
from commands import Flash, in_this_process
from conftest import ModelFile
from gguf_fuzz import MOST_GROWTH, MOST_SECONDS, Case, judge, run
from gguf_mutations import ARRAY, STRING, Head, Info, Value
from serving import refusal

from gguf_tools.synthetic import tiny, write
from llama_flash import FlashFormatError, plan
from llama_flash.model.ggml_types import TYPE_SIZES
from llama_flash.model.gguf import read_gguf
from llama_flash.native import bindings
from llama_flash.planning.dry_run import check_model

GIB = 1 << 30
MODELS = Path(bindings.__file__).parent / "models"
Q8_1, Q8_K, F16, F64 = 9, 15, 1, 28

Change = Callable[[Head], Head]


@pytest.fixture(scope="module")
def head(model_file: ModelFile) -> Head:
    return Head.of(model_file("qwen3moe"))


def load(path: Path, **options: object) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), **{"flash_offload": True, "n_ctx": 64, "verbose": False, **options})


def key(name: str, kind: int, content: object, item: int = 0, claimed: int | None = None) -> Change:
    name = name if name.startswith(("general.", "tokenizer.", "split.")) else f"qwen3moe.{name}"
    return lambda head: head.put(name, Value(kind, content, item, claimed))


def no_key(name: str) -> Change:
    return lambda head: head.put(f"qwen3moe.{name}", None)


def groups_of_no_experts(head: Head) -> Head:
    return key("expert_group_count", U32, 2)(no_key("expert_count")(no_key("expert_used_count")(head)))


def kind(name: str, number: int) -> Change:
    return lambda head: head.retyped(name, number)


def info(name: str, shape: tuple[int, ...]) -> Change:
    def change(head: Head) -> Head:
        tensors = [replace(one, shape=shape) if one.name == name.encode() else one for one in head.tensors]
        return replace(head, tensors=tensors).laid_out()

    return change


def gap(head: Head) -> Head:
    tensors = [replace(one, offset=one.offset + (32 if i > 2 else 0)) for i, one in enumerate(head.tensors)]
    return replace(head, tensors=tensors, data=head.data + 32)


def one_more(head: Head) -> Head:
    return replace(head, tensors=[*head.tensors, Info(b"blk.1.more.weight", (32,), 0, 0)]).laid_out()


U32, F32 = 4, 6
EPSILON = "attention.layer_norm_rms_epsilon"
TWICE = [b"token"] * 512

REFUSED: dict[str, tuple[Change, str]] = {
    "an unknown architecture": (key("general.architecture", STRING, b"new"), "unknown model architecture: 'new'; this"),
    "a projector": (key("general.architecture", STRING, b"clip"), "CLIP cannot .*; it is the part of a model that "),
    "a tensor is missing": (lambda head: head.without("blk.1.attn_q.weight"), r"attn_q\.weight' not found; the file"),
    "a tensor too many": (one_more, "wrong number of tensors"),
    "no weights": (lambda head: replace(head, tensors=[]).laid_out(), "no weights|token_embd.weight' not found"),
    "cut off in the data": (lambda head: replace(head, cut=999), r"output\.weight.* (ends at byte|not within)"),
    "cut off in the head": (lambda head: replace(head, cut=head.data + 500), "cut off within its head|exceeds"),
    "a shape of another model": (info("blk.1.attn_k.weight", (256, 512)), r"blk\.1\.attn_k\.weight' has wrong shape"),
    "heads wider than weights": (key("attention.key_length", U32, 1 << 20), "attn_q.* has wrong shape|does not hold"),
    "too large to be true": (info("output.weight", (1 << 62, 4)), "output.weight|overflow"),
    "a gap between tensors": (gap, r"tensor '.*' has offset \d+, expected \d+"),
    "a count that is text": (key("block_count", STRING, b"3"), "block_count has wrong type str but expected type u32"),
    "200 million layers": (key("block_count", U32, 200_000_000), "n_layer_all <= LLAMA_MAX_LAYERS does not hold"),
    "no layers": (key("block_count", U32, 0), "n_layer_all > 0 .* does not hold"),
    "more layers ahead than layers": (key("nextn_predict_layers", U32, 9), "n_layer_nextn <= .* does not hold"),
    "no experts used": (key("expert_used_count", U32, 0), "n_expert_used_max > 0 does not hold"),
    "more experts used than there are": (key("expert_used_count", U32, 99), "n_expert_used_max <= .* does not hold"),
    "experts used where there are none": (no_key("expert_count"), "n_expert_used_max <= .* does not hold"),
    "groups of no experts": (groups_of_no_experts, "n_expert_groups == 0 does not hold"),
    "more groups than experts": (key("expert_group_count", U32, 99), "n_expert_groups < .* does not hold"),
    "a rotation of part of a head": (key("rope.dimension_count", U32, 63), "n_embd_head == n_rot does not hold"),
    "a scaling nobody knows": (key("rope.scaling.type", STRING, b"new"), "rope_scaling_type_train != .* does not hold"),
    "heads for 600 layers": (key("attention.head_count", ARRAY, [4] * 600, U32), "head_count has wrong array length"),
    "an epsilon that is no number": (key(EPSILON, F32, math.nan), "layer_norm_rms_epsilon is nan"),
    "a negative epsilon": (key(EPSILON, F32, -1.0), "layer_norm_rms_epsilon is -1"),
    "an infinite epsilon": (key(EPSILON, F32, math.inf), "layer_norm_rms_epsilon is inf"),
    "one token many times": (key("tokenizer.ggml.tokens", ARRAY, TWICE, STRING), "id_to_token.size.* does not hold"),
    "a list of a billion tokens": (key("tokenizer.ggml.tokens", ARRAY, TWICE, STRING, 1 << 30), "damaged|key-value"),
    "a weight of sums": (kind("blk.1.attn_q.weight", Q8_1), r"compatible buffer type for tensor blk\.1\.attn_q"),
    "experts of activations": (kind("blk.1.ffn_up_exps.weight", Q8_K), r"for tensor blk\.1\.ffn_up_exps\.weight"),
    "an embedding of doubles": (kind("token_embd.weight", F64), "compatible buffer type for tensor token_embd.weight"),
    "a norm of halves": (kind("blk.1.attn_norm.weight", F16), r"for tensor blk\.1\.attn_norm\.weight"),
    "an unknown type": (lambda head: replace(head.retyped("output.weight", 99)), "output.weight'? .*type 99"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_the_reason_by_all_that_load_or_check(what: str, head: Head, tmp_path: Path) -> None:
    change, said = REFUSED[what]
    path = change(head).save(tmp_path / "bad.gguf")
    for ask in (
        lambda: check_model(path),
        lambda: plan(path, n_ctx=64),
        lambda: load(path),
        lambda: load(path, flash_offload=False),
        lambda: load(path, flash_offload=False, verbose=True),
    ):
        with pytest.raises(FlashFormatError, match=said) as caught:
            ask()
        assert isinstance(caught.value, ValueError), "as llama_cpp's own error is"
        assert str(path) in caught.value.problem and caught.value.mend


@pytest.mark.weighs
@pytest.mark.parametrize("what", REFUSED)
def test_to_refuse_it_takes_neither_time_nor_memory(what: str, head: Head, tmp_path: Path) -> None:
    found = judge(REFUSED[what][0](head).save(tmp_path / "bad.gguf"))
    assert found["flash"]
    assert found["seconds"] < MOST_SECONDS and found["growth"] < MOST_GROWTH


def test_a_model_is_loaded_after_many_that_were_not(head: Head, model_file: ModelFile, tmp_path: Path) -> None:
    for i, (change, _) in enumerate(REFUSED.values()):
        with pytest.raises(FlashFormatError):
            load(change(head).save(tmp_path / f"{i}.gguf"))
    llm = load(model_file("qwen3moe"))
    llm.eval([1, 2, 3])
    llm.close()


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Flash:
    return in_this_process(capsys, monkeypatch)


def test_a_second_shard_names_the_first(here: Flash, model_file: ModelFile) -> None:
    first = model_file("qwen3moe", n_shards=2)
    second = first.with_name(first.name.replace("-00001-of-", "-00002-of-"))
    assert first != second and second.is_file()
    for ask in (read_gguf, check_model, plan, load):
        with pytest.raises(FlashFormatError, match=f"is shard 2 of 2, not the first; load the first one: {first.name}"):
            ask(second)
    with pytest.raises(FlashFormatError, match=r"illegal split file idx: 1 .*; name the first shard"):
        load(second, flash_offload=False)
    assert first.name in here("plan", second).stderr
    assert (
        first.name in here("inspect", second).stderr
        or "not the first of its 2 shards" in here("inspect", second).stderr
    )


def test_shards_that_were_joined_by_hand_are_told(model_file: ModelFile, tmp_path: Path) -> None:
    first = model_file("qwen3moe", n_shards=2)
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(shard.read_bytes() for shard in read_gguf(first).files))
    for ask in (read_gguf, check_model, plan, load):
        with pytest.raises(FlashFormatError, match=r"is the first of 2 shards, but .*gguf-split --merge joins them"):
            ask(joined)


def test_the_name_of_a_shard_is_no_matter_where_the_head_says_otherwise(head: Head, tmp_path: Path) -> None:
    load(head.save(tmp_path / "whole-00001-of-00003.gguf")).close()


@pytest.mark.parametrize("command", ["run", "chat", "bench", "plan", "doctor", "inspect"])
def test_each_command_says_the_reason_and_fails(
    command: str,
    here: Flash,
    head: Head,
    tmp_path: Path,
) -> None:
    path = head.without("blk.1.attn_q.weight").save(tmp_path / "bad.gguf")
    done = here(command, path)
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert "blk.1.attn_q.weight' not found" in said
    assert "get it anew, or convert it again" in said
    assert "Traceback" not in said


def test_serve_says_the_reason_in_one_line(head: Head, tmp_path: Path) -> None:
    line = refusal(key("general.architecture", STRING, b"new")(head).save(tmp_path / "bad.gguf"))
    assert "unknown model architecture: 'new'" in line


@pytest.mark.weighs
def test_a_tail_behind_the_last_tensor_is_no_weight(model_file: ModelFile, tmp_path: Path) -> None:
    path = model_file("llama")
    longer = tmp_path / "longer.gguf"
    longer.write_bytes(path.read_bytes())
    os.truncate(longer, GIB)
    before, after = read_gguf(path), read_gguf(longer)
    assert [tensor.size for tensor in before.tensors.values()] == [tensor.size for tensor in after.tensors.values()]
    assert before.file_bytes == after.file_bytes <= path.stat().st_size
    plans = [plan(file, "400MiB", n_ctx=64) for file in (path, longer)]
    for one in ("mode", "resident_weights", "flash_weights", "expert_bytes", "panel_bytes"):
        assert getattr(plans[0], one) == getattr(plans[1], one)
    assert abs(plans[0].smallest - plans[1].smallest) < 8 << 20, "the process' own memory moves a little"
    llm = load(longer)
    assert llm.flash.stats().memory.weights < 100 << 20
    llm.close()


def test_the_sizes_of_types_are_the_engines() -> None:
    library = ctypes.CDLL(str(bindings.library_path().with_name("libggml-base.so")))
    library.ggml_type_size.restype, library.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    numbers = (*range(max(n for n in TYPE_SIZES if n < 1000) + 1), *TYPE_SIZES)
    known = {n: (library.ggml_blck_size(n), library.ggml_type_size(n)) for n in numbers}
    assert {n: sizes for n, sizes in known.items() if sizes[0]} == TYPE_SIZES


def test_an_assert_elsewhere_ends_the_process_as_it_did() -> None:
    script = (
        "import ctypes, llama_cpp\n"
        "from llama_flash.native import bindings\n"
        "library = ctypes.CDLL(str(bindings.library_path().with_name('libggml-base.so')))\n"
        "library.ggml_abort(b'place.c', 7, b'told')\n"
    )
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGABRT
    assert "place.c:7: told" in done.stderr


def test_the_log_goes_to_its_callback_as_before(head: Head, tmp_path: Path) -> None:
    bad = key("general.architecture", STRING, b"new")(head).save(tmp_path / "bad.gguf")
    script = (
        "import ctypes, sys, llama_cpp\n"
        "heard = []\n"
        "@llama_cpp.llama_log_callback\n"
        "def callback(level, text, data):\n    heard.append(text.decode())\n"
        "llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))\n"
        "for _ in range(2):\n"
        "    heard.clear()\n"
        "    try:\n        llama_cpp.Llama(sys.argv[1], verbose=False)\n"
        "    except ValueError as error:\n        assert \"architecture: 'new'\" in str(error), error\n"
        "    else:\n        raise SystemExit('it was loaded')\n"
        "    assert any(\"architecture: 'new'\" in line for line in heard), heard\n"
    )
    subprocess.run([sys.executable, "-c", script, str(bad)], check=True)


def test_a_chat_template_that_does_not_parse_is_told_to_who_uses_it(head: Head, tmp_path: Path) -> None:
    llm = load(key("tokenizer.chat_template", STRING, b"{% for x in y %}")(head).save(tmp_path / "m.gguf"))
    assert llm.create_completion("a", max_tokens=2)["usage"]["completion_tokens"] == 2
    with pytest.raises(ValueError, match=r"m\.gguf: the chat template 'default' does not parse .*chat_format"):
        llm.create_chat_completion([{"role": "user", "content": "a"}])
    llm.close()


FORMS = ("llama", "mixtral", "qwen3moe", "deepseek2", "gpt-oss", "smallthinker")


@pytest.fixture(scope="module")
def bases(model_folder: Path) -> Iterator[list[Path]]:
    yield [write(tiny(form, n_layer=2), model_folder / f"base-{form}.gguf")[0] for form in FORMS]


def faults(cases: Iterator[Case]) -> list[str]:
    return [f"{Path(case.base).name}, seed {case.seed}: {said}" for case in cases for said in case.faults]


@pytest.mark.full
@pytest.mark.weighs
def test_heads_that_are_wider_together_than_any_weight_are_refused_before_their_cache_is_made(
    bases: list[Path], tmp_path: Path
) -> None:
    head = Head.of(bases[FORMS.index("deepseek2")]).retyped("blk.0.attn_q_a.weight", 42)  # whose graph cannot be built
    head = head.put("deepseek2.attention.head_count_kv", Value(U32, 65535))
    found = judge(head.save(tmp_path / "m.gguf"))
    assert "does not hold" in found["flash"] and found["flash"] == found["check"]
    assert found["seconds"] < MOST_SECONDS and found["growth"] < MOST_GROWTH


@pytest.mark.weighs
def test_mutated_heads_are_loaded_or_refused(bases: list[Path], tmp_path: Path) -> None:
    assert not faults(run(bases, range(1_000), tmp_path))


@pytest.mark.full
@pytest.mark.weighs
def test_twenty_thousand_mutated_heads_are_loaded_or_refused(bases: list[Path], tmp_path: Path) -> None:
    assert not faults(run([*bases, *sorted(MODELS.glob("*.gguf"))], range(1_000, 21_000), tmp_path))
