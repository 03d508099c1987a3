"""A checkpoint's tokenizer as key-values: tokens, their types, merges or scores, special tokens, chat template.

Two kinds are known: byte-level BPE ("gpt2": tokenizer.json, or vocab.json and merges.txt) and SentencePiece's BPE
("llama": tokenizer.model, or tokenizer.json with a fallback to bytes). What is written follows llama.cpp's
conversion/base.py; the special tokens come from the gguf package's SpecialVocab.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, SpecialVocab, TokenType

from gguf_tools.errors import GgufToolsError
from gguf_tools.huggingface.config import read_json, read_json_if_there
from gguf_tools.huggingface.plan import boolean, string, uint32
from gguf_tools.huggingface.pretokenizer import pretokenizer_name
from gguf_tools.huggingface.sentencepiece import read_sentencepiece
from gguf_tools.source import KeyValue

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER_MERGED = -1e9  # a score below that of any merge
_ADDED_SCORE = -1000.0
# added tokens that some models do not mark as special (llama.cpp, TextModel.does_token_look_special)
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)
_SPECIALS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ID_KEYS = {kind: f"{kind}_token_id" for kind in ("bos", "eos", "eot", "eom", "mask")} | {
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # as the format spells it
    "pad": "padding_token_id",
}


@dataclass(frozen=True)
class _Token:
    text: str
    type: TokenType
    score: float = 0.0


@dataclass
class _Vocabulary:
    model: str  # gpt2 or llama
    pre: str
    tokens: dict[int, _Token]
    add_space_prefix: bool | None = None  # None: as the engine does it for this model


def tokenizer_values(directory: Path, n_vocab: int) -> dict[str, KeyValue]:
    """The key-values tokenizer.*. n_vocab: rows of the embeddings; ids without a token become unused ones.

    Raises GgufToolsError if there is no tokenizer, or one that the engine does not have.
    """
    try:
        vocabulary = _read(directory, n_vocab)
        special = _read_special(directory, n_vocab, merges=vocabulary.model == "gpt2")
    except GgufToolsError:
        raise
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:  # not of the form they should have
        raise GgufToolsError(f"its tokenizer's files are damaged: {error!r}", file=directory) from error
    tokens = [vocabulary.tokens.get(i, _Token(f"[PAD{i}]", TokenType.UNUSED, -10000.0)) for i in range(n_vocab)]
    _check_unique(tokens, directory)
    values = {
        "model": string(vocabulary.model),
        "pre": string(vocabulary.pre),
        "tokens": _array([token.text for token in tokens], GGUFValueType.STRING),
        "token_type": _array([int(token.type) for token in tokens], GGUFValueType.INT32),
    }
    if vocabulary.model == "llama":
        values["scores"] = _array([token.score for token in tokens], GGUFValueType.FLOAT32)
    else:
        if not special.merges:
            raise GgufToolsError("its tokenizer has no merges", file=directory)
        values["merges"] = _array(special.merges, GGUFValueType.STRING)
    ids = _ids_of_specials(directory, vocabulary) | special.special_token_ids
    values |= {_ID_KEYS[kind]: uint32(i) for kind, i in ids.items() if kind in _ID_KEYS}
    if vocabulary.add_space_prefix is not None:
        values["add_space_prefix"] = boolean(vocabulary.add_space_prefix)
    added = special.add_special_token
    if vocabulary.model == "gpt2":  # what the engine does by itself differs from one pre-tokenizer to the other
        added = {"bos": False, **added}
    values |= {f"add_{kind}_token": boolean(add) for kind, add in added.items() if kind in ("bos", "eos", "sep")}
    found = {_PREFIX + key: value for key, value in values.items()}
    return found | _chat_templates(special.chat_template)


def _array(values: list[Any], kind: GGUFValueType) -> KeyValue:
    return KeyValue(values, GGUFValueType.ARRAY, kind)


def _read(directory: Path, n_vocab: int) -> _Vocabulary:
    fast = directory / "tokenizer.json"
    tokenizer = read_json_if_there(fast)
    try:
        if (directory / "tokenizer.model").is_file():
            vocabulary = _from_sentencepiece(directory / "tokenizer.model", n_vocab)
        elif tokenizer:
            vocabulary = _from_fast(tokenizer, n_vocab)
        elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            base = read_json(directory / "vocab.json")
            vocabulary = _Vocabulary("gpt2", "gpt-2", _base_tokens(base, n_vocab))
        else:
            known = "tokenizer.model, tokenizer.json, or vocab.json and merges.txt"
            raise GgufToolsError(f"holds no tokenizer: there is no {known}", file=directory)
    except GgufToolsError as error:
        raise error if error.file else GgufToolsError(str(error), file=fast if tokenizer else directory) from None
    _add_tokens(vocabulary, _added_tokens(directory, tokenizer), n_vocab)
    _mark_specials(vocabulary, {text for _, text in _named_specials(directory)})
    settings = read_json_if_there(directory / "tokenizer_config.json")
    if vocabulary.model == "llama" and isinstance(prefix := settings.get("add_prefix_space"), bool):
        vocabulary.add_space_prefix = prefix
    return vocabulary


def _from_sentencepiece(path: Path, n_vocab: int) -> _Vocabulary:
    model = read_sentencepiece(path)
    if len(model.pieces) > n_vocab:
        raise GgufToolsError(f"has {len(model.pieces)} pieces, but the model {n_vocab} embeddings", file=path)
    tokens = {}
    for i, piece in enumerate(model.pieces):
        own = piece.type == TokenType.USER_DEFINED  # found in the text as it is, before spaces are replaced
        tokens[i] = _Token(piece.text.replace(_SPACE, " ") if own else piece.text, piece.type, piece.score)
    return _Vocabulary("llama", "default", tokens, model.add_dummy_prefix)


def _from_fast(tokenizer: dict[str, Any], n_vocab: int) -> _Vocabulary:
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise GgufToolsError(f"is a tokenizer of type {model['type']}, only BPE can be converted")
    base: dict[str, int] = model["vocab"]
    tokens = _base_tokens(base, n_vocab)
    if not model.get("byte_fallback", False):
        return _Vocabulary("gpt2", pretokenizer_name(tokenizer), tokens)
    scores = _scores(model["merges"])
    for text, i in base.items():
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        kind = TokenType.UNKNOWN if text == model.get("unk_token") else kind
        tokens[i] = _Token(text, kind, scores.get(text, _NEVER_MERGED))
    return _Vocabulary("llama", "default", tokens, _adds_space(tokenizer))


def _scores(merges: list[Any]) -> dict[str, float]:
    """The engine merges the pair that makes the token of the highest score, tokenizers the one that is listed first."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        scores.setdefault(left + right, -float(rank))
    return scores


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by the normaliser, or by the pre-tokenizer "Metaspace"."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    before = tokenizer.get("pre_tokenizer") or {}
    if before.get("type") == "Metaspace":
        scheme = "always" if before.get("add_prefix_space", True) else "never"
        return bool(before.get("prepend_scheme", scheme) != "never")
    return any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps)


def _base_tokens(vocabulary: Mapping[str, Any], n_vocab: int) -> dict[int, _Token]:
    tokens: dict[int, _Token] = {}
    for text, i in vocabulary.items():
        if type(i) is not int or not 0 <= i < n_vocab:
            raise GgufToolsError(f"gives the token {text!r:.40} the id {i!r:.20}, but the model has {n_vocab}")
        if i in tokens:
            raise GgufToolsError(f"gives {text!r:.40} and {tokens[i].text!r:.40} the same id, {i}")
        tokens[i] = _Token(text, TokenType.NORMAL)
    return tokens


def _added_tokens(directory: Path, tokenizer: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens beside the tokenizer's own vocabulary, or set apart in it: id -> text, whether it is special."""
    settings = read_json_if_there(directory / "tokenizer_config.json")
    found: dict[int, tuple[str, bool]] = {}
    for text, i in read_json_if_there(directory / "added_tokens.json").items():
        found[int(i)] = (text, False)
    for token in tokenizer.get("added_tokens") or []:
        found[int(token["id"])] = (token["content"], bool(token.get("special")))
    for i, token in (settings.get("added_tokens_decoder") or {}).items():
        found[int(i)] = (token["content"], bool(token.get("special")))
    return found


def _named_specials(directory: Path) -> Iterator[tuple[str, str]]:
    """Kind (bos, ..., or "" for further ones) and text of bos_token and the like."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = read_json_if_there(directory / file)
        tokens = [(kind, settings.get(f"{kind}_token")) for kind in _SPECIALS]
        tokens += [("", token) for token in settings.get("additional_special_tokens") or []]
        for kind, token in tokens:
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield kind, text


def _ids_of_specials(directory: Path, vocabulary: _Vocabulary) -> dict[str, int]:
    """For a tokenizer without tokenizer.json, where SpecialVocab does not look names up."""
    ids = {token.text: i for i, token in vocabulary.tokens.items()}
    return {kind: ids[text] for kind, text in _named_specials(directory) if kind and text in ids}


def _mark_specials(vocabulary: _Vocabulary, texts: set[str]) -> None:
    for i, token in vocabulary.tokens.items():
        if token.text in texts and token.type == TokenType.NORMAL:
            vocabulary.tokens[i] = replace(token, type=TokenType.CONTROL)


def _add_tokens(vocabulary: _Vocabulary, added: Mapping[int, tuple[str, bool]], n_vocab: int) -> None:
    for i, (text, special) in added.items():
        if not 0 <= i < n_vocab:
            continue  # without an embedding it cannot be used
        present = vocabulary.tokens.get(i)
        if present is not None and present.type in (TokenType.UNKNOWN, TokenType.BYTE) and present.text == text:
            continue
        control = special or bool(_LOOKS_SPECIAL.fullmatch(text))
        kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
        vocabulary.tokens[i] = _Token(text if control else text.replace(_SPACE, " "), kind, _ADDED_SCORE)


def _read_special(directory: Path, n_vocab: int, *, merges: bool) -> SpecialVocab:
    with _quiet("gguf.vocab"):
        return SpecialVocab(directory, load_merges=merges, n_vocab=n_vocab)


def _check_unique(tokens: list[_Token], directory: Path) -> None:
    """The engine stops the process at a vocabulary that has a text twice."""
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token.text in seen:
            raise GgufToolsError(f"tokens {seen[token.text]} and {i} are both {token.text!r:.40}", file=directory)
        seen[token.text] = i


def _chat_templates(template: Any) -> dict[str, KeyValue]:
    """One template, or several of which one is called default."""
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": string(template)}
    values: dict[str, KeyValue] = {}
    names: list[str] = []
    for one in template:
        name, text = str(one.get("name", "")), str(one.get("template", ""))
        if name == "default":
            values["tokenizer.chat_template"] = string(text)
        elif re.fullmatch(r"\w+", name, re.ASCII) and text:
            names.append(name)
            values[f"tokenizer.chat_template.{name}"] = string(text)
    if names:
        values["tokenizer.chat_templates"] = _array(names, GGUFValueType.STRING)
    return values


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
