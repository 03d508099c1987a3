"""`llama-flash chat`: a conversation in the terminal, or line by line from a pipe.

Long: the options of the command are the parameters of its function.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FlashError, FlashReadError
from ..model.gguf import check_vocabulary, read_gguf
from ..sizes import format_size
from . import common as c
from .again import cap_bytes, command_line, run_again_capped
from .answer_view import AnswerView, Meter
from .conversation import Conversation
from .loading import context_tokens, flash_options, open_model, print_statistics, print_workers

__all__ = ["EPILOG", "chat"]

EPILOG = (
    "Examples:  [bold]llama-flash chat qwen3-30b-a3b-q4_0.gguf --cap 8GiB[/]   |   "
    "[bold]echo 'Why is the sky blue?' | llama-flash chat model.gguf --json[/]"
)

_HELP = """\
/stats          what was read so far, and where the memory is
/budget SIZE    another DRAM budget: a size, a share of the model file, or auto
/system TEXT    what the model is told before everything else; without TEXT: nothing
/clear          forget what was said
/quit           end; so does Ctrl-D
A line that ends in \\ goes on in the next one; // at its beginning stands for a / that is no command.
Ctrl-C stops an answer."""


def chat(
    ctx: typer.Context,
    model: c.Model = None,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before everything else.")
    ] = None,
    n_tokens: Annotated[
        int,
        typer.Option(
            "-n", "--tokens", min=0, help="Of an answer, most. 0: until the model ends it.", rich_help_panel="Text"
        ),
    ] = 0,
    temperature: c.Temperature = 0.7,
    seed: c.Seed = 1,
    cap: c.Cap = None,
    dram_budget: c.DramBudget = "auto",
    reserve: c.Reserve = None,
    what: c.What = "auto",
    predictor: c.Predictor = "auto",
    window: c.Window = None,
    lookahead: c.Lookahead = None,
    draft: c.Draft = "off",
    follow: c.Follow = True,
    warm_start: c.WarmStart = True,
    io_engine: c.IoEngine = "auto",
    workers: c.Workers = None,
    worker_token_file: c.WorkerToken = None,
    prompt_cache: c.PromptCache = False,
    prompt_cache_dir: c.PromptCacheDir = None,
    prompt_cache_size: c.PromptCacheSize = "8GiB",
    n_ctx: c.Ctx = 0,
    n_batch: c.NBatch = 512,
    n_ubatch: c.NUbatch = 512,
    type_k: c.TypeK = "f16",
    type_v: c.TypeV = "f16",
    flash_attn: c.FlashAttn = False,
    threads: c.Threads = 0,
    as_json: c.AsJson = False,
    verbose: c.Verbose = False,
) -> None:
    """Talk with a model.

    Without a terminal each line of the input is answered. Without MODEL.gguf the small model that comes with the
    package is used, which continues Python and knows no conversation.
    """
    system = None if system is None else c.utf8("--system", system)
    path = c.model_path(model)
    meta = read_gguf(path)
    check_vocabulary(meta)
    options = flash_options(ctx.params)
    if cap is not None:
        command = command_line(ctx, model=path, cap=None)
        raise typer.Exit(run_again_capped(cap_bytes(cap, meta, context_tokens(meta, n_ctx)), command, as_json))
    llm = open_model(path, meta, ctx.params, options)
    conversation = Conversation(llm, system=system, n_tokens=n_tokens, temperature=temperature, seed=seed)
    try:
        chatting = _Chat(path, conversation, as_json)
        chatting.run()
        if as_json:
            c.print_json(chatting.report())
    finally:
        llm.close()


class _Chat:
    """Reads, answers, obeys."""

    def __init__(self, path: Path, conversation: Conversation, as_json: bool) -> None:
        self._path, self._conversation, self._as_json = path, conversation, as_json
        self._session = conversation.llm.flash
        self._typed = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
        self._turns: list[dict[str, Any]] = []

    def run(self) -> None:
        """Until the input ends.

        Raises:
            KeyboardInterrupt: a Ctrl-C that does not come from the terminal in which is typed.
        """
        if isinstance(sys.stdin, io.TextIOWrapper):
            # files and pipes are UTF-8 whatever the locale says, a terminal where the locale does not know
            knows = self._typed and codecs.lookup(sys.stdin.encoding).name != "ascii"
            sys.stdin.reconfigure(encoding=sys.stdin.encoding if knows else "utf-8", errors="surrogateescape")
        if self._typed:
            with contextlib.suppress(ImportError):  # a Python without it: lines are typed without editing
                import readline  # noqa: F401  # input() uses it
            _note("/help lists what can be typed; Ctrl-C stops an answer, Ctrl-D ends")
        if not self._conversation.templated:
            _note("the model has no chat template: what is typed is continued as plain text")
        while (line := self._read()) is not None:
            try:
                line = c.utf8("this line is not asked", line)
            except ValueError as error:
                _problem(error)
                continue
            if line.startswith("/") and not line.startswith("//"):
                if not self._obey(line):
                    return
            elif line.strip():
                self._answer(line[1:] if line.startswith("//") else line)

    def report(self) -> dict[str, Any]:
        """What was said, for JSON."""
        return {
            "model": str(self._path),
            "chat_template": self._conversation.templated,
            "system": self._conversation.system,
            "turns": self._turns,
            "flash": self._session.stats().as_dict(),
        }

    def _read(self) -> str | None:
        """A line, or several that belong together; None at the end."""
        lines: list[str] = []
        while True:
            try:
                lines.append(self._line("... " if lines else "> "))
            except EOFError:
                return "\n".join(lines) or None
            except KeyboardInterrupt:
                if not self._typed:
                    raise
                print()
                _note("Ctrl-D or /quit ends")
                lines.clear()
                continue
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]

    def _line(self, prompt: str) -> str:
        if self._typed:
            try:
                return input(prompt)
            except EOFError:
                print()
                raise
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _answer(self, question: str) -> None:
        conversation, meter = self._conversation, Meter(self._session)
        forgotten, interrupted = conversation.forgotten, False
        pieces: list[str] = []
        view = AnswerView(c.stdout, meter) if self._typed else None
        answer = conversation.ask(question)
        started = time.perf_counter()
        try:
            with contextlib.closing(answer), view or contextlib.nullcontext():
                try:
                    for piece in answer:
                        meter.piece()
                        pieces.append(piece)
                        if view:
                            view.piece(piece)
                        elif not self._as_json:
                            print(piece, end="", flush=True)
                except KeyboardInterrupt:
                    if not self._typed:
                        raise
                    interrupted = True
        except (FlashReadError, ValueError) as error:
            _problem(error)
            return
        if not self._typed and not self._as_json:
            print(flush=True)
        if conversation.forgotten > forgotten:
            _note(f"the context is full: {conversation.forgotten} exchanges are forgotten by now")
        self._turns.append(
            {
                "user": question,
                "assistant": "".join(pieces),
                "interrupted": interrupted,
                "seconds": time.perf_counter() - started,
                "seconds_to_first_token": meter.seconds_to_first_token,
                "tokens_per_second": meter.tokens_per_second,
                "decode": meter.tokens.as_dict(),
            }
        )

    def _obey(self, line: str) -> bool:
        """Whether to go on."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            c.stderr.print(_HELP, markup=False, soft_wrap=True)
        elif command == "/stats":
            print_statistics(self._session.stats(), self._path.name)
            if workers := self._session.worker_stats():
                print_workers(workers)
        elif command == "/clear":
            self._conversation.clear()
            _note("forgotten")
        elif command == "/system":
            self._conversation.system = rest or None
            _note("the model is told so from now on" if rest else "the model is told nothing from now on")
        elif command == "/budget":
            self._set_budget(rest)
        else:
            _problem(f"{command} is not known; /help lists what is")
        return True

    def _set_budget(self, size: str) -> None:
        if not size:
            _problem("/budget SIZE: a size such as 2GiB, a share such as 50%, or auto")
            return
        try:
            self._session.set_budget(size)
        except (FlashError, ValueError) as error:
            _problem(error)
            return
        stats = self._session.stats()
        _note(f"budget {format_size(stats.budget.total)} ({stats.budget.reason}): {stats.memory}")


def _note(text: str) -> None:
    c.stderr.print(text, style="dim", markup=False, soft_wrap=True)


def _problem(what: object) -> None:
    c.stderr.print(str(what), style="red", markup=False, soft_wrap=True)
