"""A Llama whose prompts are kept on flash, and what it answers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from engines import Logits, Model, tokens

from llama_flash import FlashOffload
from llama_flash.prompts.heads import BLOCK

N_CTX = 1024
PROMPT = tokens(600, seed=3)  # two blocks, and what is computed behind them
ANSWER = 24


def open_model(path: Path, folder: Path | bool, **options: Any) -> Model:
    flash = FlashOffload(prompt_cache=folder if isinstance(folder, bool) else str(folder), follow=False)
    defaults: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 512, "n_threads": 2, "logits_all": True, "verbose": False}
    return Model(str(path), flash_offload=flash, **(defaults | options))


def answer(llm: Model, prompt: list[int], n: int = ANSWER) -> tuple[list[int], Logits]:
    """Tokens of an answer, and the logits of all tokens computed for it but those of the prompt's first blocks."""
    text = list(islice(llm.generate(prompt, temp=0.0), n))
    first = len(prompt) // BLOCK * BLOCK
    return text, np.array(llm.scores[first : llm.n_tokens], copy=True)
