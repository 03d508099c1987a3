"""A model that answers with drafts or without, for drafts.py: one request per line of its input, one answer per line.

    PYTHONPATH=ci/bench python ci/bench/benchlib/draft_child.py SPEC.json

A request is an object: `prompt`, `tokens` (of the answer), `temperature`, `seed`, and `forced`, the text that is said
in place of what the model would say ("": none). The answer has the tokens, the seconds behind the first one, and the
drafts: drafted, taken, seconds of the pass and of drafting, and how long passes with each number of tokens have taken.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine says is no answer
    spec = json.loads(Path(argv[0]).read_text())
    import llama_cpp

    import llama_flash

    llm = llama_cpp.Llama(
        spec["model"],
        n_ctx=spec["n_ctx"],
        n_batch=spec["n_ubatch"],
        n_ubatch=spec["n_ubatch"],
        n_threads=2,
        n_threads_batch=2,
        verbose=False,
        flash_offload=llama_flash.FlashOffload(**spec["flash"]),
    )
    print(json.dumps({"loaded": llm.flash.summary}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_answer(llm, json.loads(line))), file=answers)
    llm.close()
    return 0


def _answer(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    prompt = llm.tokenize(request["prompt"].encode(), special=True)
    forced = llm.tokenize(request["forced"].encode(), add_bos=False) if request["forced"] else []
    said: list[int] = []

    def force(_: Any, logits: Any) -> Any:
        logits[:] = -1.0
        logits[forced[len(said)]] = 1.0
        return logits

    llm.set_seed(request["seed"])
    n_tokens = min(request["tokens"], len(forced) - 1) if forced else request["tokens"]
    drafter = llm.flash.drafter
    known = len(drafter.last) if drafter else 0
    before = llm.flash.stats()
    widths: dict[int, list[float]] = {}
    if drafter:
        passed = drafter.passed

        def noted(n: int, seconds: float) -> bool:
            if said:
                widths.setdefault(n, []).append(seconds)
            return bool(passed(n, seconds))

        drafter.passed = noted
    started = 0.0
    tokens = llm.generate(prompt, temp=request["temperature"], logits_processor=[force] if forced else None)
    for token in tokens:
        said.append(token)
        if len(said) == 1:
            started = time.perf_counter()
        if len(said) > n_tokens or token == llm.token_eos():
            break
    seconds = time.perf_counter() - started
    tokens.close()
    if drafter:
        drafter.passed = passed
    after = llm.flash.stats()
    return {
        "tokens": said,
        "seconds": seconds,
        "drafts": after.drafts.since(before.drafts).as_dict(),
        "bytes": (after.total - before.total).bytes_read,
        "last": list(drafter.last)[known:] if drafter else [],
        "widths": widths,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
