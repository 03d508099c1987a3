"""A byte-level tokenizer of any size: the 256 bytes, two specials, and fillers that only sampling can produce."""

from __future__ import annotations

import gguf
from gguf import GGUFValueType as V

from gguf_tools.source import KeyValue

BOS, EOS = 256, 257
MIN_VOCAB = 258


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def tokenizer_values(n_vocab: int) -> dict[str, KeyValue]:
    if n_vocab < MIN_VOCAB:
        raise ValueError(f"the vocabulary needs at least {MIN_VOCAB} tokens, got {n_vocab}")
    characters = byte_characters()
    fillers = [f"{characters[32]}w{i}" for i in range(n_vocab - MIN_VOCAB)]
    names = [*characters, "<|startoftext|>", "<|endoftext|>", *fillers]
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    types = [normal] * 256 + [control] * 2 + [normal] * len(fillers)
    return {
        "tokenizer.ggml.model": KeyValue("gpt2", V.STRING),
        "tokenizer.ggml.pre": KeyValue("gpt-2", V.STRING),
        "tokenizer.ggml.tokens": KeyValue(names, V.ARRAY, V.STRING),
        "tokenizer.ggml.token_type": KeyValue(types, V.ARRAY, V.INT32),
        # the loader wants merges; this one makes a filler's name, which no text reaches byte by byte
        "tokenizer.ggml.merges": KeyValue([f"{characters[32]} w"], V.ARRAY, V.STRING),
        "tokenizer.ggml.bos_token_id": KeyValue(BOS, V.UINT32),
        "tokenizer.ggml.eos_token_id": KeyValue(EOS, V.UINT32),
        "tokenizer.ggml.add_bos_token": KeyValue(False, V.BOOL),
    }


def add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    for key, value in tokenizer_values(n_vocab).items():
        writer.add_key_value(key, value.value, value.type, sub_type=value.sub_type)
