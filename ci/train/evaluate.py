"""Grade a GGUF file, as llama.cpp runs it, on the held-out files; with --run, also against the float model.

    python ci/train/evaluate.py --gguf FILE [--run DIR] [--report FILE] [--threads T]

Every token of every held-out file is scored, the end token included, after at least `n_ctx / 4` tokens of the same file
where the file has them: windows of n_ctx tokens that overlap by a quarter.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama

from corpus import BOS_ID, EOS_ID, load_corpus

FloatArray = npt.NDArray[np.float32]
Logits = Callable[[list[int], int], FloatArray]  # (tokens, first) -> [len(tokens) - first, n_vocab]

# They end where a token of the training text would: spaces and line ends belong to the token that follows.
PROMPTS = ("import os\nimport sys\n\n\ndef", "class Queue:\n    def __init__(self, maxsize=0):")


def windows(n_inputs: int, n_ctx: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first): feed inputs[start:end], score what follows each of inputs[start + first:end]."""
    start, scored = 0, 0
    while scored < n_inputs:
        end = min(start + n_ctx, n_inputs)
        yield start, end, scored - start
        scored = end
        start += n_ctx - n_ctx // 4


def bits(documents: list[list[int]], logits_of: Logits, n_ctx: int) -> float:
    """Information in the documents' tokens after BOS, in bits."""
    total = 0.0
    for tokens in documents:
        for start, end, first in windows(len(tokens) - 1, n_ctx):
            logits = logits_of(tokens[start:end], first).astype(np.float64)
            targets = tokens[start + first + 1 : end + 1]
            peak = logits.max(-1)
            normaliser = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
            total += float((normaliser - logits[np.arange(len(targets)), targets]).sum())
    return total / math.log(2)


def engine_logits(llm: Llama) -> Logits:
    def logits_of(tokens: list[int], first: int) -> FloatArray:
        llm.reset()
        llm.eval(tokens)
        scores: FloatArray = np.array(llm.scores[first : len(tokens)], dtype=np.float32)
        return scores

    return logits_of


def compare(documents: list[list[int]], ours: Logits, reference: Logits, n_tokens: int = 200) -> dict[str, float]:
    """The first `n_tokens` of each document under both: how far the next-token distributions are apart."""
    same, divergences, differences = [], [], []
    for tokens in documents:
        a = ours(tokens[:n_tokens], 0).astype(np.float64)
        b = reference(tokens[:n_tokens], 0).astype(np.float64)
        log_a, log_b = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
        same.append(a.argmax(-1) == b.argmax(-1))
        divergences.append((np.exp(log_b) * (log_b - log_a)).sum(-1))
        differences.append(np.abs(a - b).max(-1))
    return {
        "tokens": int(sum(len(s) for s in same)),
        "same_top_token": round(float(np.concatenate(same).mean()), 4),
        "mean_kl_nats": round(float(np.concatenate(divergences).mean()), 6),
        "median_largest_logit_difference": round(float(np.median(np.concatenate(differences))), 4),
    }


def xz_bits_per_byte(texts: list[bytes]) -> dict[str, float]:
    """xz -9 on all files joined, and file by file."""
    n_bytes = sum(map(len, texts))
    return {
        "xz_joined": round(8 * len(lzma.compress(b"".join(texts), preset=9)) / n_bytes, 4),
        "xz_per_file": round(8 * sum(len(lzma.compress(t, preset=9)) for t in texts) / n_bytes, 4),
    }


def sample(llm: Llama, prompt: str, temperature: float) -> str:
    llm.reset()
    completion: Any = llm.create_completion(prompt, max_tokens=120, temperature=temperature, top_p=0.95, seed=1)
    return prompt + str(completion["choices"][0]["text"])


def compare_tokenizers(llm: Llama, tokenizer_json: Path, files: dict[str, str]) -> int:
    """Number of files on which llama.cpp's tokens differ from those of the training tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    return sum(
        llm.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text).ids
        for text in files.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="the folder that train.py wrote")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-ctx", type=int, default=1024)
    args = parser.parse_args()

    corpus = load_corpus()
    texts = [corpus.held_out[path].encode() for path in sorted(corpus.held_out)]
    n_bytes = sum(map(len, texts))
    llm = Llama(
        str(args.gguf),
        n_ctx=args.n_ctx,
        n_batch=args.n_ctx,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        logits_all=True,
        verbose=False,
    )
    documents = [[BOS_ID, *llm.tokenize(text, add_bos=False, special=False), EOS_ID] for text in texts]
    engine = engine_logits(llm)
    report: dict[str, Any] = {
        "gguf": args.gguf.name,
        "gguf_bytes": args.gguf.stat().st_size,
        "python": corpus.python_version,
        "text_sha256": corpus.sha256,
        "held_out_files": len(texts),
        "held_out_bytes": n_bytes,
        "held_out_tokens": sum(len(d) - 1 for d in documents),
        "n_ctx": args.n_ctx,
        **xz_bits_per_byte(texts),
        "bits_per_byte": round(bits(documents, engine, args.n_ctx) / n_bytes, 4),
    }
    print(json.dumps(report), flush=True)
    if args.run:
        import torch

        from reference import ReferenceModel

        torch.set_num_threads(args.threads)
        report["training"] = json.loads((args.run / "training.json").read_text())
        report["files_tokenised_otherwise"] = compare_tokenizers(llm, args.run / "tokenizer.json", corpus.held_out)
        reference = ReferenceModel(args.run / "checkpoint.pt")
        report["float_bits_per_byte"] = round(bits(documents, reference.logits, args.n_ctx) / n_bytes, 4)
        report.update(reference.statistics())
        report["against_float"] = compare(documents[:5], engine, reference.logits)
    report["samples"] = [sample(llm, prompt, temperature) for prompt in PROMPTS for temperature in (0.0, 0.8)]
    text = json.dumps(report, indent=2)
    if args.report:
        args.report.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
