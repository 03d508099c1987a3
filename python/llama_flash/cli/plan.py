"""`llama-flash plan`: what a load would do.

Long: the options of the command are the parameters of its function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common as c

if TYPE_CHECKING:
    from ..model.gguf import GgufMeta

__all__ = ["EPILOG", "plan"]

EPILOG = (
    "Examples:  [bold]llama-flash plan qwen3-30b-a3b-q4_0.gguf --dram-budget 8GiB[/]   |   "
    "[bold]llama-flash plan model.gguf --parallel 8 --n-ctx 8192 --type-k q8_0 --json[/]"
)


def plan(
    ctx: typer.Context,
    model: c.Model = None,
    dram_budget: c.DramBudget = "auto",
    reserve: c.Reserve = None,
    what: c.What = "auto",
    predictor: c.Predictor = "auto",
    window: c.Window = None,
    lookahead: c.Lookahead = None,
    draft: c.Draft = "off",
    io_engine: c.IoEngine = "auto",
    workers: c.Workers = None,
    worker_token_file: c.WorkerToken = None,
    n_ctx: c.Ctx = 0,
    n_batch: c.NBatch = 512,
    n_ubatch: c.NUbatch = 512,
    type_k: c.TypeK = "f16",
    type_v: c.TypeV = "f16",
    flash_attn: c.FlashAttn = False,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            min=1,
            help="Clients at the same time, with -c tokens each.",
            rich_help_panel="Context",
        ),
    ] = 1,
    logits_all: Annotated[
        bool, typer.Option("--logits-all", help="As Llama(logits_all=True).", rich_help_panel="Context")
    ] = False,
    as_json: c.AsJson = False,
) -> None:
    """Say what loading a model would do: memory, mode, smallest budget, bytes and tokens per second.

    Nothing is loaded. Rates are of the device's profile (llama-flash profile), else of a quick probe of the file.
    """
    if parallel > 1:
        from ..server import engine_server  # noqa: F401  # so that its size is counted
    from ..model.gguf import read_gguf
    from ..planning.planner import plan as make
    from .loading import context_tokens, flash_options, kv_type
    from .plan_view import print_plan

    path = c.model_path(model)
    meta = read_gguf(path)
    if workers is not None:
        _plan_workers(ctx.params, path, meta)
        return
    made = make(
        path,
        n_ctx=context_tokens(meta, n_ctx),
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        type_k=kv_type("--type-k", type_k),
        type_v=kv_type("--type-v", type_v),
        flash_attn=flash_attn,
        logits_all=logits_all,
        parallel=parallel,
        flash_offload=flash_options(ctx.params),
    )
    if as_json:
        c.print_json(made.as_dict())
    else:
        print_plan(c.stdout, made)


def _plan_workers(params: Mapping[str, Any], path: Path, meta: GgufMeta) -> None:
    from ..model.shape import context_shape
    from ..workers.planned import plan_workers
    from .loading import context_tokens, flash_options, kv_type
    from .plan_view import print_divided

    shape = context_shape(
        meta,
        context_tokens(meta, params["n_ctx"]),
        params["n_batch"],
        params["n_ubatch"],
        kv_type("--type-k", params["type_k"]),
        kv_type("--type-v", params["type_v"]),
        params["logits_all"],
        params["flash_attn"],
        params["parallel"],
        n_drafted=0,
    )
    made = plan_workers(path, flash_options(params), shape)
    if params["as_json"]:
        c.print_json(made.as_dict())
    else:
        print_divided(c.stdout, made)
