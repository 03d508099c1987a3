"""Many prompts from Python: `llama_flash.complete_many`."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import FlashError, FlashReadError, FlashWorkerError
from ..model.gguf import read_gguf
from ..options import FlashOffload
from ..server.engine_server import completed
from ..server.engine_settings import EngineSettings
from .advice import parallel_for
from .asking import Asking, Ended, Reply
from .engine import Engine, in_flight
from .order import by_length
from .requests import CHAT, COMPLETIONS, prompt_at_most

__all__ = ["Completion", "Completions", "complete_many"]


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt."""

    index: int  # of the prompt, from 0 on
    text: str  # "" where there was an error
    response: Mapping[str, Any]  # as OpenAI's: choices, usage
    error: str | None = None  # why there is no answer


class Completions(Iterator[Completion]):
    """Answers as they end. Several threads may take them; each goes to one.

    `close`, the end of a `with` statement, and an iterator that nobody has any more end what is computed, and free the
    model's memory where it was loaded for this.
    """

    def close(self) -> None:
        """Waits until the memory is free. Harmless when repeated. Whoever waits for an answer gets none."""
        raise NotImplementedError

    def __enter__(self) -> Completions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def complete_many(
    model: str | os.PathLike[str] | Any,
    prompts: Iterable[str | Sequence[Mapping[str, Any]]],
    *,
    parallel: int | Literal["auto"] = "auto",
    n_ctx: int | None = None,
    n_threads: int | None = None,
    flash_offload: bool | Mapping[str, Any] | FlashOffload = True,
    **sampling: Any,
) -> Completions:
    """Answers many prompts, several at the same time. Which is which says each answer's `index`.

    A path is loaded, with weights on flash, and freed when the last answer was taken. An open `llama_cpp.Llama`
    computes one answer after the other, in the thread that takes it, and stays open.

    Args:
        model: GGUF file, or its first shard; or an open `Llama`.
        prompts: texts to continue, or lists of messages ({"role": ..., "content": ...}) to answer. Those of a list are
            computed with others of like length, which takes less. Others are taken as they are needed, a few more
            than are computed, by the threads that take answers.
        parallel: answers computed at the same time; "auto": as many as bring the most tokens, by the plan.
        n_ctx: tokens of each prompt with its answer; None: 2048, or fewer if the model was trained so.
        n_threads: that compute; None: as many as may run.
        flash_offload: True, or options as `Llama` takes them.
        sampling: of each request, as OpenAI names it: max_tokens, temperature, top_p, seed, stop, ...

    Raises:
        FlashError: a server runs in this process already; while answers are taken: it has ended.
        FlashWorkerError: a worker cannot be used; while answers are taken: it was lost. Prompts that had no answer by
            then have none.
        FlashFormatError, FlashBudgetError, OSError: see `Llama`.
        ValueError, TypeError: an option that makes no sense.
    """
    if parallel != "auto" and (isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1):
        raise ValueError(f"parallel: {parallel!r} is neither 'auto' nor a whole number from 1 on")
    if sampling.get("stream"):
        raise ValueError("stream: answers come as a whole")
    bodies = ((index, *_body(index, prompt, sampling)) for index, prompt in enumerate(prompts))
    if not isinstance(model, str | os.PathLike):
        if parallel not in ("auto", 1):
            raise ValueError("parallel: an open Llama computes one answer at a time: give its model's path")
        if n_ctx is not None or n_threads is not None or flash_offload is not True:
            raise ValueError("n_ctx, n_threads, flash_offload: an open Llama has its own")
        return _OneByOne(model, bodies)
    options = FlashOffload.coerce(flash_offload)
    if options is None:
        raise ValueError("flash_offload: True or options are expected")
    return _Together(Path(model), bodies, options, parallel, n_ctx, n_threads, all_there=isinstance(prompts, Sequence))


def _body(index: int, prompt: object, sampling: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a request. Raises TypeError for what is no prompt."""
    if isinstance(prompt, str):
        return COMPLETIONS, {**sampling, "prompt": prompt}
    if isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
        return CHAT, {**sampling, "messages": list(map(dict, prompt))}
    raise TypeError(f"prompts: number {index} is neither text nor a list of messages: {prompt!r:.80}")


def _text_of(response: Mapping[str, Any]) -> str:
    (choice, *_) = response["choices"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text or ""


class _OneByOne(Completions):
    """On a `Llama` of the caller's."""

    def __init__(self, llm: Any, bodies: Iterator[tuple[int, str, dict[str, Any]]]) -> None:
        self._llm, self._bodies = llm, bodies
        self._turn = threading.Lock()
        self._closed = False

    def __next__(self) -> Completion:
        with self._turn:
            if self._closed:
                raise StopIteration
            index, path, body = next(self._bodies)
            ask = self._llm.create_chat_completion if path == CHAT else self._llm.create_completion
            try:
                response = ask(**body)
            except (ValueError, FlashReadError) as error:  # what was asked cannot be answered, the next may be
                return Completion(index, "", {}, str(error))
            return Completion(index, _text_of(response), response)

    def close(self) -> None:
        self._closed = True


class _Together(Completions):
    """By a server in this process, which is loaded for it."""

    def __init__(
        self,
        model: Path,
        bodies: Iterator[tuple[int, str, dict[str, Any]]],
        options: FlashOffload,
        parallel: int | Literal["auto"],
        n_ctx: int | None,
        n_threads: int | None,
        *,
        all_there: bool,
    ) -> None:
        flash = {name: getattr(options, name) for name in options.__dataclass_fields__}
        if parallel == "auto":
            tokens = completed(EngineSettings(model, n_ctx=n_ctx), read_gguf(model)).n_ctx or 0
            parallel = parallel_for(model, flash, tokens)
        engine = Engine(model, parallel, lambda line: None, n_ctx=n_ctx, threads=n_threads, flash_offload=flash)
        if all_there:
            bodies = by_length(bodies, lambda each: prompt_at_most(each[1], each[2]), parallel)
        requests = ((index, path, json.dumps(body).encode()) for index, path, body in bodies)
        self._asking = Asking(engine.connect, requests, in_flight(parallel))
        self._engine = engine
        # when nobody has it any more, and at the interpreter's end
        self._end = weakref.finalize(self, _close, os.getpid(), self._asking, engine)

    def __next__(self) -> Completion:
        try:
            reply = self._asking.take()
        except Ended as ended:
            if not self._end.alive:
                raise StopIteration from None
            self.close()
            self._engine.raise_failure()
            raise FlashError(f"the server does not answer: {ended}") from None
        except BaseException:  # there are no more, or the prompts have raised
            self.close()
            raise
        assert reply is not None
        if reply.status != 200:
            self._raise_loss()
        return _completion(reply)

    def _raise_loss(self) -> None:
        try:
            self._engine.raise_loss()
        except FlashWorkerError:
            self.close()
            raise

    def close(self) -> None:
        self._end()


def _close(process: int, asking: Asking, engine: Engine) -> None:
    if process == os.getpid():  # a forked child has neither threads nor model
        asking.close()
        engine.close()


def _completion(reply: Reply) -> Completion:
    response = json.loads(reply.body)
    if reply.status == 200:
        return Completion(reply.of, _text_of(response), response)
    return Completion(reply.of, "", response, response.get("error", {}).get("message", f"status {reply.status}"))
