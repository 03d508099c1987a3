"""Train one of the small models on Python's standard library.

    python ci/train/train.py --form arcee --out DIR --seed 0 --steps 1000
    python ci/train/train.py --form draft --out DIR --seed 0 --steps 1000 --teacher stdlib-arcee-q8_0.gguf \
        --own-text own.jsonl

The number of steps, the seed, the text and the library versions decide the result; the clock does not. With --minutes
the number is chosen from the speed of the first steps, and printed, so that the run can be repeated with --steps.
The learning rate is constant after the warmup and falls linearly to zero in the last 15 %, where the sequences are
twice as long. Until that fall begins, a run can be resumed with another --steps and ends as if it had been started so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corpus import Corpus, TokenArray, encode_documents, encode_texts, load_corpus, train_tokenizer
from model import FORMS, Form, LanguageModel, ModelConfig
from muon import Muon
from teacher import Teacher


@dataclass(frozen=True)
class Recipe:
    """How a form is trained. Lengths and batches are in tokens, `decay` and `warmup` in steps or shares of them."""

    batch: int
    n_ctx_start: int = 512
    n_ctx_end: int = 1024
    warmup_steps: int = 40
    decay_share: float = 0.15
    lr_matrices: float = 0.02
    lr_embedding: float = 0.02
    lr_position: float = 0.001
    lr_output: float = 0.005
    lr_vectors: float = 0.005
    weight_decay: float = 0.05
    balance: float = 0.01  # weight of the routers' load-balancing loss
    sparsity: float = 0.0  # weight of the rectified neurons' sparsity loss
    active_share_start: float = 0.5  # what that loss asks for at first, and after `sparsity_steps`
    active_share_end: float = 0.04
    sparsity_steps: int = 300


RECIPES: dict[Form, Recipe] = {
    "arcee": Recipe(batch=4096),
    # it begins with what its teacher knows
    "draft": Recipe(
        batch=2048, lr_embedding=0.003, lr_output=0.001, lr_vectors=0.002, warmup_steps=20, decay_share=0.4
    ),
    "moe": Recipe(batch=8192),
    # Learned positions: those of the second half would hardly be trained by longer sequences at the end alone.
    "opt": Recipe(batch=4096, n_ctx_start=1024, lr_embedding=0.015, sparsity=0.5),
}

PROBE_STEPS = 30
VALIDATION_TOKENS = 16_384


def sha256_of(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def batches(documents: list[TokenArray], n_ctx: int, batch: int, seed: list[int], first: int) -> Iterator[Tensor]:
    """Endless [batch / n_ctx, n_ctx + 1] windows from the `first`-th batch on; every epoch shuffles anew."""
    rows = batch // n_ctx
    n_tokens = sum(len(d) for d in documents)
    per_epoch = (n_tokens - 1) // n_ctx // rows
    for epoch in range(first // per_epoch, 1 << 30):
        rng = np.random.default_rng([*seed, epoch])
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        stream = np.roll(stream, int(rng.integers(n_tokens)))
        starts = rng.permutation((n_tokens - 1) // n_ctx) * n_ctx
        for index in range(first % per_epoch, per_epoch):
            chosen = starts[index * rows : (index + 1) * rows]
            yield torch.from_numpy(np.stack([stream[s : s + n_ctx + 1] for s in chosen]).astype(np.int64))
        first = 0


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    decay = min(1.0, (steps - step) / (recipe.decay_share * steps))
    return warmup * decay


def active_share_target(step: int, recipe: Recipe) -> float:
    """From start to end in equal ratios."""
    done = min(1.0, step / recipe.sparsity_steps)
    return float(recipe.active_share_start ** (1 - done) * recipe.active_share_end**done)


def make_optimizers(model: LanguageModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, Adam for embedding, output and vectors."""
    in_blocks = list(model.blocks.parameters())
    matrices = [p for p in in_blocks if p.ndim >= 2]
    vectors = [p for p in in_blocks if p.ndim < 2] + list(model.output_norm.parameters())
    groups = [{"params": [model.token_embd.weight], "lr": recipe.lr_embedding}]
    if model.position_embd is not None:
        groups.append({"params": [model.position_embd.weight], "lr": recipe.lr_position})
    if model.output is not None:
        groups.append({"params": [model.output.weight], "lr": recipe.lr_output})
    groups.append({"params": vectors, "lr": recipe.lr_vectors})
    adam = torch.optim.Adam(
        groups,
        betas=(0.9, 0.95),
        eps=1e-10,
        fused=True,
    )
    optimizers = [Muon(matrices, lr=recipe.lr_matrices, weight_decay=recipe.weight_decay), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def has_bfloat16() -> bool:
    """Whether products of bfloat16 are fast here: without instructions for them they are many times as slow."""
    cpu = Path("/proc/cpuinfo")
    return torch.cuda.is_available() or not cpu.exists() or "bf16" in cpu.read_text()


class Trainer:
    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        corpus: Corpus,
        out: Path,
        seed: int,
        teacher: Path | None = None,
        own_text: Path | None = None,
    ) -> None:
        self.config, self.recipe, self.seed, self.out = config, recipe, seed, out
        self.learnt_from = {"corpus": corpus.sha256, "own_text": sha256_of(own_text), "teacher": sha256_of(teacher)}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if has_bfloat16() else torch.float32
        self.ask_every = 4  # steps of which one learns from the teacher, the others from the text
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(corpus.train)
        tokenizer.save(str(out / "tokenizer.json"))
        self.train_documents = (
            encode_documents(tokenizer, corpus.train)
            if own_text is None
            else encode_texts(tokenizer, [json.loads(line) for line in own_text.read_text().splitlines()])
        )
        held_out = encode_documents(tokenizer, corpus.held_out)
        self.train_tokens = sum(len(d) for d in self.train_documents)
        self.bytes_per_token = Corpus.n_bytes(corpus.held_out) / sum(len(d) - 1 for d in held_out)
        self.validation = next(batches(held_out, recipe.n_ctx_start, VALIDATION_TOKENS, [seed], 0))
        self.model = LanguageModel(config).to(self.device)
        self.optimizers = make_optimizers(self.model, recipe)
        self.teacher = None if teacher is None else Teacher(teacher, self.device)
        if self.teacher is not None:
            self.teacher.start(self.model)
        self.step = 0
        self.seconds = 0.0

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token."""
        tokens = tokens.to(self.device)
        logits = self.model(tokens[:, :-1], self.dtype)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def train_step(self, tokens: Tensor, steps: int) -> float:
        factor = learning_rate_factor(self.step, steps, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        if self.teacher is None or self.step % self.ask_every:
            loss = self.loss(tokens)
        else:
            loss = self.teacher.loss(self.model, tokens.to(self.device), self.dtype)
        balance = self.model.balance_loss()
        total = loss if balance is None else loss + self.recipe.balance * balance
        if self.recipe.sparsity:
            target = active_share_target(self.step, self.recipe)
            total = total + self.recipe.sparsity * self.model.sparsity_loss(target)
        for parameter in self.model.parameters():
            parameter.grad = None
        total.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte on a fixed sample of the held-out text, in short windows: for the log only."""
        self.model.eval()
        losses = [self.loss(rows).item() for rows in torch.split(self.validation, 8)]
        self.model.train()
        return sum(losses) / len(losses) / math.log(2) / self.bytes_per_token

    def save(self, steps: int) -> None:
        state = {
            "form": self.config.form,
            "seed": self.seed,
            "step": self.step,
            "steps": steps,
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
            "learnt_from": self.learnt_from,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        partial = self.out / "checkpoint.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")

    def resume(self, steps: int) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        falling = state["step"] > self.decay_start(min(steps, state["steps"]))
        if state["form"] != self.config.form or state["seed"] != self.seed or (falling and state["steps"] != steps):
            raise SystemExit("the checkpoint belongs to another run")
        before = state.get("learnt_from", self.learnt_from)
        for what, sha256 in self.learnt_from.items():
            if before.get(what) != sha256:
                raise SystemExit(f"the checkpoint belongs to another run: {what.replace('_', ' ')} is another one")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def decay_start(self, steps: int) -> int:
        return steps - round(self.recipe.decay_share * steps)

    def data(self, steps: int) -> Iterator[Tensor]:
        """The batches from the current step on: short sequences first, long ones while the learning rate falls."""
        turn = self.decay_start(steps)
        short = batches(self.train_documents, self.recipe.n_ctx_start, self.recipe.batch, [self.seed, 0], self.step)
        for _ in range(self.step, turn):
            yield next(short)
        done = max(0, self.step - turn)
        yield from batches(self.train_documents, self.recipe.n_ctx_end, self.recipe.batch, [self.seed, 1], done)

    def run(self, steps: int | None, minutes: float | None, until: int | None = None) -> int:
        """Train up to `steps`; without it, up to what fits `minutes`. Returns the number of steps.

        until: the step to stop at, as if interrupted; None: the last.
        """
        planned = steps or 1_000_000
        data = self.data(planned)
        started = last_saved = time.perf_counter()
        before = self.seconds
        window: list[float] = []
        while self.step < min(planned, until or planned):
            window.append(self.train_step(next(data), planned))
            now = time.perf_counter()
            self.seconds = before + now - started
            if steps is None and minutes is not None and self.step == PROBE_STEPS:
                planned = steps = max(2 * PROBE_STEPS, int(0.9 * minutes * 60 * self.step / self.seconds))
                data = self.data(planned)
                print(f"--steps {planned}", flush=True)
            if self.step % 20 == 0:
                print(
                    f"step {self.step}/{planned} loss {np.mean(window):.4f} "
                    f"{1000 * self.seconds / self.step:.0f} ms/step {self.seconds:.0f} s",
                    flush=True,
                )
                window.clear()
            if self.step % 200 == 0 or self.step == planned:
                print(f"step {self.step} held-out sample {self.validate():.4f} bits per byte", flush=True)
                print("active, percent: " + " ".join(f"{100 * s:.1f}" for s in self.model.active_shares()), flush=True)
            if now - last_saved > 120 or self.step in (planned, until):
                self.save(planned)
                last_saved = now
        return planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=sorted(FORMS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--minutes", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--teacher", type=Path, help="a GGUF file of the form arcee to begin with and to learn from")
    parser.add_argument(
        "--own-text", type=Path, help="what own_text.py wrote: learn from it, not from the library's text"
    )
    parser.add_argument("--until", type=int, help="stop at this step, to go on with --resume")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/checkpoint.pt")
    args = parser.parse_args()
    if args.resume and args.steps is None:
        parser.error("--resume needs --steps")

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    print(
        f"Python {corpus.python_version}: "
        f"{len(corpus.train)} files to train on ({Corpus.n_bytes(corpus.train)} bytes), "
        f"{len(corpus.held_out)} held out ({Corpus.n_bytes(corpus.held_out)} bytes), "
        f"{len(corpus.near_duplicates)} near-duplicates dropped, sha256 {corpus.sha256}"
    )
    trainer = Trainer(FORMS[args.form], RECIPES[args.form], corpus, args.out, args.seed, args.teacher, args.own_text)
    print(f"{trainer.model.n_parameters()} parameters, {trainer.train_tokens} tokens in an epoch", flush=True)
    if args.resume:
        trainer.resume(args.steps)
    steps = trainer.run(args.steps, args.minutes, args.until)
    if trainer.step < steps:
        print(f"stopped at step {trainer.step} of {steps}: go on with --resume")
        return
    report = {
        "form": args.form,
        "seed": args.seed,
        "steps": steps,
        "minutes": round(trainer.seconds / 60, 1),
        "threads": args.threads,
        "device": str(trainer.device),
        "torch": torch.__version__,
        "tokens": steps * trainer.recipe.batch,
        "tokens_per_epoch": trainer.train_tokens,
        "parameters": trainer.model.n_parameters(),
        "own_text_sha256": trainer.learnt_from["own_text"],
        "recipe": asdict(trainer.recipe),
        "corpus": {
            "python": corpus.python_version,
            "sha256": corpus.sha256,
            "train_files": len(corpus.train),
            "train_bytes": Corpus.n_bytes(corpus.train),
            "held_out_files": len(corpus.held_out),
            "held_out_bytes": Corpus.n_bytes(corpus.held_out),
            "near_duplicates": corpus.near_duplicates,
        },
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
