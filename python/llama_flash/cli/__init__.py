"""The command `llama-flash`. One module per command; what they share is in common.py."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import FlashError
from .common import fail, never_fail_to_print
from .later import Group, Later, own, tool

__all__ = ["app", "main"]

# code -> when; docs/reference/cli.md has it, too
EXIT_CODES = {
    "0": "done",
    "1": "an error, in one line on stderr; verify: not the same, or damaged; doctor: a problem; bench: no figures",
    "2": "no such command or option",
    "3": "batch: all requests are answered, some with an error",
    "130": "Ctrl-C",
    "143": "ended by SIGTERM",
    "137": "killed for memory, below cap or --cap, which else end as the command that they ran; so does exec",
}
EPILOG = "Exit codes:  " + "   |   ".join(f"[bold]{code}[/] {when}" for code, when in EXIT_CODES.items())

_RUN, _MACHINE, _FILES = "Run models", "Memory and devices", "Model files"

# the first line of a command's help stands here too, so that the list needs none of them
_COMMANDS = (
    Later("run", "Generate text with flash offload, and print the statistics.", _RUN, own("run"), killed_cleanly=True),
    Later("chat", "Talk with a model.", _RUN, own("chat"), killed_cleanly=True),
    Later(
        "serve",
        "Serve a model to OpenAI's clients, several at the same time: llama.cpp's server, with weights on flash.",
        _RUN,
        own("serve"),
    ),
    Later(
        "batch",
        "Answer a file of requests in OpenAI's batch format, several at the same time, and go on where it was stopped.",
        _RUN,
        own("batch"),
    ),
    Later(
        "bench",
        "Measure how fast a model decodes with flash offload, at several budgets, and over workers if any are named.",
        _RUN,
        own("bench"),
        killed_cleanly=True,
    ),
    Later(
        "worker",
        "Hold layers of a model, with flash and a budget of its own, and compute them for one client at a time.",
        _RUN,
        own("worker"),
    ),
    Later(
        "exec",
        "Run a tool of llama.cpp's (llama-perplexity, -cli, -imatrix, -bench, -quantize) with weights on flash.",
        _RUN,
        own("exec"),
    ),
    Later(
        "top",
        "Show running processes with weights on flash: speed, hit rate, bytes per token, memory, what limits it.",
        _RUN,
        own("top"),
    ),
    Later("prompts", "List, show, drop or verify the prompts whose state is kept on flash.", _MACHINE, own("prompts")),
    Later(
        "trace",
        "Record which experts, or neurons of bundles, each token asked of the cache, for `llama-flash simulate`.",
        _MACHINE,
        own("trace"),
        killed_cleanly=True,
    ),
    Later(
        "simulate",
        "Replay a trace against cache policies: hit rates, and misses in those of Belady's optimum.",
        _MACHINE,
        own("simulate"),
    ),
    Later(
        "plan",
        "Say what loading a model would do: memory, mode, smallest budget, bytes and tokens per second.",
        _MACHINE,
        own("plan"),
    ),
    Later(
        "profile",
        "Measure a device and DRAM in at most 15 seconds, and keep the figures for plans.",
        _MACHINE,
        own("profile"),
    ),
    Later("doctor", "Check whether this machine can do what flash offload needs.", _MACHINE, own("doctor")),
    Later(
        "cap",
        "Run a command in a fresh memory cgroup of LIMIT bytes, page cache counted, and report the peak.",
        _MACHINE,
        own("cap"),
    ),
    Later(
        "draft",
        "Make a copy of a model at few bits that drafts for it: where a dense model has no small sibling.",
        _FILES,
        own("draft"),
        killed_cleanly=True,
    ),
    *(
        Later(name, help, _FILES, tool(name), killed_cleanly=True)
        for name, help in (
            ("convert", "Make a GGUF file of a Hugging Face checkpoint."),
            ("bundle", "Store the feed-forward weights of a ReLU-like model neuron by neuron."),
            ("calibrate", "Fit predictors of active neurons to a flash file, and measure its sparsity."),
            ("reorder", "Store neurons that are needed together next to each other: the same function, fewer reads."),
            ("inspect", "List types and sizes, bundles and predictors, and check the file."),
            ("verify", "Say whether two files hold the same model, neurons in any order (exit status 0), or not (1)."),
            ("unbundle", "Make an ordinary GGUF file of a flash file; predictors are dropped."),
        )
    ),
)
Group.later = {str(command.name): command for command in _COMMANDS}

app = typer.Typer(
    name="llama-flash",
    cls=Group,
    help="Run GGUF models that are larger than memory: weights stay on flash, answers stay the same.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point. Errors that a user can do something about are one line, without a traceback."""
    never_fail_to_print()
    try:
        app()
    except (FlashError, OSError, ValueError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        from ..version import version

        print(f"llama-flash {version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it, exit.")] = False,
) -> None:
    pass
