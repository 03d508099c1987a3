"""Where the tokens of a sparse synthetic model lie, and the streams that walk among them.

Tokens lie on a torus. A token's code is a smooth function of its place, so that near tokens have similar codes, plus a
part of its own. A stream walks in small steps and sometimes jumps, as a text stays with a subject and then changes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gguf_tools.source import Floats
from gguf_tools.synthetic.weights import rng_for

WIDTH = 64  # numbers in a code
_STEP = 0.018  # standard deviation of a step of the walk along each axis of the torus, whose circumference is 1
_JUMP = 0.2  # share of the steps that go anywhere instead


@dataclass(frozen=True)
class Codes:
    n_vocab: int
    seed: int
    own: float = 0.6  # a token's own part, as a share of the norm of its code

    def matrix(self) -> Floats:
        """[n_vocab, WIDTH]; each row has the norm sqrt(WIDTH), up to the spread of its own part."""
        angles = 2 * np.pi * places(self.n_vocab) @ _frequencies().T
        smooth = 2**0.5 * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        own = rng_for(self.seed, "codes").standard_normal(smooth.shape)
        return np.asarray((1 - self.own**2) ** 0.5 * smooth + self.own * own, np.float32)


def places(n_vocab: int) -> npt.NDArray[np.float64]:
    """Each token's place on the torus, evenly spread (Roberts' R2 sequence): [n_vocab, 2]."""
    plastic = 1.32471795724474602596
    return np.asarray(np.arange(n_vocab)[:, None] * np.array([1 / plastic, 1 / plastic**2]) % 1.0)


def token_stream(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """`n` tokens of a walk; no token comes twice in a row. Depends on nothing but the arguments."""
    rng = np.random.default_rng([seed, n_vocab])
    where = places(n_vocab)
    at = rng.random(2)
    tokens: list[int] = []
    for _ in range(n):
        at = rng.random(2) if rng.random() < _JUMP else (at + rng.normal(0, _STEP, 2)) % 1.0
        offset = np.abs(where - at)
        distance = (np.minimum(offset, 1 - offset) ** 2).sum(axis=1)
        if tokens:
            distance[tokens[-1]] = np.inf
        tokens.append(int(distance.argmin()))
    return tokens


def _frequencies() -> npt.NDArray[np.int64]:
    """The WIDTH / 2 lowest frequencies on the torus, one of each pair of opposite ones: [WIDTH / 2, 2]."""
    reach = range(-WIDTH, WIDTH + 1)
    half = [(x, y) for x in reach for y in reach if (x, y) > (0, 0)]
    return np.array(sorted(half, key=lambda k: (k[0] ** 2 + k[1] ** 2, k))[: WIDTH // 2])
