"""A batch from its file of requests to its file of answers: what is missing is asked, what comes is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FlashError, FlashWorkerError
from ..model.gguf import GgufMeta, check_vocabulary, read_gguf
from ..model.shape import whole_cells
from ..server.engine_thread import LOOK, Signals
from .advice import parallel_for
from .answers import Answers
from .asking import Asking, Ended, Reply
from .engine import Engine, in_flight
from .order import by_length
from .requests import Request, Requests, prompt_at_most

__all__ = ["BatchSettings", "Job", "Progress"]

_SAMPLES, _SAMPLE = 16, 1 << 16  # of a model file, and bytes of each: what tells it from others


@dataclass(frozen=True)
class BatchSettings:
    """How a batch is computed.

    Attributes:
        parallel: answers computed at the same time; None: see advice.py. Embeddings are always computed one by one.
        n_ctx: tokens of each; None: as many as the longest request needs, up to what the model was trained for.
        seed: of requests that name none.
        flash_offload: options of FlashOffload.
        force: what the file of answers holds is overwritten.
        retry: what ended in an error is asked again.
    """

    model: Path
    parallel: int | None = None
    n_ctx: int | None = None
    threads: int | None = None
    seed: int = 1
    flash_offload: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False
    force: bool = False
    retry: bool = False


@dataclass
class Progress:
    """How far a job is."""

    requests: int = 0  # lines of the input
    found: int = 0  # answers that were there already
    answered: int = 0  # by this run, errors too
    errors: int = 0  # of all that are there
    prompt_tokens: int = 0  # of this run's answers
    completion_tokens: int = 0
    seconds: float = 0.0  # since the model was loaded
    parallel: int = 0
    n_ctx: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Job:
    """One run. `run` is to be called by the main thread.

    Args:
        source: the file of requests; "-": stdin.
        target: the file of answers.
        say: is told what the user should know, a line at a time.
        show: is called with how far it is, ten times a second.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        settings: BatchSettings,
        say: Callable[[str], None],
        show: Callable[[Progress], None],
    ) -> None:
        self._source, self._target, self._settings = source, target, settings
        self._say, self._show = say, show
        self.progress = Progress()
        self._began: float | None = None

    def run(self, stdin: BinaryIO) -> Progress:
        """Until all requests are answered, or SIGINT (then KeyboardInterrupt is raised) or SIGTERM (SystemExit) comes.

        Raises:
            OSError: a file cannot be read or written.
            FlashError, ValueError: see llama_cpp.Llama; the file of answers belongs to another batch.
        """
        settings = self._settings
        meta = read_gguf(settings.model)
        check_vocabulary(meta)
        with ExitStack() as stack:
            file = stack.enter_context(self._opened(stdin))
            requests = Requests(file, str(self._source))
            if not len(requests):
                raise ValueError(f"{self._source}: there are no requests in it")
            how = (_model_hash(meta), _settings_hash(settings))
            answers = stack.enter_context(closing(Answers(self._target, *how, fresh=settings.force)))
            keys = set(requests.keys())
            answers.check(keys, retry=settings.retry)
            self.progress.requests, self.progress.found = len(keys), len(answers.done)
            self.progress.errors = answers.n_errors
            if answers.done:
                self._say(f"{self._target}: {len(answers.done)} of {len(keys)} answers are there")
            answers.begin(retry=settings.retry)
            with Signals() as signals:
                for embeddings in (False, True):
                    if any(True for _ in requests.read(answers.done, embeddings=embeddings)) and not signals.last:
                        self._compute(requests, answers, meta, signals, embeddings=embeddings)
                answers.sync()
                signals.raise_last()
        return self.progress

    def _opened(self, stdin: BinaryIO) -> BinaryIO:
        """The requests, as a file that can be read twice."""
        file: BinaryIO = stdin if str(self._source) == "-" else self._source.open("rb")
        if file is stdin or not file.seekable():
            copy = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
            shutil.copyfileobj(file, copy)
            return copy
        if self._target.exists() and os.path.samestat(os.fstat(file.fileno()), self._target.stat()):
            file.close()
            raise ValueError(f"{self._target}: answers cannot go to the file of requests")
        return file

    def _compute(
        self, requests: Requests, answers: Answers, meta: GgufMeta, signals: Signals, *, embeddings: bool
    ) -> None:
        """All that is missing, embeddings or the rest."""
        settings, progress = self._settings, self.progress
        asked = self._asked(requests.read(answers.done, embeddings=embeddings), answers)
        first = next(asked, None)
        if first is None:  # lines that are wrong need no model
            return
        progress.n_ctx = settings.n_ctx or context_for(meta, requests.context(embeddings=embeddings))
        missing = len(requests) - len(answers.done)
        progress.parallel = settings.parallel or parallel_for(
            settings.model, settings.flash_offload, progress.n_ctx, missing
        )
        if embeddings:  # see EngineSettings.embeddings
            progress.parallel = 1
        self._say(f"loading {settings.model.name} for {progress.parallel} at a time, {progress.n_ctx} tokens each")
        signals.may_wait = False
        engine = Engine(
            settings.model,
            progress.parallel,
            self._say,
            n_ctx=progress.n_ctx,
            threads=settings.threads,
            seed=settings.seed,
            flash_offload=settings.flash_offload,
            verbose=settings.verbose,
            embeddings=embeddings,
            pooling=pooling_for(meta) if embeddings else None,
        )
        signals.may_wait = True
        self._began = self._began or time.monotonic()
        ordered = by_length(_chained(first, asked), lambda each: prompt_at_most(*each[1:]), progress.parallel)
        encoded = ((of, url, json.dumps(body).encode()) for of, url, body in ordered)
        asking = Asking(engine.connect, encoded, in_flight(progress.parallel))
        is_lost = False
        try:
            self._take(asking, answers, engine, signals)
        except FlashWorkerError:
            is_lost = True
            raise
        finally:
            asking.close()
            engine.close()
            for reply in asking.left():  # those that the end has cut short are no answers
                if reply.status == 200 and (signals.last or is_lost):
                    self._write(answers, reply)

    def _take(self, asking: Asking, answers: Answers, engine: Engine, signals: Signals) -> None:
        while not signals.last:
            try:
                reply = asking.take(LOOK)
            except StopIteration:
                return
            except Ended as ended:
                engine.raise_failure()
                raise FlashError(f"the server does not answer: {ended}") from None
            if reply is not None:
                if reply.status != 200:
                    engine.raise_loss()  # it is asked again when the job goes on
                self._write(answers, reply)
            self._tell()

    def _asked(self, requests: Iterator[Request], answers: Answers) -> Iterator[tuple[Any, str, Any]]:
        """What to ask. A line that is wrong is answered here, in its place."""
        for request in requests:
            if request.bad is None:
                yield (request.key, request.custom_id), request.url, request.body
                continue
            message = f"line {request.line}: {request.bad}"
            answers.write(request.key, request.custom_id, None, {"code": request.bad.code, "message": message})
            self.progress.answered += 1
            self.progress.errors += 1

    def _write(self, answers: Answers, reply: Reply) -> None:
        (key, custom_id), progress = reply.of, self.progress
        try:
            body = json.loads(reply.body)
        except ValueError:
            body = {"error": {"message": reply.body.decode(errors="replace"), "type": "server_error"}}
        response = {"status_code": reply.status, "request_id": f"req_{key}", "body": body}
        answers.write(key, custom_id, response, None)
        progress.answered += 1
        progress.errors += reply.status != 200
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            progress.prompt_tokens += usage.get("prompt_tokens", 0)
            progress.completion_tokens += usage.get("completion_tokens", 0)

    def _tell(self) -> None:
        assert self._began is not None
        self.progress.seconds = time.monotonic() - self._began
        self._show(self.progress)


def context_for(meta: GgufMeta, needed: int) -> int:
    """Tokens of each sequence: those needed, or as many as the model was trained for; as the engine rounds them."""
    return whole_cells(min(needed, meta.number("context_length", needed)))


def pooling_for(meta: GgufMeta) -> str | None:
    """How an embedding is made of those of tokens. None: the model file says so."""
    return None if meta.number("pooling_type") else "mean"


def _chained(first: tuple[Any, str, Any], rest: Iterator[tuple[Any, str, Any]]) -> Iterator[tuple[Any, str, Any]]:
    yield first
    yield from rest


def _model_hash(meta: GgufMeta) -> str:
    """Of sizes and of samples of all files, so that a file that was moved is the same, and another one is not."""
    told = hashlib.sha256()
    for path in meta.files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            told.update(size.to_bytes(8, "little"))
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1))
                told.update(file.read(_SAMPLE))
    return told.hexdigest()[:8]


def _settings_hash(settings: BatchSettings) -> str:
    """Of what changes answers, beside the model."""
    said = {"seed": settings.seed, "predictor": settings.flash_offload.get("predictor", "auto")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
