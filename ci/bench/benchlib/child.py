"""Loads a model in one mode, runs it, and writes what it measured as JSON. Run by runs.py, one process per run.

    python ci/bench/benchlib/child.py SPEC.json

Modes: naive (stock, mmap, not repacked), flash (flash_offload), cached (the same with all of it in DRAM), resident
(stock with its defaults), single (flash, where another run beside it has drafts). Work: decode (forced tokens), prompt,
generate (text), chat (an answer), first (load, prompt, one token), copy (an answer that repeats most of its prompt,
with drafts of a prompt lookup if `draft`), text (greedy answers to real prompts one after the other, with such drafts
if `draft`).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import re
import resource
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Mode = Literal["naive", "flash", "cached", "resident", "single"]
Work = Literal["decode", "prompt", "generate", "chat", "first", "copy", "text"]

FLASH_MODES = ("flash", "cached", "single")


@dataclass(frozen=True)
class Spec:
    model: str
    mode: Mode
    work: Work
    out: str  # file that gets the measurement
    n_threads: int = 2
    n_ctx: int = 1024
    n_ubatch: int = 512
    warm_up: int = 128  # tokens decoded before the clock starts
    warm_prompts: int = 3  # work "prompt": prompts before the one that counts
    tokens: int = 128  # tokens decoded, or the prompt's length
    max_seconds: float = 30.0  # for the warm-up, and again for the measurement
    min_tokens: int = 8
    prompt: str = ""  # work "generate": what comes before; "chat": the question
    draft: int = 0  # works "copy" and "text": tokens of a draft
    answers: bool = False  # work "decode": keep the likeliest next token of each, warm-up included
    # a JSON list. Work "decode": the tokens to decode; none: random ones. Work "text": the prompts, as text
    stream: str = ""
    per_prompt: int = 32  # work "text": tokens of an answer
    flash: dict[str, Any] = field(default_factory=dict)  # options of FlashOffload


def main(argv: list[str]) -> int:
    spec = Spec(**json.loads(Path(argv[0]).read_text()))
    started = time.perf_counter()
    llm = load(spec)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    works = {"decode": _decode, "prompt": _prompt, "generate": _generate, "chat": _chat, "first": _first, "copy": _copy}
    works["text"] = _text
    result |= works[spec.work](llm, spec)
    result["n_threads"] = spec.n_threads
    result["max_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if spec.mode in FLASH_MODES:
        result["flash"] = llm.flash.stats().as_dict()
        result["io_depth"] = llm.flash.io_depth
    Path(spec.out).write_text(json.dumps(result, default=str))
    llm.close()
    return 0


def load(spec: Spec) -> Any:
    import llama_cpp

    options: dict[str, Any] = {}
    if spec.draft:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        options["draft_model"] = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=spec.draft)
    if spec.mode in FLASH_MODES:
        import llama_flash

        options["flash_offload"] = llama_flash.FlashOffload(**spec.flash)
    elif spec.mode == "naive":
        _without_repacking()
    return llama_cpp.Llama(
        spec.model,
        n_ctx=spec.n_ctx,
        n_batch=spec.n_ubatch,
        n_ubatch=spec.n_ubatch,
        n_threads=spec.n_threads,
        n_threads_batch=spec.n_threads,
        verbose=False,
        **options,
    )


def _without_repacking() -> None:
    """Keeps the weights in the page cache: repacked ones are anonymous memory, which a cap below their size kills."""
    from llama_cpp import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def unpacked() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = unpacked


def _decode(llm: Any, spec: Spec) -> dict[str, Any]:
    """Decodes a fixed stream of tokens, random ones by default: the same in all modes, and no loops as sampling has."""
    n_tokens = min(16 + spec.warm_up + spec.tokens, spec.n_ctx)
    if spec.stream:
        stream = json.loads(Path(spec.stream).read_text())[:n_tokens]
    else:
        stream = np.random.default_rng(1).integers(0, llm.n_vocab(), n_tokens).tolist()
    llm.eval(stream[:16])
    answers: list[int] = []
    warm = _timed_tokens(llm, stream[16 : 16 + spec.warm_up], spec, answers)
    before = _counters(llm, spec)
    start = 16 + len(warm)
    seconds = _timed_tokens(llm, stream[start : start + spec.tokens], spec, answers)
    return {
        "answers": answers,
        "tokens": len(seconds),
        "warm_up_tokens": len(warm),
        "seconds": sum(seconds),
        "tok_s": len(seconds) / sum(seconds),
        "median_token_seconds": float(np.median(seconds)),
        "slowest_token_seconds": max(seconds),
        **_since(before, llm, spec, len(seconds), sum(seconds)),
    }


def _timed_tokens(llm: Any, tokens: list[int], spec: Spec, answers: list[int]) -> list[float]:
    """Seconds of each token, until max_seconds have passed. answers: the likeliest tokens are added, if wanted."""
    seconds: list[float] = []
    for token in tokens:
        if len(seconds) >= spec.min_tokens and sum(seconds) > spec.max_seconds:
            break
        started = time.perf_counter()
        llm.eval([token])
        seconds.append(time.perf_counter() - started)
        if spec.answers:
            logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))
            answers.append(int(logits.argmax()))
    return seconds


def _prompt(llm: Any, spec: Spec) -> dict[str, Any]:
    """Evaluates a prompt of spec.tokens after others of the same length have warmed the model up.

    One is not enough: while slots are still filled, a virtual machine may have to ask its host for each of their pages.
    """
    rng = np.random.default_rng(1)
    *warm, prompt = (rng.integers(0, llm.n_vocab(), spec.tokens).tolist() for _ in range(spec.warm_prompts + 1))
    started = time.perf_counter()
    llm.eval(warm[0])
    first = time.perf_counter() - started
    for other in warm[1:]:
        llm.reset()
        llm.eval(other)
    llm.reset()
    before = _counters(llm, spec)
    started = time.perf_counter()
    llm.eval(prompt)
    seconds = time.perf_counter() - started
    return {
        "tokens": len(prompt),
        "seconds": seconds,
        "tok_s": len(prompt) / seconds,
        "first_prompt_seconds": first,
        **_since(before, llm, spec, len(prompt), seconds),
    }


def _generate(llm: Any, spec: Spec) -> dict[str, Any]:
    """Generates text, and prints it as it comes."""
    print(spec.prompt, end="", flush=True)
    chunks = llm(spec.prompt, max_tokens=spec.tokens, temperature=0.7, seed=3, stream=True)
    return _printed(llm, spec, (chunk["choices"][0]["text"] for chunk in chunks))


def _chat(llm: Any, spec: Spec) -> dict[str, Any]:
    """Answers one question with the model's own chat template, and prints the answer as it comes."""
    question = [{"role": "user", "content": spec.prompt}]
    chunks = llm.create_chat_completion(question, max_tokens=spec.tokens, temperature=0.0, stream=True)
    return _printed(llm, spec, (chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks))


def _printed(llm: Any, spec: Spec, pieces: Iterable[str]) -> dict[str, Any]:
    before = _counters(llm, spec)
    started = time.perf_counter()
    n_tokens = 0
    for piece in pieces:
        print(piece, end="", flush=True)
        n_tokens += bool(piece)
    print()
    seconds = time.perf_counter() - started
    return {
        "tokens": n_tokens,
        "seconds": seconds,
        "tok_s": n_tokens / seconds,
        **_since(before, llm, spec, max(n_tokens, 1), seconds),
    }


def _first(llm: Any, spec: Spec) -> dict[str, Any]:
    """The load has just ended: evaluates a prompt and samples one token. Nothing has been read before."""
    prompt = np.random.default_rng(1).integers(0, llm.n_vocab(), spec.tokens).tolist()
    started = time.perf_counter()
    llm.eval(prompt)
    llm.sample(temp=0.0)
    seconds = time.perf_counter() - started
    return {"tokens": 1, "seconds": seconds, "device_bytes": _device_bytes(), "anonymous_bytes": _anonymous_bytes()}


def _copy(llm: Any, spec: Spec) -> dict[str, Any]:
    """Answers a prompt of code with the same code and one name changed, whatever the model's weights would say."""
    prompt, answer = _edited_code(llm.n_vocab())
    passes: list[int] = []
    evaluate = llm.eval

    def counted(tokens: list[int]) -> None:
        passes.append(len(tokens))
        evaluate(tokens)

    said: list[int] = []

    def forced(_tokens: Any, logits: Any) -> Any:
        logits[:] = -1.0
        logits[answer[len(said)]] = 1.0
        return logits

    llm.eval = counted
    started, before, n_before = 0.0, _counters(llm, spec), 0
    for token in llm.generate(prompt, temp=0.0, logits_processor=[forced]):
        said.append(token)
        if len(said) == spec.warm_up:
            started, before, n_before = time.perf_counter(), _counters(llm, spec), len(passes)
        if len(said) == spec.warm_up + spec.tokens:
            break
    seconds = time.perf_counter() - started
    if said != answer[: len(said)]:
        raise RuntimeError("another text was generated than the one that was asked for")
    return {
        "tokens": spec.tokens,
        "seconds": seconds,
        "tok_s": spec.tokens / seconds,
        "tokens_per_pass": spec.tokens / max(1, len(passes) - n_before),
        **_since(before, llm, spec, spec.tokens, seconds),
    }


def _text(llm: Any, spec: Spec) -> dict[str, Any]:
    """Answers prompts greedily, each in a context of its own. Prompts are evaluated between the answers, unmeasured.

    Ends an answer where the model would; begins with the first prompt again when there are no more.
    """
    prompts = [llm.tokenize(text.encode(), special=True) for text in json.loads(Path(spec.stream).read_text())]
    passes = 0
    evaluate = llm.eval

    def counted(tokens: list[int]) -> None:
        nonlocal passes
        passes += 1
        evaluate(tokens)

    llm.eval = counted
    answers: list[list[int]] = []
    total: Counters = {}
    n_tokens, seconds, n_passes, n_warm = 0, 0.0, 0, 0
    warm = True
    for prompt in itertools.cycle(prompts):
        tokens = llm.generate(prompt, temp=0.0)
        said = [next(tokens)]  # with it the prompt is done
        answers.append(said)
        before, n_before, started = _counters(llm, spec), passes, time.perf_counter()
        took, done = 0.0, False
        while said[-1] != llm.token_eos() and len(said) <= spec.per_prompt and not done:
            said.append(next(tokens))
            took, n = time.perf_counter() - started, n_tokens + len(said) - 1
            done = n >= (spec.warm_up if warm else spec.tokens)
            done |= n >= spec.min_tokens and seconds + took > spec.max_seconds
        tokens.close()
        n_tokens, seconds, n_passes = n_tokens + len(said) - 1, seconds + took, n_passes + passes - n_before
        total = {key: total.get(key, 0.0) + value for key, value in _delta(before, llm, spec).items()}
        if done and not warm:
            break
        if done:
            warm, n_warm, total, n_tokens, seconds, n_passes = False, n_tokens, {}, 0, 0.0, 0
    return {
        "tokens": n_tokens,
        "warm_up_tokens": n_warm,
        "seconds": seconds,
        "tok_s": n_tokens / seconds,
        "tokens_per_pass": n_tokens / max(1, n_passes),
        "answers": answers,
        **_per_token(total, spec, n_tokens, seconds),
    }


def _edited_code(n_vocab: int) -> tuple[list[int], list[int]]:
    """Part of the standard library, and the same with one name changed; tokens are words and marks."""
    source = Path(heapq.__file__).read_text()
    code = source[source.index("def heappush") : source.index("def heapify")]

    def tokens(text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % n_vocab for word in re.findall(r" *\w+|\s+|[^\w\s]+", text)]

    return tokens(code), tokens(re.sub(r"\bheap\b", "queue", code))


Counters = dict[str, float]


def _counters(llm: Any, spec: Spec) -> Counters:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    counters: Counters = {"device_bytes": _device_bytes(), "user": usage.ru_utime, "system": usage.ru_stime}
    if spec.mode in FLASH_MODES:
        counters |= dataclasses.asdict(llm.flash.stats().total)
    return counters


def _since(before: Counters, llm: Any, spec: Spec, n_tokens: int, seconds: float) -> dict[str, Any]:
    return _per_token(_delta(before, llm, spec), spec, n_tokens, seconds)


def _delta(before: Counters, llm: Any, spec: Spec) -> Counters:
    after = _counters(llm, spec)
    return {key: after[key] - value for key, value in before.items() if key in after}


def _per_token(delta: Counters, spec: Spec, n_tokens: int, seconds: float) -> dict[str, Any]:
    out: dict[str, Any] = {
        "device_bytes_per_token": delta["device_bytes"] / n_tokens,
        "user_seconds_per_token": delta["user"] / n_tokens,
        "system_seconds_per_token": delta["system"] / n_tokens,  # nearly all of it the read path's
    }
    if spec.mode in FLASH_MODES:
        uses = delta["hits"] + delta["misses"]
        out["flash_bytes_per_token"] = delta["bytes_read"] / n_tokens
        out["hit_rate"] = delta["hits"] / uses if uses else None
        out["wait_share"] = delta["wait_seconds"] / seconds
        out["flash_counters"] = delta
    return out


def _device_bytes() -> int:
    """Bytes that this process has made the device read, page faults and O_DIRECT alike."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
