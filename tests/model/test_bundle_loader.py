"""A file with neuron bundles: what the engine's loader presents of it, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaModel
from llama_cpp._logger import set_verbose
from numpy_models import TinyModel, activation, array_of, write_gguf
from repository import with_support

MODEL = TinyModel("llama", activation("reglu", gated=True), keys={"feed_forward_activation": "reglu"})
ROW = 4 * MODEL.n_embd  # bytes, F32
PARTS = ("gate", "up", "down")
PART_NAMES = tuple(f"ffn_{part}.weight" for part in PARTS)
UINT32, UINT64, INT32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.UINT64, gguf.GGUFValueType.INT32
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0

Keys = dict[str, Any]
Tensors = dict[str, npt.NDArray[Any]]


def flash_keys() -> Keys:
    return MODEL.all_keys() | {
        "general.alignment": 4096,
        "flash.version": 1,
        "flash.bundle.parts": list(PARTS),
        "flash.bundle.types": array_of(UINT32, [int(F32)] * 3),
        "flash.bundle.row_lengths": array_of(UINT32, [MODEL.n_embd] * 3),
        "flash.bundle.offsets": array_of(UINT64, [0, ROW, 2 * ROW]),
        "flash.bundle.record_bytes": np.uint64(3 * ROW),
        "flash.bundle.layout": "bundled",
    }


def flash_tensors() -> Tensors:
    tensors: Tensors = dict(MODEL.weights())
    for il in range(MODEL.n_layer):
        gate, up, down = (tensors.pop(f"blk.{il}.ffn_{part}.weight") for part in PARTS)
        records = np.concatenate([gate, up, down.T], axis=1)
        tensors[f"blk.{il}.ffn_bundle.weight"] = np.ascontiguousarray(records).view(np.uint8)
    return tensors


def write(path: Path, keys: Keys, tensors: Tensors) -> Path:
    return write_gguf(path, MODEL.arch, keys, tensors)


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    return write(tmp_path / "bundled.gguf", flash_keys(), flash_tensors())


@pytest.mark.parametrize("mode", ["NONE", "MMAP", "DIRECT_IO"])
def test_without_a_hook_the_engine_refuses_the_file(
    mode: str, bundled: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_verbose(True)
    params = llama_cpp.llama_model_default_params()
    params.load_mode = getattr(llama_cpp, f"LLAMA_LOAD_MODE_{mode}")
    with pytest.raises(ValueError):
        LlamaModel(path_model=str(bundled), params=params, verbose=True)
    assert (
        "the file holds neuron bundles: load it with flash_offload=True, or convert it back with "
        "`python -m gguf_tools unbundle`" in capfd.readouterr().err
    )


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which may die."""
    return subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        env=with_support(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_it_cannot_be_quantised_either(bundled: Path, tmp_path: Path) -> None:
    result = run("quantise", bundled, tmp_path / "quantised.gguf")
    assert result.returncode == 1, result.stderr
    assert "the file holds neuron bundles" in result.stderr


def bound(path: Path) -> list[dict[str, Any]]:
    """What a hook that takes everything was offered."""
    result = run("bind", path, 1, 0)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_hook_is_offered_each_part_with_the_offset_of_its_bundle(bundled: Path) -> None:
    content = bundled.read_bytes()
    offsets = {name: content.index(data.tobytes()) for name, data in flash_tensors().items() if "bundle" in name}
    parts = {part["name"]: part for part in bound(bundled)}
    assert len(parts) == 3 * MODEL.n_layer
    for il in range(MODEL.n_layer):
        for part in PARTS:
            found = parts[f"blk.{il}.ffn_{part}.weight"]
            wide, high = (MODEL.n_ff, MODEL.n_embd) if part == "down" else (MODEL.n_embd, MODEL.n_ff)
            assert found["ne"] == [wide, high, 1, 1]
            assert found["type"] == int(F32)
            assert found["offset"] == offsets[f"blk.{il}.ffn_bundle.weight"]


def test_parts_keep_their_types_and_down_is_called_f32_where_its_type_does_not_fit(tmp_path: Path) -> None:
    """n_embd is a multiple of Q8_0's block, and n_ff is not."""
    row = MODEL.n_embd // 32 * 34
    keys = flash_keys() | {
        "llama.feed_forward_length": 80,
        "flash.bundle.types": array_of(UINT32, [int(Q8_0)] * 3),
        "flash.bundle.offsets": array_of(UINT64, [0, row, 2 * row]),
        "flash.bundle.record_bytes": np.uint64(3 * row),
    }
    tensors = flash_tensors()
    for il in range(MODEL.n_layer):
        tensors[f"blk.{il}.ffn_bundle.weight"] = np.zeros((80, 3 * row), np.uint8)
    for part in bound(write(tmp_path / "q8.gguf", keys, tensors)):
        assert part["type"] == int(F32 if part["name"].endswith("ffn_down.weight") else Q8_0), part


@pytest.mark.parametrize("mmap", [False, True])
def test_a_part_that_the_hook_does_not_take_is_refused(bundled: Path, mmap: bool) -> None:
    result = run("bind", bundled, 0, int(mmap))
    assert result.returncode == 1, result.stderr
    assert "the file holds neuron bundles" in result.stderr


def test_predictors_are_left_to_whoever_uses_them(tmp_path: Path) -> None:
    tensors = flash_tensors()
    for il in range(MODEL.n_layer):
        tensors[f"blk.{il}.ffn_predictor_in.weight"] = np.zeros((8, MODEL.n_embd), np.float32)
        tensors[f"blk.{il}.ffn_predictor_out.weight"] = np.zeros((MODEL.n_ff, 8), np.float32)
        tensors[f"blk.{il}.ffn_predictor.bias"] = np.zeros(MODEL.n_ff, np.float32)
    offered = bound(write(tmp_path / "predictors.gguf", flash_keys(), tensors))
    assert {part["name"].split(".")[2] for part in offered} == {"ffn_gate", "ffn_up", "ffn_down"}


def test_layers_without_a_bundle_have_their_ordinary_weights(tmp_path: Path) -> None:
    tensors = flash_tensors()
    del tensors["blk.0.ffn_bundle.weight"]
    tensors |= {name: data for name, data in MODEL.weights().items() if name.startswith("blk.0.ffn_")}
    offered = bound(write(tmp_path / "mixed.gguf", flash_keys(), tensors))
    assert len({part["offset"] for part in offered if part["name"].startswith("blk.0.ffn_")}) == 3
    assert len({part["offset"] for part in offered if part["name"].startswith("blk.1.ffn_")}) == 1


# what is done to keys and tensors -> what the engine says
def put(key: str, value: Any) -> Callable[[Keys, Tensors], None]:
    return lambda keys, tensors: keys.update({key: value})


def drop(key: str) -> Callable[[Keys, Tensors], None]:
    return lambda keys, tensors: keys.pop(key) and None


def tensor(name: str, data: npt.NDArray[Any] | None) -> Callable[[Keys, Tensors], None]:
    def change(keys: Keys, tensors: Tensors) -> None:
        tensors.pop(name, None)
        if data is not None:
            tensors[name] = data

    return change


BUNDLE = "blk.1.ffn_bundle.weight"
MALFORMED: list[tuple[Callable[[Keys, Tensors], None], str]] = [
    (drop("flash.version"), "'blk.0.ffn_bundle.weight' has the type flash, but the key flash.version is missing"),
    (put("flash.version", 2), "flash.version is 2"),
    (put("flash.version", "1"), "flash.version has wrong type"),
    (drop("flash.bundle.parts"), "flash.bundle.parts"),
    (put("flash.bundle.parts", "gate"), "flash.bundle.parts"),
    (put("flash.bundle.parts", ["up", "gate", "down"]), "flash.bundle.parts is neither"),
    (put("flash.bundle.parts", ["up"]), "flash.bundle.parts is neither"),
    (put("flash.bundle.parts", array_of(UINT32, [1, 2, 3])), "flash.bundle.parts has wrong array element type"),
    (put("flash.bundle.parts", ["up", "down"]), "must have 2 entries"),
    (drop("flash.bundle.types"), "flash.bundle.types"),
    (put("flash.bundle.types", 0), "flash.bundle.types"),
    (put("flash.bundle.types", array_of(UINT32, [0, 0])), "must have 3 entries"),
    (put("flash.bundle.types", array_of(UINT32, [0, 0, 17996])), "flash.bundle.types: 17996 is not a type of weights"),
    (put("flash.bundle.types", array_of(UINT32, [0, 0, 31])), "flash.bundle.types: 31 is not a type of weights"),
    (put("flash.bundle.types", array_of(INT32, [0, 0, -1])), "flash.bundle.types: 4294967295 is not a type of weights"),
    (put("flash.bundle.types", array_of(UINT32, [0, 1, 0])), "gate and up have different types"),
    (
        put("flash.bundle.types", array_of(UINT32, [12, 12, 12])),
        "flash.bundle.row_lengths: 64 of part gate, of type q4_K",
    ),
    (put("flash.bundle.types", ["f32", "f32", "f32"]), "flash.bundle.types has wrong array element type str"),
    (put("flash.bundle.row_lengths", array_of(UINT32, [64, 64, 96])), "flash.bundle.row_lengths: 96 of part down"),
    (put("flash.bundle.row_lengths", array_of(UINT32, [64])), "must have 3 entries"),
    (
        put("flash.bundle.row_lengths", array_of(UINT64, [64] * 3)),
        "flash.bundle.row_lengths has wrong array element type",
    ),
    (put("flash.bundle.offsets", array_of(UINT64, [0, ROW, ROW])), "flash.bundle.offsets: part down begins at 256"),
    (
        put("flash.bundle.offsets", array_of(UINT32, [0, ROW, 2 * ROW])),
        "flash.bundle.offsets has wrong array element type",
    ),
    (put("flash.bundle.record_bytes", np.uint64(3 * ROW + 1)), "flash.bundle.record_bytes is 769"),
    (put("flash.bundle.record_bytes", 3 * ROW), "flash.bundle.record_bytes has wrong type"),
    (drop("flash.bundle.record_bytes"), "flash.bundle.record_bytes"),
    (put("flash.bundle.layout", "sliced"), "flash.bundle.layout is 'sliced'"),
    (drop("flash.bundle.layout"), "flash.bundle.layout"),
    (drop("llama.feed_forward_activation"), "llama.feed_forward_activation"),
    (put("llama.feed_forward_activation", "relu"), "'relu' is for layers without a gate"),
    (put("llama.feed_forward_length", 97), f"tensor '{BUNDLE.replace('1', '0')}' of type flash has the shape"),
    (put("llama.feed_forward_length", array_of(UINT32, [96, 95])), f"tensor '{BUNDLE}' of type flash has the shape"),
    (put("llama.feed_forward_length", array_of(UINT32, [96])), "llama.feed_forward_length has wrong array length"),
    (put("llama.embedding_length", 0), "does not fit an embedding length of 0"),
    (put("llama.embedding_length", 2**32 - 32), "does not fit an embedding length of 4294967264"),
    (put("llama.block_count", 1), f"tensor '{BUNDLE}' has the type flash, but is not the neuron bundle of a layer"),
    (put("llama.block_count", 2**32 - 1), "llama.block_count is 4294967295"),
    (tensor(BUNDLE, np.zeros((96, 767), np.uint8)), f"tensor '{BUNDLE}' of type flash has the shape"),
    (tensor(BUNDLE, np.zeros((48, 2, 768), np.uint8)), f"tensor '{BUNDLE}' of type flash has the shape"),
    (tensor(BUNDLE, np.zeros((96, 768), np.float32)), f"tensor '{BUNDLE}' of type f32 has the shape"),
    (tensor(BUNDLE, None), "tensor 'blk.1.ffn_gate.weight' not found"),
    (
        tensor("blk.1.ffn_up.weight", np.zeros((96, 64), np.float32)),
        f"'blk.1.ffn_up.weight' is in the file and also in '{BUNDLE}'",
    ),
    (tensor("token_embd.weight", np.zeros((260, 64), np.uint8)), "'token_embd.weight' has the type flash"),
    (
        tensor("blk.01.ffn_bundle.weight", np.zeros((96, 768), np.uint8)),
        "'blk.01.ffn_bundle.weight' has the type flash",
    ),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(number, id=message, marks=() if number % 4 == 0 else pytest.mark.full)
        for number, (_, message) in enumerate(MALFORMED)
    ],
)
def test_a_file_that_contradicts_itself_is_refused_and_nothing_crashes(case: int, tmp_path: Path) -> None:
    change, message = MALFORMED[case]
    keys, tensors = flash_keys(), flash_tensors()
    change(keys, tensors)
    result = run("bind", write(tmp_path / "malformed.gguf", keys, tensors), 1, 0)
    assert result.returncode == 1, (signal.Signals(-result.returncode) if result.returncode < 0 else 0, result.stderr)
    assert message in result.stderr


def test_a_file_cut_within_a_bundle_is_refused(bundled: Path) -> None:
    content = bundled.read_bytes()
    bundled.write_bytes(content[: len(content) - 3 * ROW * MODEL.n_ff // 2])
    result = run("bind", bundled, 1, 0)
    assert result.returncode == 1
    assert f"tensor '{BUNDLE}' data is not within the file bounds" in result.stderr


def _bind(path: str, taken: bool, mmap: bool) -> int:
    """Loads the model with a hook that takes the feed-forward weights, or none; prints what it was offered."""
    import ctypes

    import llama_cpp
    from llama_cpp import llama_cpp as engine

    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib/libggml-base.so"))
    cpu = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib/libggml-cpu.so"))
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    cpu.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p

    class Override(ctypes.Structure):
        _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))

    class Tensor(ctypes.Structure):
        _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))

    offered: list[dict[str, Any]] = []

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    def hook(address: int, file: int, offset: int) -> bool:
        name = ggml.ggml_get_name(address).decode()
        if not name.endswith(PART_NAMES):
            return False
        tensor = Tensor.from_address(address)
        offered.append({"name": name, "type": tensor.type, "ne": list(tensor.ne), "offset": offset})
        return taken

    engine.llama_backend_init()
    # C++: llama_set_tensor_bind(llama_tensor_bind_t)
    engine._lib._Z21llama_set_tensor_bindPFbP11ggml_tensorimE(hook)
    overrides = (Override * 2)(Override(rb"ffn_(gate|up|down)\.weight", cpu.ggml_backend_cpu_buffer_type()))
    params = engine.llama_model_default_params()
    params.tensor_buft_overrides = ctypes.addressof(overrides)
    params.load_mode = engine.LLAMA_LOAD_MODE_MMAP if mmap else engine.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = False
    model = engine.llama_model_load_from_file(path.encode(), params)
    print(json.dumps(offered))
    return 0 if model else 1


def _quantise(path: str, output: str) -> int:
    from llama_cpp import llama_cpp as engine

    params = engine.llama_model_quantize_default_params()
    return 1 if engine.llama_model_quantize(path.encode(), output.encode(), params) != 0 else 0


if __name__ == "__main__":
    if sys.argv[1] == "bind":
        sys.exit(_bind(sys.argv[2], sys.argv[3] == "1", sys.argv[4] == "1"))
    sys.exit(_quantise(*sys.argv[2:]))
