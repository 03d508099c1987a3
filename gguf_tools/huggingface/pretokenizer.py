"""How a byte-level BPE tokenizer cuts text into words: the engine's name for what tokenizer.json describes.

llama.cpp's conversion recognises tokenizers by what they make of a sample text, for which it needs them loaded. Here
the description itself is compared, so that nothing else is needed and a finetune's added tokens do not matter.
"""

from __future__ import annotations

import json
from typing import Any

from gguf_tools.errors import GgufToolsError

# src/llama-vocab.cpp of llama.cpp names the expressions that it was given as "original regex from tokenizer.json"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _LETTERS + r"|\p{N}{1,3}|" + _REST
_QWEN2 = _LETTERS + r"|\p{N}|" + _REST

_BYTES = {"type": "ByteLevel", "use_regex": True}
_BYTES_ONLY = {"type": "ByteLevel", "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# (steps, whether words that are tokens are taken whole) -> the engine's name
_KNOWN: tuple[tuple[list[dict[str, Any]], bool, str], ...] = (
    ([_BYTES], False, "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _BYTES], False, "starcoder"),
    (
        [
            {"type": "Punctuation", "behavior": "Contiguous"},
            _BYTES,
            {"type": "Digits", "individual_digits": False},
            _split("[0-9][0-9][0-9]"),
        ],
        False,
        "falcon",
    ),
    ([_split(_LLAMA3), _BYTES_ONLY], True, "llama-bpe"),
    ([_split(_LLAMA3), _BYTES_ONLY], False, "smaug-bpe"),
    ([_split(_QWEN2), _BYTES_ONLY], False, "qwen2"),
)


def pretokenizer_name(tokenizer: dict[str, Any]) -> str:
    """tokenizer: what tokenizer.json holds. Raises GgufToolsError if the engine does not know it."""
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise GgufToolsError(f"has the normalizer {_short(normalizer)}, which the engine does not have")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if any(step.get("add_prefix_space") for step in steps):
        raise GgufToolsError("puts a space before the text, which the engine does not do for byte-level BPE")
    told = [{key: step[key] for key in step if key not in ("add_prefix_space", "trim_offsets")} for step in steps]
    told = [{"use_regex": True, **step} if step.get("type") == "ByteLevel" else step for step in told]
    ignores_merges = bool(tokenizer.get("model", {}).get("ignore_merges", False))
    for known, whole_words, name in _KNOWN:
        if told == known and whole_words == ignores_merges:
            return name
    names = ", ".join(name for _, _, name in _KNOWN)
    how = " and ignore_merges" if ignores_merges else ""
    raise GgufToolsError(f"has the pre-tokenizer {_short(told)}{how}, which is none of {names}")


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    return [step for one in pre_tokenizer.get("pretokenizers", []) for step in _steps(one)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
