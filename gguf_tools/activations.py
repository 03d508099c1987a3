"""Recordings of what the dense feed-forward blocks of a model see and compute on a text.

What lives here: what is kept, and the files it is kept in. Not here: running the model (observe.py).

A recording is a folder: `recording.json` and one file per sequence, written whole or not at all, so that an interrupted
run goes on where it stopped. All sequences are equally long and begin with an empty context. Per layer N:

    N.inputs  [tokens, n_embd] float16: what up (and gate) are multiplied with
    N.active  [tokens, ceil(n_ff / 8)] uint8: which neurons are not zero, the first one in the highest bit
    N.values  [active] uint16: magnitudes of the active neurons, token by token, the upper half of their float32
    N.n_ff    neurons
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import GgufToolsError
from gguf_tools.format import dimensions_of, read_flash
from gguf_tools.observe import Floats, Observation, Observer
from gguf_tools.progress import count_progress
from gguf_tools.source import Source, open_gguf, row_count
from llama_flash.file_kind import kind_of_file
from llama_flash.whole_files import whole_file

Bits = npt.NDArray[np.uint8]  # packed, the first one in the highest bit
Numbers = npt.NDArray[np.int64]
Say = Callable[[str], None]  # shows one line of progress

SEQUENCE = 512  # tokens, less where the model was trained with less
MIN_SEQUENCES = 8  # fewer cannot be split into those that are fitted, calibrated and held out
_LONGEST_TEXT = 64 << 20  # bytes: of a longer one, excerpts
_EXCERPTS = 64
_RESERVE = 256 << 20  # bytes of disk space left alone
_VERSION = 1
_STATE = "recording.json"
_LARGEST = np.float32(3e38)
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@dataclass(frozen=True)
class LayerActivations:
    """One layer of a recording."""

    inputs: npt.NDArray[np.float16]  # [tokens, n_embd]
    active: Bits  # [tokens, ceil(n_ff / 8)]
    values: npt.NDArray[np.uint16]  # [active neurons of all tokens]
    n_ff: int

    @classmethod
    def of(cls, seen: Observation) -> LayerActivations:
        limit = float(np.finfo(np.float16).max)
        active = seen.neurons != 0
        return cls(
            np.clip(seen.inputs, -limit, limit).astype(np.float16),
            np.packbits(active, axis=1),
            _narrowed(np.abs(seen.neurons[active])),
            seen.neurons.shape[1],
        )

    @property
    def n_tokens(self) -> int:
        return len(self.inputs)

    @cached_property
    def _begins(self) -> Numbers:
        """[tokens + 1]: where each token's values begin."""
        return np.concatenate([[0], np.cumsum(count_bits(self.active).sum(axis=1, dtype=np.int64))])

    def magnitudes(self, tokens: Numbers) -> Floats:
        """|value of each neuron|, [tokens, n_ff], of some tokens by their numbers."""
        active = unpacked(self.active[tokens], self.n_ff)
        out = np.zeros(active.shape, np.float32)
        pieces = [self.values[self._begins[t] : self._begins[t + 1]] for t in tokens]
        out[active] = _widened(np.concatenate(pieces)) if pieces else 0
        return out

    def select(self, tokens: npt.NDArray[np.bool_]) -> LayerActivations:
        """The layer's activations on those tokens. tokens: [n_tokens]."""
        values = self.values[np.repeat(tokens, np.diff(self._begins))]
        return LayerActivations(self.inputs[tokens], self.active[tokens], values, self.n_ff)


@dataclass(frozen=True)
class Recording:
    """A complete recording. Its layers are read one at a time."""

    folder: Path
    model: str  # fingerprint of the model that was run
    sequence: int  # tokens of a sequence
    n_sequences: int
    tokens: str  # SHA-256 of all tokens
    layers: tuple[int, ...]  # those that have a dense feed-forward block

    @property
    def n_tokens(self) -> int:
        return self.sequence * self.n_sequences

    @property
    def sequence_of_token(self) -> Numbers:
        """[n_tokens]"""
        return np.repeat(np.arange(self.n_sequences), self.sequence)

    def layer(self, il: int) -> LayerActivations:
        pieces = []
        for number in range(self.n_sequences):
            with np.load(_sequence_file(self.folder, number)) as stored:
                pieces.append([stored[f"{il}.{name}"] for name in ("inputs", "active", "values", "n_ff")])
        inputs, active, values, n_ff = zip(*pieces, strict=True)
        return LayerActivations(np.concatenate(inputs), np.concatenate(active), np.concatenate(values), int(n_ff[0]))

    def active(self, il: int) -> tuple[Bits, int]:
        """Which neurons of a layer are active, [n_tokens, ceil(n_ff / 8)], and n_ff, without the rest."""
        pieces, n_ff = [], 0
        for number in range(self.n_sequences):
            with np.load(_sequence_file(self.folder, number)) as stored:
                pieces.append(stored[f"{il}.active"])
                n_ff = int(stored[f"{il}.n_ff"])
        return np.concatenate(pieces), n_ff


def fingerprint(source: Source) -> str:
    """Tells models, and orders of their neurons, apart. Predictors do not count: activations do not depend on them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(source.tensors.items()):
        if ".ffn_predictor" in name:
            continue
        digest.update(f"{name} {tensor.kind.name} {tensor.shape}\n".encode())
        rows = row_count(tensor)
        for row in sorted({0, rows // 2, rows - 1}):
            digest.update(tensor.raw(row, row + 1).tobytes())
    return digest.hexdigest()


def open_recording(folder: Path) -> Recording:
    """Raises GgufToolsError if the folder holds no complete recording."""
    state = _read_state(folder)
    if state is None:
        raise GgufToolsError("no recording of activations", file=folder)
    missing = [n for n in range(state.n_sequences) if not _sequence_file(folder, n).exists()]
    if missing:
        raise GgufToolsError(f"{len(missing)} of {state.n_sequences} sequences are not recorded yet", file=folder)
    with np.load(_sequence_file(folder, 0)) as stored:
        layers = sorted(int(name.partition(".")[0]) for name in stored.files if name.endswith(".n_ff"))
    return Recording(folder, state.model, state.sequence, state.n_sequences, state.tokens, tuple(layers))


def record(
    path: Path, text: Path, folder: Path, *, n_tokens: int, n_threads: int | None = None, say: Say | None = None
) -> Recording:
    """Runs a model over a text, or goes on doing so, and returns the recording.

    path: a GGUF file; a flash file runs with all its neurons, within the memory there is. n_tokens: at most so many, in
    whole sequences from all over the text.

    Raises:
        GgufToolsError: the text is too short, the engine cannot load the model, the disk has no room, or the folder
            holds a recording of something else.
        OSError: a file cannot be read or written.
    """
    excerpts = _excerpts(text)
    source = open_gguf(path)
    dimensions = dimensions_of(source.values, path)
    vocabulary = source.values.get("tokenizer.ggml.tokens")
    if vocabulary is None:
        raise GgufToolsError("is missing", file=path, key="tokenizer.ggml.tokens")
    trained = source.values.get(f"{dimensions.architecture}.context_length")
    n_ctx = min(SEQUENCE, SEQUENCE if trained is None else int(trained.value))
    observer = Observer(
        path,
        n_ctx=n_ctx,
        n_vocab=len(vocabulary.value),
        flash_offload={"predictor": "off"} if read_flash(source, path) else None,
        n_threads=n_threads,
    )
    try:
        sequences = _sequences(observer, text, excerpts, n_ctx, n_tokens)
        state = _State(_VERSION, fingerprint(source), n_ctx, len(sequences), _hash_of(sequences))
        folder.mkdir(parents=True, exist_ok=True)
        _check_state(folder, state)
        missing = [number for number in range(len(sequences)) if not _sequence_file(folder, number).exists()]
        if say and len(missing) < len(sequences):
            say(f"going on with {folder}: {len(sequences) - len(missing)} of {len(sequences)} sequences are recorded")
        what = f"recording {path.name}" if say else None
        with count_progress(what, len(missing) * n_ctx, "tokens") as advance:
            for number in missing:
                seen = observer.run(sequences[number])
                if not seen:
                    raise GgufToolsError("has no dense feed-forward blocks", file=path)
                _save(_sequence_file(folder, number), seen, len(sequences) - number)
                advance(n_ctx)
    finally:
        observer.close()
    return open_recording(folder)


def remove_recording(folder: Path, others: Iterable[Path] = ()) -> None:
    """Removes a recording's files and `others`, and the folder if nothing else is in it."""
    for file in (*others, *folder.glob("sequence-*.npz"), folder / _STATE):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def unpacked(active: Bits, n_ff: int) -> npt.NDArray[np.bool_]:
    """[tokens, ceil(n_ff / 8)] -> [tokens, n_ff]"""
    return np.unpackbits(active, axis=1, count=n_ff).view(np.bool_)


def count_bits(active: Bits) -> npt.NDArray[np.uint8]:
    """Bits set in each byte."""
    counts: npt.NDArray[np.uint8] = _BITS_SET[active]
    return counts


def _sequences(observer: Observer, text: Path, excerpts: bytes, n_ctx: int, n_tokens: int) -> list[list[int]]:
    """Equally spaced over the text, so that all kinds of text in it have their share; each begins as a prompt does."""
    tokens, first = observer.tokenize(excerpts), observer.first_tokens
    length = n_ctx - len(first)
    available = len(tokens) // length
    count = min(available, n_tokens // n_ctx)
    if count < MIN_SEQUENCES:
        raise GgufToolsError(
            f"{min(len(tokens), n_tokens)} tokens are too few: {MIN_SEQUENCES} sequences of {n_ctx} are the least",
            file=text,
        )
    starts = [i * available // count * length for i in range(count)]
    return [first + tokens[start : start + length] for start in starts]


def _excerpts(text: Path) -> bytes:
    """The text, or lines from all over it if it is too long. Raises GgufToolsError where it is no text."""
    if kind := kind_of_file(text):
        raise GgufToolsError(f"{kind}, not a text", file=text)
    size = text.stat().st_size
    with text.open("rb") as stream:
        if size <= _LONGEST_TEXT:
            found = stream.read()
        else:
            pieces = []
            for i in range(_EXCERPTS):
                stream.seek(i * size // _EXCERPTS)
                stream.readline(1 << 16)  # the rest of a line
                piece = stream.read(_LONGEST_TEXT // _EXCERPTS).rpartition(b"\n")[0]
                pieces.append(piece.lstrip(bytes(range(0x80, 0xC0))))  # the rest of a character
            found = b"\n".join(pieces)
    try:
        found.decode("utf-8")
    except UnicodeDecodeError as error:
        before = found[max(0, error.start - 20) : error.start]
        raise GgufToolsError(f"not UTF-8: 0x{found[error.start]:02x} after {before!r}", file=text) from None
    return found


@dataclass(frozen=True)
class _State:
    version: int
    model: str
    sequence: int
    n_sequences: int
    tokens: str


def _hash_of(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(np.asarray(sequences, np.int32).tobytes()).hexdigest()


def _sequence_file(folder: Path, number: int) -> Path:
    return folder / f"sequence-{number:05d}.npz"


def _read_state(folder: Path) -> _State | None:
    try:
        return _State(**json.loads((folder / _STATE).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise GgufToolsError(f"damaged ({error})", file=folder / _STATE) from None


def _check_state(folder: Path, state: _State) -> None:
    stored = _read_state(folder)
    if stored is None:
        with whole_file(folder / _STATE) as file:
            file.write(json.dumps(asdict(state), indent=2).encode())
    elif stored != state:
        raise GgufToolsError(
            "holds the activations of another model or text: remove it, or name another folder", file=folder
        )


def _save(path: Path, seen: dict[int, Observation], n_left: int) -> None:
    """Writes a sequence's file. n_left: how many, this one included, are still to come."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for il, observation in seen.items():
        layer = LayerActivations.of(observation)
        arrays |= {f"{il}.inputs": layer.inputs, f"{il}.active": layer.active, f"{il}.values": layer.values}
        arrays[f"{il}.n_ff"] = np.array(layer.n_ff)
    needed = n_left * sum(array.nbytes for array in arrays.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed + _RESERVE:
        raise GgufToolsError(f"needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free", file=path.parent)

    with whole_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _narrowed(values: Floats) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded up, so that nothing becomes zero."""
    rounded: npt.NDArray[np.uint32] = np.minimum(values, _LARGEST).view(np.uint32) + np.uint32(0xFFFF)
    return (rounded >> 16).astype(np.uint16)


def _widened(values: npt.NDArray[np.uint16]) -> Floats:
    widened: Floats = (values.astype(np.uint32) << 16).view(np.float32)
    return widened
