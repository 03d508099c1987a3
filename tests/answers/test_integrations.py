"""LangChain's and LlamaIndex's own classes take flash_offload, and give the answers of the resident model.

They are large (60 packages), so they are installed by `make test-full` only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

import llama_flash

pytestmark = pytest.mark.full

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
PROMPT = "def read_lines(path):\n"
N_TOKENS, N_CTX, N_BATCH = 32, 256, 64

Answers = tuple[Any, str, str]  # Llama, answer, the same as a stream


def langchain_chat(flash: object) -> Answers:
    from langchain_community.chat_models import ChatLlamaCpp

    llm = ChatLlamaCpp(**_langchain(flash))
    return llm.client, str(llm.invoke(PROMPT).content), "".join(str(piece.content) for piece in llm.stream(PROMPT))


def langchain_completion(flash: object) -> Answers:
    from langchain_community.llms import LlamaCpp

    llm = LlamaCpp(**_langchain(flash))
    return llm.client, llm.invoke(PROMPT), "".join(llm.stream(PROMPT))


def _langchain(flash: object) -> dict[str, Any]:
    options = {"temperature": 0.0, "max_tokens": N_TOKENS, "n_ctx": N_CTX, "n_batch": N_BATCH, "verbose": False}
    return {"model_path": str(SHIPPED), "model_kwargs": {"flash_offload": flash}, **options}


def llama_index(flash: object) -> Answers:
    from llama_index.llms.llama_cpp import LlamaCPP

    llm = LlamaCPP(
        model_path=str(SHIPPED),
        temperature=0.0,
        max_new_tokens=N_TOKENS,
        context_window=N_CTX,
        model_kwargs={"flash_offload": flash, "n_batch": N_BATCH},
        verbose=False,
    )
    stream = "".join(str(piece.delta) for piece in llm.stream_complete(PROMPT))
    return llm._model, llm.complete(PROMPT).text, stream


@pytest.mark.parametrize("ask", [langchain_chat, langchain_completion, llama_index])
def test_flash_offload_is_passed_on(ask: Callable[[object], Answers]) -> None:
    resident, expected, _ = ask(False)
    assert resident.flash is None and len(expected) > 20
    with pytest.raises(llama_flash.FlashBudgetError) as refused:
        llama_cpp.Llama(str(SHIPPED), n_ctx=N_CTX, n_batch=N_BATCH, verbose=False, flash_offload={"dram_budget": 1})
    llm, answer, stream = ask({"dram_budget": refused.value.smallest + (8 << 20)})
    assert answer == stream == expected
    stats = llm.flash.stats()
    assert stats.mode == "flash" and stats.total.bytes_read > 0
    llm.close()
    resident.close()
    gc.collect()

    llm, answer, stream = ask(True)
    assert llm.flash is not None and answer == stream == expected
    llm.close()
