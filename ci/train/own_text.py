"""What a teacher itself writes behind pieces of the training text: for its draft model to learn from.

    python ci/train/own_text.py --model stdlib-arcee-q8_0.gguf --out own.jsonl --pieces 6000 --seed 0

A draft model guesses what the large one says, not what people write. Each line of the file is a JSON string: a piece
of a training file with the greedy answer of the model behind it. Needs the project's package and requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from corpus import load_corpus
from llama_flash import complete_many

PIECE = (160, 700)  # characters
ANSWER_TOKENS = 96
AT_ONCE = 32
N_CTX = 512


def pieces(files: dict[str, str], n: int, seed: int) -> list[str]:
    """`n` pieces from anywhere in the files; long files have more of them."""
    chosen = random.Random(seed)
    names = sorted(name for name, text in files.items() if len(text) > PIECE[1])
    lengths = [len(files[name]) for name in names]
    result = []
    for name in chosen.choices(names, lengths, k=n):
        length = chosen.randint(*PIECE)
        begin = chosen.randrange(len(files[name]) - length)
        result.append(files[name][begin : begin + length])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the teacher's GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--pieces", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = pieces(load_corpus().train, args.pieces, args.seed)
    answers: dict[int, str] = {}
    for completion in complete_many(
        args.model, prompts, parallel=AT_ONCE, n_ctx=N_CTX, max_tokens=ANSWER_TOKENS, temperature=0.0
    ):
        if completion.error:
            raise SystemExit(f"piece {completion.index}: {completion.error}")
        answers[completion.index] = completion.text or ""
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text("".join(json.dumps(prompts[i] + answers[i]) + "\n" for i in range(len(prompts))))
    partial.replace(args.out)
    print(f"{args.out}: {len(prompts)} pieces, {sum(map(len, answers.values()))} characters of answers")


if __name__ == "__main__":
    main()
