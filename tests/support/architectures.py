"""Tiny random models of every architecture that the engine knows.

Names and shapes of the tensors are the engine's own: it lays a model out from the key-values alone
(`llama_model_init_from_user`), and tells each tensor that it would fill. Says nothing about what is measured on them.

    python tests/support/architectures.py ARCH OUT.gguf [--type q8_0]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType as V
from llama_cpp import llama_cpp

from gguf_tools.synthetic.tokenizer import add_tokenizer

N_VOCAB = 512
N_EMBD = 256
N_EXPERT = 8
N_CTX = 64
_LORA = 256  # ranks of MLA's projections


class _TensorHead(ctypes.Structure):
    """The beginning of struct ggml_tensor"""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # as ggml has it: the first varies fastest


def architectures() -> tuple[str, ...]:
    """Names of all architectures that the engine knows, in its order."""
    name_of = llama_cpp._lib["_Z13llm_arch_name8llm_arch"]  # llm_arch_name(llm_arch)
    name_of.restype = ctypes.c_char_p
    names = []
    while (name := name_of(len(names)).decode()) != "(unknown)":
        names.append(name)
    return tuple(names)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Architectures of experts (a file of theirs without any is refused, or is not what is published).
MIXTURES = _names("""
    llama4 grok qwen2moe qwen3moe qwen3next qwen3vlmoe qwen35moe qwen4exp phimoe cohere2moe dbrx olmoe arctic deepseek
    deepseek2 deepseek2-ocr deepseek32 deepseek4 glm4moe glm-dsa exaone-moe bailingmoe bailingmoe2 bailingmoe3 dots1
    dots3note afmoe ernie4_5-moe hunyuan-moe hy_v3 hy_v4 gpt-oss lfm2moe smallthinker llada-moe grovemoe minimax-01
    minimax-m2 minimax-m3 rnd1 mimo2 kimi-linear kimi-k3 glm5-next step35 mistral4 mellum laguna maple granitemoe
    nemotron_h_moe nomic-bert-moe jamba
""")
_MLA = _names("deepseek2 deepseek32 glm-dsa dots3note kimi-linear bailingmoe3 kimi-k3 glm5-next hy_v4 mistral4")
_KDA = _names("kimi-linear bailingmoe3 kimi-k3 glm5-next")  # linear attention, and MLA in between
# one value per layer: 0 heads in layer 1 makes it recurrent (or convolutional)
_HEADS_PER_LAYER = _names("plamo2 jamba nemotron_h nemotron_h_moe granitehybrid lfm2 lfm2moe")
_PATTERN_PER_LAYER = _names("cohere2moe mimo2 step35 spark2_5 muse-glimmer granite_swa dots3note maple")
_N_LAYER = {
    "llama4": 4,
    "gemma4": 5,
    "gemma3n": 22,
    "deepseek4": 4,
    "nemotron_h": 3,
    "nemotron_h_moe": 3,
    "hrm_text": 6,
}


def key_values(arch: str, *, mixture: bool, wide: bool = False) -> dict[str, Any]:
    """What the file says beside the vocabulary: keys that an architecture does not know are ignored by the engine.

    A key that begins with "." gets the architecture's name before it.
    """
    n_layer, n_embd, n_head, n_ff = _N_LAYER.get(arch, 2), N_EMBD, 4, 768
    if wide:
        n_embd, n_head, n_ff = 2 * n_embd, 2 * n_head, 2 * n_ff
    head = n_embd // n_head
    heads: Any = n_head
    if arch in _HEADS_PER_LAYER:
        heads = [0 if il == 1 else n_head for il in range(n_layer)]
    kv_heads: Any = heads
    if arch in _MLA:
        kv_heads = [0 if il == 1 else 1 for il in range(n_layer)] if arch in _KDA else 1
    values: dict[str, Any] = {
        "general.architecture": arch,
        ".vocab_size": N_VOCAB,
        ".context_length": N_CTX,
        ".embedding_length": n_embd,
        ".features_length": n_embd,
        ".block_count": n_layer,
        ".leading_dense_block_count": 1,
        ".feed_forward_length": n_ff,
        ".use_parallel_residual": False,
        ".logit_scale": 1.0,
        ".time_mix_extra_dim": 32,
        ".time_decay_extra_dim": 32,
        ".full_attention_interval": 2,
        ".attention.head_count": heads,
        ".attention.head_count_kv": kv_heads,
        ".attention.max_alibi_bias": 8.0,
        ".attention.clamp_kqv": 8.0,
        ".attention.layer_norm_epsilon": 1e-5,
        ".attention.layer_norm_rms_epsilon": 1e-5,
        ".attention.group_norm_epsilon": 1e-5,
        ".attention.group_norm_groups": 8,
        ".attention.q_lora_rank": _LORA,
        ".attention.kv_lora_rank": _LORA,
        ".attention.decay_lora_rank": 32,
        ".attention.iclr_lora_rank": 32,
        ".attention.value_residual_mix_lora_rank": 32,
        ".attention.gate_lora_rank": 32,
        ".attention.relative_buckets_count": 8,
        ".attention.sliding_window": 16,
        ".attention.sliding_window_pattern": 2,
        ".attention.indexer.head_count": 4,
        ".attention.indexer.key_length": 64,
        ".attention.indexer.top_k": 131072,
        ".attention.indexer.block_size": 4,
        ".attention.indexer.kpool": 4,
        ".attention.indexer.kpool_select_tail": True,
        ".attention.indexer.local_blocks": 1,
        ".rope.dimension_sections": [head // 8] * 4,
        ".posnet.embedding_length": n_embd,
        ".posnet.block_count": n_layer,
        ".convnext.embedding_length": n_embd,
        ".convnext.block_count": n_layer,
        "tokenizer.ggml.token_type_count": 2,
        "xielu.alpha_n": 1.0,
        "xielu.alpha_p": 1.0,
        "xielu.beta": 1.0,
        "xielu.eps": 1e-7,
        ".ssm.inner_size": 2 * n_embd,
        ".ssm.conv_kernel": 4,
        ".ssm.state_size": 128,
        ".ssm.time_step_rank": n_head,
        ".ssm.group_count": 2,
        ".kda.head_dim": 64,
        ".kda.safe_gate": True,
        ".kda.gate_lower_bound": -5.0,
        ".wkv.head_size": head,
        ".shortconv.l_cache": 3,
        ".residual_scale": 1.0,
        ".attn_res.block_size": 12,
        ".activation.situ_beta": 4.0,
        ".activation.situ_linear_beta": 25.0,
    }
    if arch in _PATTERN_PER_LAYER:
        values[".attention.sliding_window_pattern"] = [il % 2 for il in range(n_layer)]
    if mixture:
        values |= {
            ".expert_feed_forward_length": 256,
            ".expert_shared_feed_forward_length": 256,
            ".expert_latent_length": 256,
            ".interleave_moe_layer_step": 2,
            ".expert_count": N_EXPERT,
            ".expert_used_count": 2,
            ".expert_shared_count": 1,
            ".expert_gating_func": 2,
            ".expert_group_scale": 1.0,
            ".experts_per_group": 1,
        }
    if arch in _MLA:
        values |= {
            ".attention.key_length": _LORA + 32,
            ".attention.value_length": _LORA,
            ".rope.dimension_count": 32,
            ".attention.key_length_mla": 64 + 32,
            ".attention.value_length_mla": 64,
        }
    if arch in ("qwen4exp", "glm5-next"):
        values |= _hyper_connections(n_layer, n_embd)
    values |= _OWN.get(arch, {})
    return values


def _hyper_connections(n_layer: int, n_embd: int) -> dict[str, Any]:
    n_heads = 4  # of 2 n-gram sizes, 2 each
    return {
        ".hyper_connection.count": 4,
        ".hyper_connection.sinkhorn_iterations": 2,
        ".hyper_connection.epsilon": 1e-6,
        ".hyper_connection.low_rank": 8,
        ".attention.compress_ratios": [4] * n_layer,
        ".ple.layers": [0],
        ".ple.ngram_size": 3,
        ".ple.heads_per_ngram": 2,
        ".ple.conv_kernel": 4,
        ".ple.eos_token_id": 0,
        ".embedding_length_per_layer_input": n_embd // n_heads,
        ".ple.layer_multipliers": [np.uint64(x) for x in (1, 3, 5)],
        ".ple.head_offsets": [np.uint64(h * N_VOCAB) for h in range(n_heads)],
        ".ple.head_vocab_sizes": [np.uint64(N_VOCAB)] * n_heads,
    }


# what single architectures need; None takes a key out
_OWN: dict[str, dict[str, Any]] = {
    "nemotron_h": {".feed_forward_length": [0, 0, 768]},
    "nemotron_h_moe": {".feed_forward_length": [0, 0, 768]},
    "gemma4": {
        ".embedding_length_per_layer_input": 64,
        ".attention.shared_kv_layers": 0,
        ".attention.key_length_swa": 64,
        ".attention.value_length_swa": 64,
        ".rope.freq_base_swa": 10000.0,
        ".attention.sliding_window_pattern": [1, 1, 1, 1, 0],
    },
    "dots3note": {
        ".attention.kv_lora_rank_swa": _LORA,
        ".attention.key_length_swa": _LORA + 32,
        ".attention.value_length_swa": _LORA,
        ".attention.key_length_mla_swa": 64 + 32,
        ".attention.value_length_mla_swa": 64,
        ".rope.freq_base_swa": 10000.0,
        ".attention.indexer.types": [1, 0],
    },
    "hy_v4": {
        ".hyper_connection.count": 4,
        ".hyper_connection.epsilon": 1e-6,
        ".hyper_connection.magnitude": 2.0,
        ".swiglu_clamp_exp": 10.0,
        ".expert_weights_scale": 1.0,
        ".expert_weights_norm": True,
        ".attention.indexer.types": [1, 0],
    },
    "deepseek4": {
        ".attention.head_count_kv": 1,
        ".attention.key_length": 64,
        ".attention.value_length": 64,
        ".rope.dimension_count": 32,
        ".attention.output_group_count": 4,
        ".attention.output_lora_rank": 32,
        ".attention.compress_ratios": [0, 0, 4, 128],
        ".attention.compress_rope_freq_base": 160000.0,
        ".hyper_connection.count": 4,
        ".hyper_connection.sinkhorn_iterations": 2,
        ".hyper_connection.epsilon": 1e-6,
        ".hash_layer_count": 0,
        ".swiglu_clamp_exp": 10.0,
        ".expert_weights_scale": 1.0,
        ".expert_weights_norm": True,
        ".expert_gating_func": 4,
    },
    "glm5-next": {".attention.key_length": _LORA, ".rope.dimension_count": 0},
    "rwkv6qwen2": {".token_shift_count": 1},
    "arwkv7": {".token_shift_count": 1},
    "mamba": {".ssm.state_size": 16},
    "jamba": {".ssm.state_size": 16},
    "graniteswitch": {
        ".adapters.count": 2,
        ".adapters.lora_rank": 8,
        ".adapters.token_ids_activate": [300, 301],
        ".adapters.token_ids_substitute": [302, 303],
    },
    "chameleon": {".vocab_size": 8704},  # images are tokens 4 to 8195
    "qwen3tts": {".vocab_size": 3072},  # at least as many as the codec's
    "minimax-m3": {".rope.dimension_count": 64},
    "hrm_text": {".hrm.layers_per_stack": 1, ".hrm.h_cycles": 2, ".hrm.l_cycles": 2},
    "maple": {".swiglu_clamp_exp": 7.0},
    "plamo2": {".ssm.group_count": 0},
    "bailingmoe3": {
        ".swiglu_clamp_exp": [0.0, 4.0],
        ".swiglu_clamp_shexp": [0.0, 5.0],
        ".rope.dimension_sections": [4, 6, 6, 0],
        ".kda.safe_gate": None,
    },
}


def add_values(writer: gguf.GGUFWriter, arch: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is None or name == "general.architecture":  # which the writer adds
            continue
        key = arch + name if name.startswith(".") else name
        if isinstance(value, list):
            writer.add_key_value(key, value, V.ARRAY, sub_type=_type_of(value[0]))
        else:
            writer.add_key_value(key, value, _type_of(value))


def _type_of(value: Any) -> V:
    for kind, name in ((bool, V.BOOL), (np.uint64, V.UINT64), (int, V.UINT32), (float, V.FLOAT32), (str, V.STRING)):
        if isinstance(value, kind):
            return name
    raise TypeError(f"no GGUF type for {value!r}")


# Tensors that must be declared to be of another type than F32 where a graph is built for it.
def _half_precision(n_layer: int) -> Iterator[str]:
    yield "conv1d.weight"
    for il in range(n_layer):
        yield f"posnet.{il}.conv1.weight"
        yield f"posnet.{il}.conv2.weight"
        yield f"convnext.{il}.dw.weight"


# large weights that the engine's quantiser leaves as they are: published files hold halves
_HALVED = re.compile(r"per_layer_model_proj|altup_(unembd_)?proj")


def laid_out(path: Path, *, mtp: bool = False) -> list[Tensor]:
    """The tensors that the engine wants for the key-values in a GGUF file; mtp: with those of its head.

    Raises ValueError, with what the engine says, where it does not make a model of them.
    """
    base = ctypes.CDLL(str(Path(llama_cpp._lib._name).with_name("libggml-base.so")))
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    base.gguf_free.argtypes = [ctypes.c_void_p]
    base.ggml_get_name.restype = ctypes.c_char_p
    base.ggml_get_name.argtypes = [ctypes.c_void_p]
    found: dict[str, Tensor] = {}  # those that several layers share are told once for each

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    def note(tensor: int, _: int) -> None:
        ne = list(_TensorHead.from_address(tensor).ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        name = base.ggml_get_name(tensor).decode()
        found[name] = Tensor(name, tuple(ne))

    make = llama_cpp._lib["llama_model_init_from_user"]
    make.restype = ctypes.c_void_p
    make.argtypes = [ctypes.c_void_p, type(note), ctypes.c_void_p, llama_cpp.llama_model_params]
    metadata = base.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not metadata:
        raise ValueError(f"{path} is not a GGUF file")
    try:
        params = llama_cpp.llama_model_default_params()
        params.load_mtp = mtp
        with engine_messages() as said:
            model = make(metadata, note, None, params)
        if not model:
            raise ValueError("; ".join(said) or "the engine makes no model of these key-values")
        llama_cpp.llama_model_free(model)
    finally:
        base.gguf_free(metadata)
    return list(found.values())


class _InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@contextlib.contextmanager
def engine_messages() -> Iterator[list[str]]:
    """The engine's error messages meanwhile, in place of all that it would print."""
    said: list[str] = []

    @llama_cpp.llama_log_callback
    def note(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            said.append(text.decode(errors="replace").strip())

    callback, data = ctypes.c_void_p(), ctypes.c_void_p()
    llama_cpp._lib["llama_log_get"](ctypes.byref(callback), ctypes.byref(data))
    llama_cpp.llama_log_set(note, ctypes.c_void_p())
    try:
        yield said
    finally:
        set_log = llama_cpp._lib["llama_log_set"]
        set_log(ctypes.cast(callback, llama_cpp.llama_log_callback), data)


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


# values of what is not a matrix of an ordinary product: pattern, mean, spread
_VALUES: tuple[tuple[str, float, float], ...] = (
    (r"ssm_a$", -1.0, 0.2),
    (r"norm.*\.weight$|_norm$", 1.0, 0.1),
    (r"rope_f.*\.weight$", 1.2, 0.05),
    (r"scale$", 1.0, 0.1),
    (r"time_mix_(w0|decay).*", -1.0, 0.3),
    (r"time_mix_lerp.*", 0.5, 0.1),
    (r"\.bias$", 0.0, 0.05),
)


def values_of(tensor: Tensor, seed: int) -> npt.NDArray[np.float32]:
    """Random weights, of a size that keeps activations near one."""
    shape = tuple(reversed(tensor.shape))
    noise = _rng(tensor.name, seed).standard_normal(shape, np.float32)
    for pattern, mean, spread in _VALUES:
        if re.search(pattern, tensor.name):
            noise *= np.float32(spread)
            noise += np.float32(mean)
            return noise
    if len(shape) == 1:
        return noise * np.float32(0.1)
    if not re.search(r"token_embd|position_embd|token_types", tensor.name):
        noise *= np.float32(tensor.shape[0] ** -0.5)
    return noise


# tensors that the loader takes but published files of an architecture do not have: heads that classify, scales of NVFP4
_ABSENT = r"^(cls|dense_[23])\.|(?<!ffn_gate_inp)\.(input_)?scale$"
# norms of several streams, which published files hold in one row
_OWN_FLAT = {"qwen4exp": r"hc_\w*norm|ple_norm"}
_DENSE_FIRST = r"^blk\.0\.(ffn_gate_inp|ffn_\w+_exps|exp_probs)|^blk\.1\.ffn_(gate|up|down)\.weight$"
_OWN_ABSENT = {
    "rwkv6qwen2": r"time_mix_first\.",
    # the loader takes dense and expert weights for every layer
    **dict.fromkeys(("mimo2", "step35", "hy_v3"), _DENSE_FIRST),
}

VARIANTS = {
    "": "as most files are",
    "dense": "without experts",
    "mixture": "with experts",
    "tied": "without an output matrix: the token embedding is used for it, too",
    "wide": "all widths doubled, so that matrices of the smallest types are worth a read",
    "fused": "query, key and value in one matrix, gate and up of the experts in one",
}


Weights = dict[str, npt.NDArray[np.float32]]


def write_plain(
    arch: str,
    path: Path,
    variant: str = "",
    seed: int = 0,
    more: Mapping[str, Any] | None = None,
    edit: Callable[[Weights], None] = lambda weights: None,
) -> Path:
    """Writes a model of F32 (few of F16) weights.

    more: key-values beside and in place of the others. edit: changes the weights before they are written.
    """
    mixture = {"dense": False, "mixture": True}.get(variant, arch in MIXTURES)
    values = key_values(arch, mixture=mixture, wide=variant == "wide") | dict(more or {})
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    half, mtp = set(_half_precision(values[".block_count"])), ".nextn_predict_layers" in values

    def begin(path: Path) -> gguf.GGUFWriter:
        writer = gguf.GGUFWriter(path, arch)
        add_values(writer, arch, values)
        add_tokenizer(writer, values[".vocab_size"])
        return writer

    keys = begin(path)
    for name in half:
        keys.add_tensor(name, np.zeros(1, np.float16))
    _finish(keys)
    absent = "|".join([_ABSENT, *filter(None, [_OWN_ABSENT.get(arch), r"^output\.weight$" * (variant == "tied")])])
    tensors = {tensor.name: tensor for tensor in laid_out(path, mtp=mtp) if not re.search(absent, tensor.name)}
    weights = {name: values_of(tensor, seed) for name, tensor in tensors.items()}
    (fuse if variant == "fused" else _split_experts)(weights)
    edit(weights)
    writer = begin(path)
    for name, data in weights.items():
        if re.search(_OWN_FLAT.get(arch, "^$"), name):
            data = data.reshape(-1)
        halved = name in half or _HALVED.search(name)
        writer.add_tensor(name, data.astype(np.float16) if halved else data)
    _finish(writer)
    return path


def _split_experts(weights: Weights) -> None:
    """The engine lays out one matrix for gate and up; published files rather have two."""
    for name in [name for name in weights if name.endswith("ffn_gate_up_exps.weight")]:
        gate, up = np.split(weights.pop(name), 2, axis=1)
        weights[name.replace("gate_up", "gate")] = np.ascontiguousarray(gate)
        weights[name.replace("gate_up", "up")] = np.ascontiguousarray(up)


def fuse(weights: Weights) -> None:
    for name in [name for name in weights if ".attn_q." in name]:
        parts = [name, name.replace("attn_q", "attn_k"), name.replace("attn_q", "attn_v")]
        if all(part in weights for part in parts):
            weights[name.replace("attn_q", "attn_qkv")] = np.concatenate([weights.pop(part) for part in parts])


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, ftype: str) -> Path:
    """Quantises with the engine's own quantiser; ftype: "q8_0" for LLAMA_FTYPE_MOSTLY_Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype.upper()}")
    params.nthread = 2
    if re.match("iq[123]", ftype) or ftype == "q2_k_s":
        params.imatrix, _kept = _importance(source)
    with engine_messages() as said:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failed:
        raise ValueError("; ".join(said) or f"the engine does not quantise {source}")
    return target


def _importance(source: Path) -> tuple[Any, list[Any]]:
    """An importance matrix for all that has rows, without which the engine refuses the smallest types."""
    entries: list[Any] = []
    kept: list[Any] = []
    for tensor in gguf.GGUFReader(source).tensors:
        ne = [int(n) for n in tensor.shape]
        if len(ne) > 1:
            noise = _rng(tensor.name, 1).uniform(0.5, 2, ne[0] * (ne[2] if len(ne) > 2 else 1)).astype(np.float32)
            kept.append(noise)
            pointer = noise.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries.append(llama_cpp.llama_model_imatrix_data(tensor.name.encode(), pointer, noise.size))
    return (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries), kept


def write(arch: str, path: Path, ftype: str = "q8_0", variant: str = "", seed: int = 0) -> Path:
    """Writes a model of an architecture, quantised by the engine.

    Args:
        ftype: as llama_ftype has it, in small letters; "plain": F32, not quantised.
        variant: one of VARIANTS.

    Raises:
        ValueError: the engine makes no such model.
    """
    if ftype == "plain" or arch in _NEVER_QUANTISED:
        return write_plain(arch, path, variant, seed)
    plain = path.with_name(path.name + ".plain")
    try:
        write_plain(arch, plain, variant, seed)
        return quantise(plain, path, ftype)
    finally:
        plain.unlink(missing_ok=True)


# convolutions and norms with one value in a row, which the quantiser would make halves of, and the engine then refuses
_NEVER_QUANTISED = frozenset({"wavtokenizer-dec"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a tiny random model of an architecture.")
    parser.add_argument("arch", choices=architectures(), metavar="ARCH")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--type", default="q8_0", help="as llama_ftype has it: f16, q4_0, q4_k_m ... (default: q8_0)")
    parser.add_argument(
        "--variant", default="", choices=VARIANTS, help="; ".join(f"{k}: {v}" for k, v in VARIANTS.items() if k)
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        print(write(arguments.arch, arguments.out, arguments.type, arguments.variant, arguments.seed))
    except ValueError as error:
        sys.exit(f"error: {arguments.arch}: {error}")


if __name__ == "__main__":
    main()
