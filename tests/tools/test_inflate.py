"""`inflate`: a model of any size that answers, bit for bit, what the model it was made of answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import (
    LEAST,
    QUARTER,
    assert_read_from_flash,
    assert_same_logits,
    logits_of,
    open_flash,
    open_resident,
    tokens,
)
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

import llama_flash
from gguf_tools.errors import GgufToolsError
from gguf_tools.routing import trace_routing
from gguf_tools.source import FileTensor, KeyValue, data_bytes, open_gguf, row_count
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from gguf_tools.synthetic import ARCHITECTURES, inflate
from gguf_tools.synthetic.__main__ import main
from gguf_tools.verify import verify

SHIPPED = Path(llama_flash.__file__).parent / "models"
# stored in blocks with a scale of their own, in blocks without one, and number by number
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TYPES += ("IQ4_NL", "IQ4_XS", "IQ3_S", "MXFP4", "TQ1_0", "TQ2_0", "Q4_K_M")
SCALED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S")
FEWER = ("Q8_0", "Q4_K", "F16")
FEW = (*FEWER, "Q4_0", "Q4_1", "MXFP4")
PROMPT, DECODED = tokens(80, seed=1), tokens(12, seed=2)
SOURCE = Path(zlib.__file__ if zlib.__file__.endswith(".py") else subprocess.__file__).read_bytes()[:1500]
MB = 1_000_000


def grown(path: Path, folder: Path, factor: float = 3.0) -> Path:
    out = folder / f"larger-{path.name}"
    inflate(path, out, int(factor * sum(map(data_bytes, open_gguf(path).tensors.values()))), force=True)
    return out


@pytest.mark.parametrize("form", ARCHITECTURES)
def test_every_form_keeps_its_logits_bit_for_bit(form: str, model_file: ModelFile, tmp_path: Path) -> None:
    path = model_file(form)
    larger = grown(path, tmp_path)
    assert larger.stat().st_size > 2.5 * path.stat().st_size
    with open_resident(path) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    with open_resident(larger) as llm:
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, len(PROMPT) + len(DECODED))


@pytest.mark.parametrize("form", ["llama", pytest.param("qwen3moe", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", [pytest.param(t, marks=() if t in FEW else pytest.mark.full) for t in TYPES])
def test_every_type_keeps_its_logits_bit_for_bit(form: str, kind: str, model_file: ModelFile, tmp_path: Path) -> None:
    path = model_file(form, kind)
    with open_resident(path) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    with open_resident(grown(path, tmp_path)) as llm:
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, len(PROMPT) + len(DECODED))


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_neurons_that_are_no_multiple_of_a_kernels_step_change_the_last_bits_at_most(
    kind: str, model_file: ModelFile, tmp_path: Path
) -> None:
    """Kernels sum what is left over apart; more neurons make it part of the rest, and so the order is another."""
    source, n_ff = open_gguf(model_file("llama", kind)), 300
    planned = []
    for tensor in source.tensors.values():
        planned.append(copied(tensor))
        if match := re.search(r"ffn_(up|gate|down)", tensor.name):
            rows = tensor.raw(0, row_count(tensor))
            cut = rows[:, : rows.shape[1] // 512 * n_ff] if match[1] == "down" else rows[:n_ff]
            shape = (n_ff, 256) if match[1] == "down" else (256, n_ff)
            planned[-1] = PlannedTensor(tensor.name, shape, tensor.kind, partial(iter, [cut]))
    key, path = "llama.feed_forward_length", tmp_path / "odd.gguf"
    write_gguf(path, {**source.values, key: replace(source.values[key], value=n_ff)}, planned)
    with open_resident(path) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    with open_resident(grown(path, tmp_path)) as llm:
        actual = logits_of(llm, PROMPT, DECODED)
    assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["stdlib-moe-q8_0.gguf", "stdlib-arcee-q8_0.gguf"])
def test_a_trained_model_says_and_routes_the_same_from_flash(name: str, tmp_path: Path) -> None:
    path = SHIPPED / name
    larger = grown(path, tmp_path)
    with open_resident(path) as llm:
        text = llm.tokenize(SOURCE)
        prompt, decoded = text[:100], text[100:120]
        expected = logits_of(llm, prompt, decoded)
    for share in (LEAST, QUARTER):
        with open_flash(larger, share=share) as llm:
            assert_same_logits(logits_of(llm, prompt, decoded), expected, len(prompt) + len(decoded))
            assert_read_from_flash(llm, moe="moe" in name)
    if "moe" in name:
        assert np.array_equal(trace_routing(larger, prompt), trace_routing(path, prompt))


@pytest.mark.full
def test_a_chat_model_that_nobody_here_made_says_the_same(real_model: Path, tmp_path: Path) -> None:
    larger = grown(real_model, tmp_path, 2.0)
    said = []
    for path in (real_model, larger):
        with open_resident(path, logits_all=False) as llm:
            question: Any = [{"role": "user", "content": "Name three colours."}]
            done: Any = llm.create_chat_completion(question, max_tokens=16, temperature=0)
            said.append((done["choices"][0]["message"]["content"], llm._scores[-1].tobytes()))
    assert said[0] == said[1] and len(said[0][0]) > 10


@pytest.mark.parametrize(
    "kind", [pytest.param(t, marks=() if t in FEWER else pytest.mark.full) for t in TYPES if t != "Q4_K_M"]
)
def test_what_is_added_adds_nothing_and_is_like_nothing_else(kind: str, model_file: ModelFile, tmp_path: Path) -> None:
    path = model_file("qwen3moe", kind)
    before, after = open_gguf(path), open_gguf(grown(path, tmp_path))
    rows: set[bytes] = set()
    n_rows = 0
    for name, tensor in after.tensors.items():
        old = before.tensors[name]
        assert tensor.kind == old.kind
        if not name.endswith("_exps.weight"):
            assert tensor.shape == old.shape
            assert np.array_equal(tensor.raw(0, row_count(tensor)), old.raw(0, row_count(old)))
        elif "down" in name:
            values, own = tensor.floats(0, row_count(tensor)), old.raw(0, row_count(old))
            assert np.array_equal(tensor.raw(0, row_count(tensor))[:, : own.shape[1]], own)
            assert values.shape[1] > 2 * old.shape[0] and not values[:, old.shape[0] :].any()
            if kind in SCALED:
                added = tensor.raw(0, row_count(tensor))[:, own.shape[1] :]
                assert len(zlib.compress(added.tobytes())) > 0.5 * added.nbytes, "a device could take it for less"
        else:
            for expert in range(16):
                own_rows = old.raw(expert * 256, expert * 256 + 256)
                new_rows = tensor.raw(expert * tensor.shape[1], (expert + 1) * tensor.shape[1])
                assert np.array_equal(new_rows[:256], own_rows)
                assert np.isfinite(tensor.floats(expert * tensor.shape[1], (expert + 1) * tensor.shape[1])).all()
                rows |= {row.tobytes() for row in new_rows}
                n_rows += len(new_rows)
    if GGML_QUANT_SIZES[before.tensors["blk.0.ffn_up_exps.weight"].kind][0] < 256:  # a row is more than one block
        assert len(rows) > 0.99 * n_rows


def test_gate_and_up_in_one_tensor_grow_each_by_itself(model_file: ModelFile, tmp_path: Path) -> None:
    """As Phi-3 has them: ffn_up holds the rows of gate, then those of up."""
    source = open_gguf(model_file("llama", "F16"))
    gate, up = (source.tensors[f"blk.1.ffn_{part}.weight"] for part in ("gate", "up"))
    fused = PlannedTensor(up.name, (256, 1024), up.kind, lambda: iter([gate.raw(0, 512), up.raw(0, 512)]))
    rest = [copied(t) for t in source.tensors.values() if t.name not in (gate.name, up.name)]
    write_gguf(tmp_path / "fused.gguf", source.values, [*rest, fused])
    larger = open_gguf(grown(tmp_path / "fused.gguf", tmp_path)).tensors[up.name]
    half = larger.shape[1] // 2
    assert half > 1024 and half % 32 == 0
    assert np.array_equal(larger.raw(0, 512), gate.raw(0, 512))
    assert np.array_equal(larger.raw(half, half + 512), up.raw(0, 512))


def test_lengths_of_all_layers_and_experts_grow_alike(model_file: ModelFile, tmp_path: Path) -> None:
    source = open_gguf(model_file("deepseek2"))
    after = open_gguf(grown(model_file("deepseek2"), tmp_path)).values
    lengths = [key for key in source.values if key.endswith("feed_forward_length")]
    assert len(lengths) > 1
    assert len({after[key].value / source.values[key].value for key in lengths}) == 1
    # one length for each layer, as some models have it
    llama = open_gguf(model_file("llama"))
    key = "llama.feed_forward_length"
    by_layer = KeyValue([512] * 3, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    write_gguf(tmp_path / "array.gguf", {**llama.values, key: by_layer}, [copied(t) for t in llama.tensors.values()])
    larger = open_gguf(grown(tmp_path / "array.gguf", tmp_path))
    assert larger.values[key].value == [larger.tensors["blk.0.ffn_down.weight"].shape[0]] * 3


@pytest.mark.parametrize("form", ["llama", "deepseek2-fused", pytest.param("gpt-oss", marks=pytest.mark.full)])
def test_verify_says_that_it_is_the_same_function_and_by_how_much_it_is_wider(
    form: str, model_file: ModelFile, tmp_path: Path
) -> None:
    path = model_file(form, "F16")
    larger = grown(path, tmp_path)
    for one, other in ((path, larger), (larger, path)):
        result = verify(one, other)
        assert result.same, (result.values, [t for t in result.tensors if t.status != "identical"])
        assert any("by neurons that say nothing" in note for note in result.notes)
    damaged = open_gguf(larger)
    down = next(t for name, t in damaged.tensors.items() if "ffn_down" in name and name.endswith("weight"))
    assert isinstance(down, FileTensor)
    # the last neuron of the last row speaks; then one of the model's own is another
    for at in (down.offset + data_bytes(down) - 2, down.offset + 4):
        changed = tmp_path / "changed.gguf"
        shutil.copyfile(larger, changed)
        with changed.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        result = verify(path, changed)
        assert next(t.name for t in result.tensors if t.status == "differs").startswith("blk.0.ffn_")


def test_the_command_takes_sizes_and_factors(model_file: ModelFile, tmp_path: Path, capsys: Any) -> None:
    path, out = model_file("llama"), tmp_path / "out.gguf"
    assert main(["inflate", str(path), str(out), "--to", "12MB"]) == 0
    assert abs(out.stat().st_size - 12 * MB) < 0.1 * MB
    assert "neurons: " in capsys.readouterr().out
    assert main(["inflate", str(path), str(out), "--to", "4x", "--force"]) == 0
    assert out.stat().st_size == pytest.approx(4 * path.stat().st_size, rel=0.03)
    again = tmp_path / "again.gguf"
    assert main(["inflate", str(path), str(again), "--to", "4x"]) == 0
    assert again.read_bytes() == out.read_bytes(), "the same model and size give the same file"


def refused(model: Path, out: Path, to: str, capsys: Any, *options: str) -> str:
    before = sorted(out.parent.iterdir())
    assert main(["inflate", str(model), str(out), "--to", to, *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert sorted(out.parent.iterdir()) == before, "nothing is left behind"
    return str(lines[0])


def test_what_cannot_be_done_is_refused_in_one_line(model_file: ModelFile, tmp_path: Path, capsys: Any) -> None:
    path, out = model_file("llama"), tmp_path / "out.gguf"
    assert "not a size" in refused(path, out, "much", capsys) and not out.exists()
    assert "too few" in refused(path, out, "0.5x", capsys)
    assert "GB free" in refused(path, out, "1TB", capsys)
    assert "is a flash file" in refused(SHIPPED / "stdlib-opt-q8_0-flash.gguf", out, "2x", capsys)
    assert "/no/model.gguf" in refused(Path("/no/model.gguf"), out, "1GB", capsys)
    assert "is the input" in refused(path, path, "2x", capsys, "--force")
    out.write_bytes(b"mine")
    assert "--force replaces it" in refused(path, out, "2x", capsys)
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("blk.0.ffn_sub_norm.weight", (512,), "blk.0.ffn_sub_norm.weight: its place"),
        ("blk.0.ffn_up.3.weight", (256, 512), "its place"),
        ("enc.blk.0.ffn_up.weight", (256, 512), "its place"),
        ("blk.0.ffn_up.bias", (100,), "which does not go with the 512 neurons"),
    ],
)
def test_tensors_that_it_does_not_know_are_refused(
    name: str, shape: tuple[int, ...], said: str, model_file: ModelFile, tmp_path: Path
) -> None:
    """Norms over all neurons of a token, for one: more neurons would change what they give."""
    source = open_gguf(model_file("llama"))
    data = np.zeros(int(np.prod(shape)), np.float32).view(np.uint8)
    more = PlannedTensor(name, shape, GGMLQuantizationType.F32, lambda: iter([data]))
    path = tmp_path / "more.gguf"
    write_gguf(path, source.values, [*(copied(t) for t in source.tensors.values()), more])
    with pytest.raises(GgufToolsError, match=said):
        inflate(path, tmp_path / "out.gguf", 50 * MB)


def test_a_model_that_looks_at_all_neurons_at_once_is_refused(model_file: ModelFile, tmp_path: Path) -> None:
    source = open_gguf(model_file("llama"))
    values = {**source.values, "general.architecture": KeyValue("gemma3n", GGUFValueType.STRING)}
    write_gguf(tmp_path / "n.gguf", values, [copied(t) for t in source.tensors.values()])
    with pytest.raises(GgufToolsError, match="would answer otherwise"):
        inflate(tmp_path / "n.gguf", tmp_path / "out.gguf", 50 * MB)


@pytest.mark.weighs
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Written below a limit of the address space that is far smaller than the file."""
    script = (
        "import resource, sys; from gguf_tools.synthetic.__main__ import main; from gguf_tools import ggml; "
        "ggml.library(); used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (192 << 20),) * 2); sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "large.gguf"
    arguments = ["inflate", SHIPPED / "stdlib-moe-q8_0.gguf", out, "--to", "250MB"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size > 240 * MB
    out.unlink()
