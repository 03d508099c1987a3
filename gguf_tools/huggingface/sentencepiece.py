"""tokenizer.model, a SentencePiece model: its pieces, without the package that made it.

The file is a protocol buffer (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto). Read
are: ModelProto.pieces (1: piece 1, score 2, type 3), .trainer_spec (2: model_type 3), .normalizer_spec (3:
add_dummy_prefix 3). All else is passed over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from gguf_tools.errors import GgufToolsError

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType; unigram is the default
_NORMAL = 1


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: TokenType  # numbered as SentencePiece does it


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: list[Piece]
    add_dummy_prefix: bool  # a space before the text


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises GgufToolsError if it is not a SentencePiece model of the BPE kind, which is the one that the engine's
    tokenizer "llama" is for."""
    try:
        return _read_model(path.read_bytes())
    except (ValueError, IndexError, struct.error) as error:
        if isinstance(error, GgufToolsError):
            raise GgufToolsError(str(error), file=path) from None
        raise GgufToolsError(f"is not a SentencePiece model: {error}", file=path) from None


def _read_model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    model_type, add_dummy_prefix = _UNIGRAM, True
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_read_piece(_bytes(value)))
        elif field == 2:
            model_type = _number(value, model_type)
        elif field == 3:
            add_dummy_prefix = bool(_number(value, default=1))
    if not pieces:
        raise ValueError("it has no pieces")
    if model_type != _BPE:
        raise GgufToolsError(f"is a SentencePiece model of type {model_type}, only BPE ({_BPE}) can be converted")
    return SentencePieceModel(pieces, add_dummy_prefix)


def _read_piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score, kind = fields.get(2, b"\0\0\0\0"), fields.get(3, _NORMAL)
    (number,) = struct.unpack("<f", _bytes(score))
    return Piece(_bytes(fields.get(1, b"")).decode("utf-8"), number, TokenType(kind))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a message's fields: int for a varint, else bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of the unknown kind {kind}")
        length = 8 if kind == 1 else 4
        if kind == 2:
            length, at = _varint(data, at)
        if at + length > len(data):
            raise ValueError("it is cut off")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _number(message: int | bytes, default: int) -> int:
    """Field 3 of a message."""
    value = dict(_fields(_bytes(message))).get(3, default)
    if not isinstance(value, int):
        raise ValueError("bytes in the place of a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in the place of bytes")
    return value
