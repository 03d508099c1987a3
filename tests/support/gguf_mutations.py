"""Heads of GGUF files, changed at random: what a file can say that is not so.

What lives here: a head as its parts (`Head`), and one change drawn from a seed (`mutated`). The data behind the head is
zeros in a sparse file, so that a case costs a head. Who loads the files: gguf_fuzz.py.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_flash.model.ggml_types import TYPE_SIZES, tensor_bytes

STRING, ARRAY = 8, 9
LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
BITS = {0: 8, 1: 7, 2: 16, 3: 15, 4: 32, 5: 31, 7: 1, 10: 64, 11: 63}
FLOATS = (6, 12)


@dataclass(frozen=True)
class Value:
    """A key's value: its type, and for arrays that of the items and the length that is claimed."""

    kind: int
    content: Any  # a number, bytes, or a list of these
    item: int = 0
    claimed: int | None = None  # None: as many as there are

    def encode(self) -> bytes:
        if self.kind != ARRAY:
            return struct.pack("<I", self.kind) + _scalar(self.kind, self.content)
        claimed = len(self.content) if self.claimed is None else self.claimed
        items = b"".join(_scalar(self.item, one) for one in self.content)
        return struct.pack("<IIQ", ARRAY, self.item, claimed) + items


def _scalar(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return struct.pack("<Q", len(content)) + bytes(content)
    if kind not in LAYOUTS:
        return bytes(4)
    if kind in FLOATS:
        try:
            return struct.pack("<" + LAYOUTS[kind], content)
        except OverflowError:
            return struct.pack("<" + LAYOUTS[kind], math.inf)
    size = struct.calcsize(LAYOUTS[kind])
    return (int(content) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


@dataclass(frozen=True)
class Info:
    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int  # from the begin of the data

    def encode(self) -> bytes:
        shape = b"".join(struct.pack("<Q", n & (1 << 64) - 1) for n in self.shape)
        return (
            _scalar(STRING, self.name)
            + struct.pack("<I", len(self.shape))
            + shape
            + struct.pack("<IQ", self.kind, self.offset)
        )


@dataclass(frozen=True)
class Head:
    values: list[tuple[bytes, Value]]
    tensors: list[Info]
    data: int  # bytes behind the head
    version: int = 3
    counts: tuple[int, int] | None = None  # of tensors and values that are claimed; None: as many as there are
    patches: list[tuple[int, int]] = field(default_factory=list)  # place in the encoded head, byte: last of all
    cut: int = 0  # bytes that are missing at the end

    @classmethod
    def of(cls, path: Path) -> Head:
        raw = path.read_bytes()
        at = 4

        def take(layout: str) -> Any:
            nonlocal at
            value = struct.unpack_from("<" + layout, raw, at)[0]
            at += struct.calcsize("<" + layout)
            return value

        def text() -> bytes:
            nonlocal at
            n = take("Q")
            at += n
            return raw[at - n : at]

        def scalar(kind: int) -> Any:
            return text() if kind == STRING else take(LAYOUTS[kind])

        version, n_tensors, n_values = take("I"), take("Q"), take("Q")
        values, tensors = [], []
        for _ in range(n_values):
            key, kind = text(), take("I")
            if kind == ARRAY:
                item, n = take("I"), take("Q")
                values.append((key, Value(kind, [scalar(item) for _ in range(n)], item)))
            else:
                values.append((key, Value(kind, scalar(kind))))
        for _ in range(n_tensors):
            name, n_dims = text(), take("I")
            tensors.append(Info(name, tuple(take("Q") for _ in range(n_dims)), take("I"), take("Q")))
        data = max((one.offset + tensor_bytes(one.kind, one.shape) for one in tensors), default=0)
        return cls(values, tensors, data, version)

    def get(self, key: str) -> Value:
        return next(value for name, value in self.values if name == key.encode())

    def put(self, key: str, value: Value | None) -> Head:
        """With another value of a key, or the first; None: without it."""
        rest = [(name, old) for name, old in self.values if name != key.encode()]
        return replace(self, values=rest if value is None else [*rest, (key.encode(), value)])

    def retyped(self, name: str, kind: int) -> Head:
        """With a tensor of another type, and all of them laid out as it needs."""
        tensors = [replace(one, kind=kind) if one.name == name.encode() else one for one in self.tensors]
        return replace(self, tensors=tensors).laid_out()

    def without(self, name: str) -> Head:
        return replace(self, tensors=[one for one in self.tensors if one.name != name.encode()]).laid_out()

    def alignment(self) -> int:
        found = dict(self.values).get(b"general.alignment", Value(4, 32)).content
        return found if isinstance(found, int) and 0 < found < 1 << 20 else 32

    def laid_out(self) -> Head:
        """One tensor behind the other, as the engine wants them."""
        at, step, tensors = 0, self.alignment(), []
        for one in self.tensors:
            tensors.append(replace(one, offset=at & (1 << 64) - 1))
            try:
                size = tensor_bytes(one.kind, tuple(n & (1 << 64) - 1 for n in one.shape))
            except ValueError:
                size = 64
            at += -(-size // step) * step
        return replace(self, tensors=tensors, data=at if at < 1 << 31 else self.data)

    def encode(self) -> bytes:
        n_tensors, n_values = self.counts or (len(self.tensors), len(self.values))
        head = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, n_tensors, n_values))
        for key, value in self.values:
            head += _scalar(STRING, key) + value.encode()
        for info in self.tensors:
            head += info.encode()
        for place, byte in self.patches:
            head[place % len(head)] = byte
        return bytes(head)

    def save(self, path: Path) -> Path:
        head = self.encode()
        size = -(-len(head) // self.alignment()) * self.alignment() + self.data
        with path.open("wb") as file:
            file.write(head[: max(0, size - self.cut)])
            file.truncate(max(0, size - self.cut))
        return path


def with_value(source: Path, target: Path, key: str, value: Value) -> Path:
    """A copy, weights included, in which a key has another value."""
    head = Head.of(source).put(key, value)
    encoded = head.encode()
    target.write_bytes(encoded + bytes(-len(encoded) % head.alignment()) + source.read_bytes()[-head.data :])
    return target


_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    16,
    31,
    32,
    64,
    100,
    127,
    128,
    255,
    256,
    511,
    512,
    513,
    1000,
    65535,
    1 << 20,
    200_000_000,
)
_REALS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-45, 3e38, 1e-6, 0.5, 2.0)
_WORDS = (
    *(b"", b"\xff\xfe", b"x" * 5000, b"none", b"linear", b"yarn", b"longrope", b"nothing", b"adapter", b"mmproj"),
    *(b"llama", b"bert", b"gpt2", b"t5", b"rwkv", b"plamo2", b"no_vocab", b"default", b"qwen2", b"deepseek-v3"),
    *(b"relu", b"reglu", b"silu", b"split", b"{{", b"{% for x in y %}"),
)
_ARCHITECTURES = (
    *(
        b"llama",
        b"qwen2",
        b"qwen3moe",
        b"gpt-oss",
        b"deepseek2",
        b"gemma3n",
        b"bert",
        b"t5",
        b"mamba",
        b"rwkv7",
        b"clip",
    ),
    *(
        b"phi3",
        b"falcon",
        b"opt",
        b"smallthinker",
        b"nothing",
        b"",
        b"gpt2",
        b"command-r",
        b"jamba",
        b"lfm2",
        b"llama4",
    ),
    *(
        b"qwen3next",
        b"minicpm",
        b"olmoe",
        b"mpt",
        b"bloom",
        b"starcoder",
        b"granite",
        b"grok",
        b"dbrx",
        b"wavtokenizer-dec",
    ),
)
_ADDED = (  # keys of architectures, and the type they have
    *((name, 4) for name in ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count")),
    *((name, 4) for name in ("expert_shared_count", "expert_feed_forward_length", "expert_gating_func", "vocab_size")),
    *((name, 4) for name in ("nextn_predict_layers", "rope.dimension_count", "leading_dense_block_count")),
    *(
        (name, 4)
        for name in ("attention.sliding_window", "attention.key_length", "attention.value_length", "block_count")
    ),
    *(
        (name, 4)
        for name in ("attention.kv_lora_rank", "attention.q_lora_rank", "embedding_length_out", "pooling_type")
    ),
    *((name, 4) for name in ("attention.shared_kv_layers", "attention.group_norm_groups", "interleave_moe_layer_step")),
    *(
        (name, 4)
        for name in ("attention.key_length_mla", "attention.value_length_mla", "ssm.state_size", "token_shift_count")
    ),
    *((name, 4) for name in ("rope.scaling.original_context_length", "attention.temperature_length", "context_length")),
    *((name, 6) for name in ("rope.freq_base", "rope.scaling.factor", "rope.scaling.attn_factor", "logit_scale")),
    *((name, 6) for name in ("attn_logit_softcapping", "final_logit_softcapping", "expert_weights_scale")),
    *((name, 6) for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.scale")),
    *((name, 6) for name in ("attention.max_alibi_bias", "attention.clamp_kqv", "residual_scale", "embedding_scale")),
    *(
        (name, 7)
        for name in ("attention.causal", "use_parallel_residual", "expert_weights_norm", "rope.scaling.finetuned")
    ),
    *((name, STRING) for name in ("rope.scaling.type", "feed_forward_activation")),
    *(
        (name, ARRAY)
        for name in ("attention.sliding_window_pattern", "rope.dimension_sections", "attention.head_count_kv")
    ),
    *((name, ARRAY) for name in ("feed_forward_length", "attention.head_count", "attention.sliding_window")),
)
_ADDED_ANYWHERE = (
    *(
        ("general.alignment", 4),
        ("general.type", STRING),
        ("split.count", 2),
        ("split.no", 2),
        ("split.tensors.count", 5),
    ),
    *(
        (f"tokenizer.ggml.{name}_token_id", 4)
        for name in ("bos", "eos", "unknown", "separator", "padding", "eot", "mask")
    ),
    *((f"tokenizer.ggml.add_{name}", 7) for name in ("bos_token", "eos_token", "sep_token", "space_prefix")),
    *(("tokenizer.chat_template", STRING), ("tokenizer.ggml.token_type_count", 4)),
)


def mutated(head: Head, seed: int) -> Head:
    """One or two changes, drawn from the seed: the same for the same seed and head."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2))):
        head = rng.choice(_CHANGES)(head, rng)
    return head


def _draw(kind: int, rng: random.Random, old: Any = None) -> Any:
    if kind == STRING:
        return rng.choice(_WORDS)
    if kind in FLOATS:
        return rng.choice(_REALS)
    number = rng.choice((*_NUMBERS, rng.randrange(1 << 10), (1 << BITS.get(kind, 32)) - 1, 1 << 31, -1, 1 << 62))
    if isinstance(old, int) and rng.random() < 0.4:
        number = rng.choice((old + 1, old - 1, 2 * old, old // 2, 3 * old))
    return number


def _scalar_value(kind: int, rng: random.Random) -> Value:
    if kind == ARRAY:
        item = rng.choice((4, 5, 6, 7, STRING))
        return Value(ARRAY, [_draw(item, rng) for _ in range(rng.choice((0, 1, 2, 3, 4, 12, 513)))], item)
    return Value(kind, _draw(kind, rng))


def _other_value(head: Head, rng: random.Random) -> Head:
    values = list(head.values)
    i = rng.randrange(len(values))
    key, value = values[i]
    if key == b"general.architecture":
        new = Value(STRING, rng.choice(_ARCHITECTURES))
    elif value.kind != ARRAY:
        new = replace(value, content=_draw(value.kind, rng, value.content))
    else:
        new = _other_array(value, rng)
    values[i] = key, new
    return replace(head, values=values)


def _other_array(value: Value, rng: random.Random) -> Value:
    content = list(value.content)
    how = rng.randrange(6)
    if how == 0:
        return replace(
            value, claimed=rng.choice((0, 1, len(content) + 1, 1 << 20, 1 << 30, (1 << 30) + 1, 1 << 62, (1 << 64) - 1))
        )
    if how == 1:
        return replace(value, content=content[: rng.randrange(len(content) + 1)])
    if how == 2 or not content:
        return replace(value, content=content + [_draw(value.item, rng) for _ in range(rng.choice((1, 2, 600)))])
    if how == 3:
        content[rng.randrange(len(content))] = content[rng.randrange(len(content))]
    elif how == 4:
        content[rng.randrange(len(content))] = _draw(value.item, rng)
    else:
        content = [_draw(value.item, rng)] * len(content)
    return replace(value, content=content)


def _other_type(head: Head, rng: random.Random) -> Head:
    values = list(head.values)
    i = rng.randrange(len(values))
    kind = rng.choice((*LAYOUTS, STRING, ARRAY, 13, 200))
    values[i] = values[i][0], _scalar_value(kind, rng) if kind in (STRING, ARRAY) else Value(kind, _draw(kind, rng))
    return replace(head, values=values)


def _without_value(head: Head, rng: random.Random) -> Head:
    values = list(head.values)
    del values[rng.randrange(len(values))]
    return replace(head, values=values)


def _value_twice(head: Head, rng: random.Random) -> Head:
    return replace(head, values=[*head.values, rng.choice(head.values)])


def _more_values(head: Head, rng: random.Random) -> Head:
    if rng.random() < 0.25:
        key, kind = rng.choice(_ADDED_ANYWHERE)
    else:
        name, kind = rng.choice(_ADDED)
        arch = dict(head.values).get(b"general.architecture", Value(STRING, b"llama")).content
        key = f"{arch.decode('latin-1') if isinstance(arch, bytes) else 'llama'}.{name}"
    return head.put(key, _scalar_value(kind, rng))


def _other_tensor(head: Head, rng: random.Random) -> Head:
    tensors = list(head.tensors)
    i = rng.randrange(len(tensors))
    one = tensors[i]
    how = rng.randrange(8)
    if how in (0, 1):
        tensors[i] = replace(one, kind=rng.choice((*TYPE_SIZES, 4, 36, 43, 99, (1 << 32) - 1)))
    elif how in (2, 3) and one.shape:
        shape = list(one.shape)
        j = rng.randrange(len(shape))
        shape[j] = rng.choice((_draw(10, rng, shape[j]), shape[j] + 32, shape[j] + 256))
        tensors[i] = replace(one, shape=tuple(shape))
    elif how == 4:
        tensors[i] = replace(
            one, shape=rng.choice((one.shape[::-1], one.shape[:-1], (*one.shape, 1), (*one.shape, 2), ()))
        )
    elif how == 5:
        other = rng.choice(tensors).name
        tensors[i] = replace(
            one, name=rng.choice((b"", b"x", one.name * 4, other, one.name.replace(b"blk.1", b"blk.9")))
        )
    elif how == 6:
        del tensors[i]
    else:
        tensors.insert(
            i, replace(one, name=rng.choice((one.name, b"blk.0.ffn_up.bias", b"rope_freqs.weight", b"output.weight")))
        )
    changed = replace(head, tensors=tensors)
    return changed.laid_out() if rng.random() < 0.85 else changed


def _other_offset(head: Head, rng: random.Random) -> Head:
    tensors = list(head.tensors)
    i = rng.randrange(len(tensors))
    tensors[i] = replace(tensors[i], offset=rng.choice((0, 1, 32, tensors[i].offset + 32, 1 << 40, (1 << 64) - 32)))
    return replace(head, tensors=tensors)


def _other_bytes(head: Head, rng: random.Random) -> Head:
    n = len(head.encode())
    # mostly in front of and behind the vocabulary
    places = [
        rng.choice((rng.randrange(n), rng.randrange(min(n, 2000)), n - 1 - rng.randrange(min(n, 4000))))
        for _ in range(4)
    ]
    return replace(
        head, patches=[(place, rng.choice((0, 1, 255, rng.randrange(256)))) for place in places[: rng.randrange(1, 5)]]
    )


def _other_counts(head: Head, rng: random.Random) -> Head:
    tensors, values = len(head.tensors), len(head.values)
    odd = (0, 1, 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1)
    return replace(
        head,
        version=rng.choice((head.version, head.version, 0, 1, 2, 4, 1 << 24)),
        counts=(
            rng.choice((tensors, tensors - 1, tensors + 1, *odd)),
            rng.choice((values, values - 1, values + 1, *odd)),
        ),
    )


def _cut(head: Head, rng: random.Random) -> Head:
    n = len(head.encode()) + head.data
    return replace(head, cut=rng.choice((1, 31, 32, 4096, rng.randrange(n), n - rng.randrange(min(n, 200)))))


_CHANGES: tuple[Callable[[Head, random.Random], Head], ...] = (
    *(_other_value,) * 6,
    *(_more_values,) * 5,
    *(_other_tensor,) * 5,
    *(_other_type,) * 2,
    *(_other_bytes,) * 2,
    *(_without_value, _value_twice, _other_offset, _other_counts, _cut),
)
