"""Traces: which records (experts, neurons) a run asked of the cache, by token. Layout: docs/reference/trace-file.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..archives import open_archive, write_archive
from ..errors import FlashError
from ..native import bindings
from ..native.handle import TRACE_ENTRY, Session
from .stats import FlashStats

__all__ = ["DECODE_TOKENS", "Recorder", "Run", "Trace", "Traced", "TracedTensor"]

FORMAT = "llama-flash trace 1"
DECODE_TOKENS = 16  # an op of more tokens is of a prompt, which evicts nothing

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TracedTensor:
    """All experts' slices of one matrix, or a layer's neuron bundles."""

    name: str
    n_records: int  # experts, or neurons
    group: int  # the tensors of a layer that share their experts
    size_class: int  # records of one class share its slots
    neurons: bool
    record_bytes: int  # of a slot


@dataclass(frozen=True)
class Run:
    """What the traced run itself has counted, with the slots it had."""

    slots: dict[int, int]  # by size class
    hits: int
    misses: int
    exact: bool  # nothing but the trace has decided: no slots came or went, nothing was pinned, warm, or read ahead


@dataclass(frozen=True)
class Trace:
    """Ops in the order in which they ran.

    Op i asked for `record[begin[i]:begin[i + 1]]`, records of tensor `tensors[tensor[i]]`.
    """

    model: str
    tensors: tuple[TracedTensor, ...]
    token: Ints  # by op: number of its last token
    n_tokens: Ints  # by op; more than DECODE_TOKENS: a prompt
    tensor: Ints  # by op
    begin: Ints  # by op, and one more
    record: Ints  # of the op's tensor
    uses: Ints  # tokens of the op that use the record
    run: Run | None = None

    @property
    def decode(self) -> npt.NDArray[np.bool_]:
        """By op: it decodes."""
        return self.n_tokens <= DECODE_TOKENS

    @property
    def n_decoded(self) -> int:
        """Tokens that were decoded; the last layer decodes one more if a prompt came before (its last token)."""
        counts = np.bincount(self.tensor[self.decode], self.n_tokens[self.decode])
        return int(counts[counts > 0].min()) if counts.any() else 0

    def save(self, path: Path | str) -> None:
        """Writes the file, as a whole or not at all; a compressed .npz without pickled objects. Raises OSError."""
        header = {
            "format": FORMAT,
            "model": self.model,
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "run": None if self.run is None else asdict(self.run),
        }
        columns = {
            "token": _small(self.token),
            "n_tokens": _small(self.n_tokens),
            "tensor": _small(self.tensor),
            "size": _small(np.diff(self.begin)),
            "record": _small(self.record),
            "uses": _small(self.uses),
        }
        write_archive(path, header=np.array(json.dumps(header)), **columns)

    @classmethod
    def load(cls, path: Path | str) -> Trace:
        """Reads what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a trace, or contradicts itself.
        """
        with open_archive(path, "a trace") as file:
            header = json.loads(str(file["header"]))
            columns = {
                name: file[name].astype(np.int64) for name in ("token", "n_tokens", "tensor", "size", "record", "uses")
            }
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
            tensors = tuple(TracedTensor(**tensor) for tensor in header["tensors"])
            run = header["run"]
            if run is not None:
                run = Run(**{**run, "slots": {int(k): int(v) for k, v in run["slots"].items()}})
            begin = np.concatenate([[0], np.cumsum(columns.pop("size"))])
            trace = cls(model=header["model"], tensors=tensors, begin=begin, run=run, **columns)
            trace._check()
        return trace

    def _check(self) -> None:
        n_ops = len(self.token)
        if any(len(column) != n_ops for column in (self.n_tokens, self.tensor)) or len(self.begin) != n_ops + 1:
            raise ValueError("its columns differ in length")
        if (np.diff(self.begin) < 0).any() or not self.begin[-1] == len(self.record) == len(self.uses):
            raise ValueError("its ops and their records do not match")
        if n_ops and not (self.tensor.min() >= 0 and self.tensor.max() < len(self.tensors)):
            raise ValueError("an op is of a tensor that it does not describe")
        limit = np.array([tensor.n_records for tensor in self.tensors], np.int64)
        of_record = np.repeat(self.tensor, np.diff(self.begin))
        if n_ops and ((self.record < 0) | (self.record >= limit[of_record])).any():
            raise ValueError("a record's number is out of range")


def _small(column: Ints) -> npt.NDArray[Any]:
    """The same numbers in the smallest type that holds them."""
    return column.astype(np.min_scalar_type(int(column.max(initial=0))))


class Traced(Protocol):
    """What a Recorder needs of a loaded model: `llm.flash` is one."""

    recorder: Recorder | None  # whose `drain` is called after each call

    @property
    def native(self) -> Session | None: ...
    @property
    def name(self) -> str: ...
    @property
    def ubatches(self) -> int: ...
    def stats(self) -> FlashStats: ...


@dataclass
class Recorder:
    """Records what a session's runs ask of the cache, from `with` on: best begun before the first token.

    Raises:
        FlashError: nothing is cached: all weights are resident, or those on flash are neither experts nor neurons.
    """

    session: Traced
    _pieces: list[npt.NDArray[Any]] = field(default_factory=list)

    def __enter__(self) -> Recorder:
        session, native = self.session, self.session.native
        if native is None:
            raise FlashError("there is nothing to trace: all weights are resident, none is read from flash")
        self._native = native
        self._described = self._describe()
        if not any(n for _, n in self._described):
            raise FlashError("there is nothing to trace: the weights on flash are neither experts nor neurons")
        self._before = session.stats().total
        self._slots_before = self._slots()
        self._cold = session.stats().total.hits + session.stats().total.misses == 0 and not native.stats().slots_used
        # each record once in a ubatch: drained after each call, the buffer never overflows
        self._entries = np.empty(max(1, session.ubatches * sum(n for _, n in self._described)), TRACE_ENTRY)
        native.trace(len(self._entries))
        session.recorder = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.recorder = None
        if self.session.native is not None:
            self._native.trace(0)

    def drain(self) -> None:
        """Takes what the last call has asked for; the session calls it after each one.

        Raises:
            FlashError: entries were lost.
        """
        n, lost = self._native.drain_trace(self._entries)
        if lost:
            raise FlashError(f"the trace has lost {lost} records: a call asked for more than there was room for")
        self._pieces.append(self._entries[:n].copy())

    def trace(self) -> Trace:
        """What was recorded so far."""
        entries = np.concatenate([np.empty(0, TRACE_ENTRY), *self._pieces])
        number: dict[int, int] = {}  # of a tensor in the file, by its number in the plugin
        tensors: list[TracedTensor] = []
        for index, (tensor, n_records) in enumerate(self._described):
            if n_records:
                number[index] = len(tensors)
                tensors.append(tensor)
        first = np.ones(len(entries), np.bool_)
        if len(entries):
            first[1:] = (entries["token"][1:] != entries["token"][:-1]) | (
                entries["tensor"][1:] != entries["tensor"][:-1]
            )
        heads = entries[first]
        done = self.session.stats().total - self._before
        raw = self._native.stats()
        moved = self._slots() != self._slots_before or raw.neurons_expected or raw.experts_expected
        return Trace(
            model=self.session.name,
            tensors=tuple(tensors),
            token=heads["token"].astype(np.int64),
            n_tokens=heads["n_tokens"].astype(np.int64),
            tensor=np.array([number[int(index)] for index in heads["tensor"]], np.int64),
            begin=np.append(np.flatnonzero(first), len(entries)).astype(np.int64),
            record=entries["record"].astype(np.int64),
            uses=entries["uses"].astype(np.int64),
            run=Run(self._slots(), done.hits, done.misses, self._cold and not moved and not self._pinned()),
        )

    def _describe(self) -> list[tuple[TracedTensor, int]]:
        return [
            (
                TracedTensor(
                    name=raw.name.decode(),
                    n_records=raw.n_records,
                    group=raw.group,
                    size_class=raw.size_class,
                    neurons=bool(raw.neurons),
                    record_bytes=raw.record_bytes,
                ),
                raw.n_records,
            )
            for raw in self._traced()
        ]

    def _slots(self) -> dict[int, int]:
        return {raw.size_class: int(raw.n_slots) for raw in self._traced() if raw.n_records}

    def _pinned(self) -> bool:
        return any(raw.n_pinned for raw in self._traced())

    def _traced(self) -> list[bindings.llama_flash_trace_tensor]:
        return self._native.traced_tensors()
