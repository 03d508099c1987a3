"""A byte-level tokenizer of any size: the 256 bytes, two specials, and fillers that only sampling can produce."""

from __future__ import annotations

import gguf

BOS, EOS = 256, 257
MIN_VOCAB = 258


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    if n_vocab < MIN_VOCAB:
        raise ValueError(f"the vocabulary needs at least {MIN_VOCAB} tokens, got {n_vocab}")
    characters = byte_characters()
    fillers = [f"{characters[32]}w{i}" for i in range(n_vocab - MIN_VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*characters, "<|startoftext|>", "<|endoftext|>", *fillers])
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_token_types([normal] * 256 + [control] * 2 + [normal] * len(fillers))
    # the loader wants merges; this one makes a filler's name, which no text reaches byte by byte
    writer.add_token_merges([f"{characters[32]} w"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(False)
