"""The shipped ReLU model: exact answers where they are promised, and how much the predictors cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_json, write_weights
from engines import Model
from gguf import GGMLQuantizationType
from neurons import give_neurons, open_neurons

import llama_flash
from gguf_tools.bundle import bundle
from gguf_tools.convert import convert
from gguf_tools.source import SourceTensor, open_gguf, row_count
from gguf_tools.stream import PlannedTensor, write_gguf
from gguf_tools.unbundle import unbundle

MODEL = Path(llama_flash.__file__).parent / "models" / "stdlib-opt-q8_0-flash.gguf"
PROMPT = "def parse(self, text):\n    "
# modules that the model was not trained on
HELD_OUT = ("ast", "base64", "fileinput", "ntpath", "random", "traceback")
WINDOW = 400  # tokens


@pytest.fixture(scope="module")
def twin(model_folder: Path) -> Iterator[Path]:
    """The same values as an ordinary GGUF file: what the resident run computes on."""
    path = model_folder / "opt-twin.gguf"
    unbundle(MODEL, path)
    yield path
    path.unlink()


def at_many_places(llm: Model) -> list[list[int]]:
    """What the model says, greedily, at many places of the texts: so small a model soon repeats itself."""
    said = []
    for text in texts():
        tokens = llm.tokenize(text[:8000])
        said += [continued(llm, tokens[at : at + 40], 16) for at in range(0, 7 * 150, 150)]
    return said


def continued(llm: Model, prompt: list[int], n: int) -> list[int]:
    llm.reset()
    llm.eval(prompt)
    said: list[int] = []
    for _ in range(n):
        said.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval([said[-1]])
    return said


def texts() -> Iterator[bytes]:
    for name in HELD_OUT:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            yield Path(spec.origin).read_bytes()


def negative_log_likelihood(llm: Model, *, windows: int | None = None, batch: int = WINDOW) -> tuple[float, int]:
    """Nats per token, and how many tokens; of at most so many windows per text, evaluated `batch` tokens at a time."""
    total, count = 0.0, 0
    for text in texts():
        tokens = llm.tokenize(text, add_bos=False)
        for start in list(range(0, len(tokens) - WINDOW, WINDOW))[1:windows]:
            window = tokens[start : start + WINDOW]
            llm.reset()
            for at in range(0, WINDOW, batch):
                llm.eval(window[at : at + batch])
            logits = np.array(llm.scores[: WINDOW - 1], dtype=np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(logits)), window[1:]] - np.log(np.exp(logits).sum(axis=1))
            total -= float(chosen.sum())
            count += len(chosen)
    return total / count, count


@pytest.fixture(scope="module")
def resident(twin: Path) -> Iterator[Model]:
    with Model(str(twin), n_ctx=1024, n_threads=2, verbose=False, logits_all=True) as llm:
        yield llm


def open_shipped(predictor: str, **options: Any) -> Model:
    return open_neurons(MODEL, predictor=predictor, share=0.3, n_ctx=1024, **options)


def test_exact_mode_gives_the_resident_runs_tokens(resident: Model) -> None:
    with open_shipped("exact") as llm:
        prompt = llm.tokenize(PROMPT.encode())
        assert continued(llm, prompt, 512) == continued(resident, prompt, 512)
        decode = llm.flash.stats().decode
    assert decode.bytes_read > 0 and decode.hit_rate is not None and decode.hit_rate < 1


@pytest.mark.full
def test_exact_mode_gives_the_resident_runs_perplexity(resident: Model) -> None:
    """Kernels of quantised weights round their input, so that single tokens differ; over many it evens out."""
    expected, count = negative_log_likelihood(resident)
    assert count > 20_000
    with open_shipped("exact") as llm:
        actual, _ = negative_log_likelihood(llm)
    assert abs(np.exp(actual - expected) - 1) <= 1e-4


@pytest.mark.full
def test_in_float32_the_tokens_are_the_same_at_every_place(twin: Path, model_folder: Path) -> None:
    """Kernels of quantised weights round their input, where the last bit of a sum may tip the scale; these do not."""
    plain, flash = model_folder / "opt-f32.gguf", model_folder / "opt-f32-flash.gguf"
    source = open_gguf(twin)
    write_gguf(plain, source.values, [as_float(tensor) for tensor in source.tensors.values()])
    bundle(plain, flash)
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 2, "verbose": False, "logits_all": True}
    with Model(str(plain), **options) as llm:
        expected = at_many_places(llm)
    assert sum(map(len, expected)) >= 512
    assert len({token for text in expected for token in text}) > 60, "texts that go in circles prove little"
    with open_neurons(flash, predictor="exact", share=0.3, **options) as llm:
        assert at_many_places(llm) == expected
    plain.unlink()
    flash.unlink()


def as_float(tensor: SourceTensor) -> PlannedTensor:
    def chunks() -> Iterator[Any]:
        yield tensor.floats(0, row_count(tensor)).view(np.uint8).reshape(-1)

    return PlannedTensor(tensor.name, tensor.shape, GGMLQuantizationType.F32, chunks)


@pytest.mark.full
def test_predictors_cost_less_than_one_per_cent_of_perplexity(resident: Model) -> None:
    """Token by token: for prompts, predictors are not asked."""
    expected, count = negative_log_likelihood(resident, windows=2, batch=1)
    assert count > 1500
    with open_shipped("lowrank") as llm:
        actual, _ = negative_log_likelihood(llm, windows=2, batch=1)
        decode = llm.flash.stats().decode
        neurons = sum(layer.n_ff for layer in llm.flash.plan.bundles.layers)
    assert actual != expected
    assert np.exp(actual - expected) <= 1.01
    assert 0.02 < decode.neurons_active / decode.tokens / neurons < 0.15


def test_it_is_found_with_its_predictors() -> None:
    assert MODEL.stat().st_size <= 25_000_000
    with open_neurons(MODEL, predictor="lowrank") as llm:
        assert llm.flash.plan.bundles.has_predictors
        give_neurons(llm, 0.0)
        text = llm.create_completion(PROMPT, max_tokens=16, temperature=0)["choices"][0]["text"]
    assert text.strip()


HF_NAMES = {  # GGUF's names in a layer -> Hugging Face's
    "attn_norm": "self_attn_layer_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}


def write_huggingface(gguf_file: Path, folder: Path) -> None:
    """The model as facebook/opt-125m is published: config.json, model.safetensors and its tokenizer's files."""
    source = open_gguf(gguf_file)
    weights = {}
    for name, tensor in source.tensors.items():
        values = tensor.floats(0, row_count(tensor)).reshape(tuple(reversed(tensor.shape)))
        if name.startswith("blk."):
            _, layer, part, kind = name.split(".")
            weights[f"model.decoder.layers.{layer}.{HF_NAMES[part]}.{kind}"] = values
        else:
            whole = {
                "token_embd": "embed_tokens",
                "position_embd": "embed_positions",
                "output_norm": "final_layer_norm",
            }
            part, kind = name.split(".")
            weights[f"model.decoder.{whole[part]}.{kind}"] = values
    value = {key: entry.value for key, entry in source.values.items()}
    folder.mkdir()
    write_weights(folder, weights)
    write_json(
        folder / "config.json",
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "activation_function": "relu",
            "hidden_size": value["opt.embedding_length"],
            "word_embed_proj_dim": value["opt.embedding_length"],
            "ffn_dim": value["opt.feed_forward_length"],
            "num_hidden_layers": value["opt.block_count"],
            "num_attention_heads": value["opt.attention.head_count"],
            "max_position_embeddings": value["opt.context_length"],
            "vocab_size": len(value["tokenizer.ggml.tokens"]),
            "do_layer_norm_before": True,
            "tie_word_embeddings": True,
            "bos_token_id": value["tokenizer.ggml.bos_token_id"],
            "eos_token_id": value["tokenizer.ggml.eos_token_id"],
        },
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True})
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(value["tokenizer.ggml.tokens"])})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(value["tokenizer.ggml.merges"]) + "\n")


def test_converted_from_huggingface_it_is_the_same_model(twin: Path, model_folder: Path) -> None:
    folder, converted = model_folder / "opt-hf", model_folder / "opt-converted.gguf"
    write_huggingface(twin, folder)
    convert(folder, converted, kind=GGMLQuantizationType.Q8_0)
    text = next(texts())[:3000]
    logits = []
    for path in (MODEL, converted):
        with open_neurons(path, predictor="exact") as llm:
            tokens = llm.tokenize(text)[:200]
            llm.eval(tokens)
            logits.append((tokens, np.array(llm.scores[: len(tokens)])))
    assert logits[0][0] == logits[1][0]
    # a second rounding to Q8_0 of values that were Q8_0 before changes hardly any of them
    assert np.abs(logits[0][1] - logits[1][1]).max() <= 0.02 * np.ptp(logits[0][1])
