"""Stock against flash offload, for tiny models of many architectures, in processes of their own.

An assertion of the engine ends a process. So a worker measures one architecture after the other and says so line by
line; when it dies, the one at hand is the culprit, and another worker goes on with the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import architectures
import gguf
import numpy as np
import numpy.typing as npt

PROMPT = 24  # tokens: more than 16, so that experts stream through the ring
DECODED = 18  # tokens, one by one
_SHARE = 0.25  # memory for flash tensors above the least that works, as a share of their size
_PATIENCE = 300  # seconds for one architecture: the machine may be busy

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    arch: str
    ftype: str = "q8_0"
    variant: str = ""  # one of architectures.VARIANTS
    altered: str = ""  # name of a weight that gets other bytes before the run with flash offload

    def __str__(self) -> str:
        return "-".join(filter(None, (self.arch, self.variant, self.ftype, "altered" * bool(self.altered))))


@dataclass(frozen=True)
class Outcome:
    """What was seen; all zero where `error` says why nothing was."""

    case: Case
    error: str = ""
    rows: int = 0  # of logits or embeddings, one for each token
    different: int = 0  # rows that are not bit for bit those of the stock run
    finite: bool = False
    answers: int = 0  # rows whose largest value is at another place than all others'
    weight_bytes: int = 0  # of all tensors in the file
    resident_bytes: int = 0  # of these, in memory whatever is done
    resident: tuple[str, ...] = ()  # names of the largest weights that stay in memory
    expert_bytes: int = 0  # on flash
    bytes_read: int = 0
    expert_misses: int = 0
    evictions: int = 0
    panel_reads: int = 0

    @property
    def share(self) -> float:
        """Of the weights, what stays in memory."""
        return self.resident_bytes / self.weight_bytes if self.weight_bytes else 1.0

    @property
    def flash_bytes(self) -> int:
        return self.weight_bytes - self.resident_bytes


def run_all(cases: Sequence[Case]) -> list[Outcome]:
    """Runs the cases in workers; never raises for what goes wrong in one."""
    left, outcomes = list(cases), []
    while left:
        done = list(_run(left))
        outcomes += done
        left = left[len(done) :]
    return outcomes


def _run(cases: Sequence[Case]) -> Iterator[Outcome]:
    """Outcomes of as many cases as one worker manages; of the one that it dies of, too."""
    command = [sys.executable, __file__, json.dumps([asdict(case) for case in cases])]
    environment = {**os.environ, "LLAMA_FLASH_WARM_START": "0", "GGML_NO_BACKTRACE": "1"}
    n_done = 0
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=noise) as worker,
    ):
        assert worker.stdout is not None
        guard = Timer(_PATIENCE, worker.kill)
        guard.start()
        for line in worker.stdout:
            guard.cancel()
            fields = json.loads(line)
            yield Outcome(**{**fields, "case": Case(**fields["case"])})
            n_done += 1
            guard = Timer(_PATIENCE, worker.kill)
            guard.start()
        guard.cancel()
        worker.wait()
        if n_done < len(cases):
            noise.seek(0)
            said = [text for text in noise.read().splitlines() if text.strip()]
            why = next((text for text in said if "GGML_ASSERT" in text or "rror" in text), said[-1] if said else "")
            if worker.returncode == -signal.SIGKILL:
                why = f"no answer within {_PATIENCE} s, or killed"
            yield Outcome(cases[n_done], error=f"the process ended with {worker.returncode}: {why}")


def _measure(case: Case, folder: Path) -> Outcome:
    from engines import open_flash, open_resident

    path = architectures.write(case.arch, folder / f"{case}.gguf", case.ftype, case.variant)
    try:
        passes = _PASSES.get(case.arch, _logits)
        options: dict[str, Any] = {"n_ctx": 64, "n_batch": 64, "n_ubatch": 64}
        if passes in (_embeddings, _encoded_only):
            options |= {"logits_all": False, "embedding": True, "pooling_type": 0}
        with architectures.engine_messages() as said:
            with open_resident(path, **options) as llm:
                expected = passes(llm)
            if case.altered:
                _alter(path, case.altered)
            with open_flash(path, what="all", share=_SHARE, **options) as llm:
                actual = passes(llm)
                plan, total = llm.flash.plan, llm.flash.stats().total
                on_flash = {tensor.name for tensor in plan.tensors}
                weights = llm.flash.meta.tensors.values()
        if actual.shape != expected.shape:
            raise ValueError(f"{actual.shape} values with flash offload, {expected.shape} without; {said}")
        different = (actual.view(np.uint32) != expected.view(np.uint32)).any(axis=1)
        resident = sorted((t for t in weights if t.name not in on_flash), key=lambda tensor: -tensor.size)
        return Outcome(
            case,
            rows=len(expected),
            different=int(different.sum()),
            finite=bool(np.isfinite(expected).all()),
            answers=len(np.unique(expected.argmax(axis=1))),
            weight_bytes=sum(tensor.size for tensor in weights),
            resident_bytes=plan.resident_bytes,
            resident=tuple(tensor.name for tensor in resident[:4]),
            expert_bytes=plan.expert_bytes,
            bytes_read=total.bytes_read,
            expert_misses=total.misses,
            evictions=total.evictions,
            panel_reads=total.panel_reads,
        )
    finally:
        path.unlink()


def _alter(path: Path, name: str) -> None:
    """Gives each row of a matrix the bytes of the one before it."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    row = int(tensor.n_bytes) // int(np.prod(tensor.shape[1:]))
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        data = file.read(int(tensor.n_bytes))
        file.seek(int(tensor.data_offset))
        file.write(data[-row:] + data[:-row])


def _logits(llm: Any) -> Floats:
    """Of a prompt, then of tokens one by one: [tokens, vocabulary]."""
    from engines import logits_of, tokens

    n_vocab = architectures.N_VOCAB
    return logits_of(llm, tokens(PROMPT, n_vocab, seed=1), tokens(DECODED, n_vocab, seed=2))


def _embeddings(llm: Any) -> Floats:
    """Of the tokens of several texts, without pooling: [tokens, n_embd]."""
    return np.concatenate([_encoded(llm, n, llm._ctx.decode) for n in (PROMPT, 1, 3, 16, 17, 1)])


def _encoded(llm: Any, n_tokens: int, call: Callable[[Any], None]) -> Floats:
    from engines import tokens
    from llama_cpp import llama_cpp

    llm._ctx.kv_cache_clear()
    llm._batch.reset()
    llm._batch.add_sequence(tokens(n_tokens, architectures.N_VOCAB, seed=n_tokens), 0, True)
    call(llm._batch)
    llm._batch.reset()
    values = llama_cpp.llama_get_embeddings(llm._ctx.ctx)
    width = llm.n_embd()
    if not values:
        values, width = llm._ctx.get_logits(), llm.n_vocab()
    return np.array(np.ctypeslib.as_array(values, shape=(n_tokens, width)), copy=True)


def _encoded_only(llm: Any) -> Floats:
    return np.concatenate([_encoded(llm, n, llm._ctx.encode) for n in (PROMPT, 1, 3, 16, 17, 1)])


def _translated(llm: Any) -> Floats:
    """Logits of tokens decoded one by one, then of a prompt, behind an encoded text: [tokens, vocabulary]."""
    from engines import tokens

    llm._batch.set_batch(batch=tokens(PROMPT, architectures.N_VOCAB, seed=3), n_past=0, logits_all=True)
    llm._ctx.encode(llm._batch)
    return _logits(llm)


_ENCODERS = """
    bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding llama-embed
"""
_WITHOUT_CACHE = "dream llada llada-moe rnd1 wavtokenizer-dec"  # whole texts at once, too: diffusion, sound
_PASSES: dict[str, Callable[[Any], Floats]] = {
    **dict.fromkeys(_ENCODERS.split(), _embeddings),
    **dict.fromkeys(_WITHOUT_CACHE.split(), _embeddings),
    "t5encoder": _encoded_only,
    "t5": _translated,
}


def compared(arch: str) -> str:
    """What is compared of an architecture, in words."""
    kinds = {_logits: "logits", _translated: "logits, behind an encoder", _encoded_only: "embeddings"}
    return kinds.get(
        _PASSES.get(arch, _logits), "embeddings" if arch in _ENCODERS.split() else "outputs of whole texts"
    )


def _work(cases: list[Case]) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the reader of our lines
    with tempfile.TemporaryDirectory(prefix="llama-flash-test-") as folder:
        os.environ["LLAMA_FLASH_CACHE"] = folder
        for case in cases:
            try:
                outcome = _measure(case, Path(folder))
            except Exception as error:
                outcome = Outcome(case, error=f"{type(error).__name__}: {error}")
            print(json.dumps(asdict(outcome)), file=out, flush=True)


if __name__ == "__main__":
    _work([Case(**fields) for fields in json.loads(sys.argv[1])])
