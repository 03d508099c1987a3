"""`llama-flash plan`: what a load would do."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..gguf_meta import read_gguf
from ..options import FlashOffload
from ..placement import KV_TYPES
from .common import DEFAULT_CTX, AsJson, Ctx, DramBudget, Model, Predictor, Window, model_path, stdout

__all__ = ["EPILOG", "plan"]

EPILOG = (
    "Examples:  [bold]llama-flash plan qwen3-30b-a3b-q4_0.gguf --dram-budget 8GiB[/]   |   "
    "[bold]llama-flash plan model.gguf --n-ctx 8192 --type-k q8_0 --json[/]"
)


def plan(
    model: Model = None,
    dram_budget: DramBudget = "auto",
    n_ctx: Ctx = 0,
    n_batch: Annotated[int, typer.Option("--n-batch", min=1, help="Tokens of a prompt computed in one call.")] = 512,
    n_ubatch: Annotated[int, typer.Option("--n-ubatch", min=1, help="Of these, computed at once.")] = 512,
    type_k: Annotated[str, typer.Option("--type-k", help=f"Of the KV cache: {', '.join(KV_TYPES)}.")] = "f16",
    type_v: Annotated[str, typer.Option("--type-v", help="The same, for V.")] = "f16",
    flash_attn: Annotated[bool, typer.Option("--flash-attn", help="As Llama(flash_attn=True).")] = False,
    logits_all: Annotated[bool, typer.Option("--logits-all", help="As Llama(logits_all=True).")] = False,
    what: Annotated[str, typer.Option("--what", help="Weights that go to flash: auto, experts, ffn or all.")] = "auto",
    predictor: Predictor = "auto",
    window: Window = None,
    as_json: AsJson = False,
) -> None:
    """Say what loading a model would do: memory, mode, smallest workable budget, bytes and tokens per second.

    Nothing is loaded. Rates are of the device's profile (llama-flash profile), else of a quick probe of the file.
    """
    from ..plan_view import print_plan
    from ..planner import plan as make

    path = model_path(model)
    trained = read_gguf(path).number("context_length", DEFAULT_CTX)
    options = FlashOffload(dram_budget=dram_budget, what=what, predictor=predictor, window=window)  # type: ignore[arg-type]
    made = make(
        path,
        n_ctx=n_ctx or min(trained, DEFAULT_CTX),
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        type_k=_kv_type("--type-k", type_k),
        type_v=_kv_type("--type-v", type_v),
        flash_attn=flash_attn,
        logits_all=logits_all,
        flash_offload=options,
    )
    if as_json:
        print(json.dumps(made.as_dict()))
    else:
        print_plan(stdout, made)


def _kv_type(option: str, name: str) -> int:
    if name not in KV_TYPES:
        raise ValueError(f"{option}: {name!r} is not one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name]
