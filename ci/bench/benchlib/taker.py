"""One of those that take turns (turns.py): loads a model once, and computes when it is asked to.

    PYTHONPATH=ci/bench python ci/bench/benchlib/taker.py SPEC.json

Reads a number of tokens per line of its input, computes so many, and answers with the seconds that it took. Ends with
its input. Work "decode": the spec's tokens one after the other, from the beginning again where the context is full.
Work "text": the same with the tokens of the spec's prompts, each context with those that come next. Work "prompt": a
prompt of so many random tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchlib.child import Spec, load

_PREFIX = 16  # tokens of a context that are evaluated together, unmeasured


def main(argv: list[str]) -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a build says of itself is no answer
    spec = Spec(**json.loads(Path(argv[0]).read_text()))
    llm = load(spec)
    turn = _Prompts(llm).turn if spec.work == "prompt" else _Decoding(llm, spec).turn
    print(0.0, file=answers)
    for line in sys.stdin:
        print(turn(int(line)), file=answers)
    llm.close()
    return 0


class _Decoding:
    def __init__(self, llm: Any, spec: Spec) -> None:
        self._llm = llm
        self._contexts = itertools.cycle(_contexts(llm, spec))
        self._left: list[int] = []  # of this one

    def turn(self, n_tokens: int) -> float:
        seconds = 0.0
        for _ in range(n_tokens):
            if not self._left:
                tokens = next(self._contexts)
                self._llm.reset()
                self._llm.eval(tokens[:_PREFIX])
                self._left = tokens[: _PREFIX - 1 : -1]
            started = time.perf_counter()
            self._llm.eval([self._left.pop()])
            seconds += time.perf_counter() - started
        return seconds


def _contexts(llm: Any, spec: Spec) -> list[list[int]]:
    """Tokens of each context, more than the prefix."""
    n_ctx = spec.n_ctx
    if spec.work == "text":
        prompts = json.loads(Path(spec.stream).read_text())
        tokens = [token for prompt in prompts for token in llm.tokenize(prompt.encode(), special=True)]
        cut = [tokens[i : i + n_ctx] for i in range(0, len(tokens), n_ctx)]
        return [context for context in cut if len(context) > _PREFIX]
    if spec.stream:
        return [json.loads(Path(spec.stream).read_text())[:n_ctx]]
    return [np.random.default_rng(1).integers(0, llm.n_vocab(), n_ctx).tolist()]


class _Prompts:
    def __init__(self, llm: Any) -> None:
        self._llm, self._rng = llm, np.random.default_rng(1)

    def turn(self, n_tokens: int) -> float:
        tokens = self._rng.integers(0, self._llm.n_vocab(), n_tokens).tolist()
        self._llm.reset()
        started = time.perf_counter()
        self._llm.eval(tokens)
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
