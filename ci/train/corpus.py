"""The text: Python's standard library as installed here, split by file, and its byte-level BPE tokenizer.

What lives here: choosing and splitting files, the tokenizer, the token streams. Not here: batches (train.py).
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

N_VOCAB = 4096
BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1

# The test suites would be two thirds of the text and say little about the library itself.
EXCLUDED_DIRS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})

HELD_OUT_ONE_IN = 16
NEAR_DUPLICATE_SHARE = 0.5

TokenArray = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Files of the library: path relative to the library's root -> text."""

    train: dict[str, str]
    held_out: dict[str, str]
    near_duplicates: list[str]
    python_version: str
    sha256: str  # of every kept path and its bytes, in path order

    @staticmethod
    def n_bytes(files: dict[str, str]) -> int:
        return sum(len(text.encode()) for text in files.values())


def is_held_out(relative_path: str) -> bool:
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _telling_lines(text: str) -> set[str]:
    """Lines long enough not to be shared by accident."""
    return {line for line in (raw.strip() for raw in text.splitlines()) if len(line) >= 16}


def _drop_near_duplicates(files: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Keep a file unless one file already kept holds more than half of its lines, or the other way round.

    Held-out files are looked at first, so that it is the training side that loses a duplicate.
    """
    kept: dict[str, str] = {}
    dropped: list[str] = []
    n_lines: dict[str, int] = {}
    holders: dict[str, list[str]] = {}
    for path in sorted(files, key=lambda p: (not is_held_out(p), p)):
        lines = _telling_lines(files[path])
        shared = Counter(holder for line in lines for holder in holders.get(line, ()))
        if any(n > NEAR_DUPLICATE_SHARE * min(len(lines), n_lines[holder]) for holder, n in shared.items()):
            dropped.append(path)
            continue
        kept[path] = files[path]
        n_lines[path] = len(lines)
        for line in lines:
            holders.setdefault(line, []).append(path)
    return kept, dropped


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library under `root` (default: the running Python's). Files that are not UTF-8 are left out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRS.intersection(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files[relative.as_posix()] = text
    kept, dropped = _drop_near_duplicates(files)

    digest = hashlib.sha256()
    for name in sorted(kept):
        digest.update(name.encode() + b"\0" + kept[name].encode() + b"\0")
    return Corpus(
        train={p: kept[p] for p in sorted(kept) if not is_held_out(p)},
        held_out={p: kept[p] for p in sorted(kept) if is_held_out(p)},
        near_duplicates=sorted(dropped),
        python_version=platform.python_version(),
        sha256=digest.hexdigest(),
    )


def train_tokenizer(files: dict[str, str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting rule, which llama.cpp knows as `tokenizer.ggml.pre = "gpt-2"`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((files[path] for path in sorted(files)), trainer)
    if tokenizer.get_vocab_size() != N_VOCAB or tokenizer.token_to_id(BOS) != BOS_ID:
        raise RuntimeError("the tokenizer did not come out as planned")
    return tokenizer


def encode_documents(tokenizer: Tokenizer, files: dict[str, str]) -> list[TokenArray]:
    """One array per file, in path order: BOS, the text, EOS."""
    return encode_texts(tokenizer, [files[path] for path in sorted(files)])


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[TokenArray]:
    """One array per text: BOS, the text, EOS."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.uint16) for encoding in encodings]
