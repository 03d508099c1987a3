"""What the tests of the engine share: loading a model with and without flash offload, and comparing logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama

from llama_flash import FlashOffload
from llama_flash.native import bindings


class Model(Llama):  # type: ignore[misc]
    """A `Llama` for `with`. At the module's top, so that it can be pickled."""

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Logits = npt.NDArray[np.float32]


def _io_engines() -> tuple[str, ...]:
    """Those that work here: io_uring needs liburing at build time and a kernel that allows it."""
    library = bindings.load()
    works = []
    for name, number in (("io_uring", 1), ("pread", 2)):
        session = library.llama_flash_session_new(bindings.llama_flash_params(io_engine=number), None)
        if session:
            library.llama_flash_session_free(session)
            works.append(name)
    return tuple(works)


IO_ENGINES = _io_engines()

# memory for the flash tensors above the least that works, as a share of their size
LEAST, QUARTER, MOST = 0.0, 0.25, 0.9


def open_resident(path: Any, **options: Any) -> Model:
    return _open(path, flash_offload=False, **options)


def open_flash(
    path: Any,
    *,
    what: Any = "auto",
    share: float = QUARTER,
    io_engine: Any = "auto",
    lookahead: Any = True,
    **options: Any,
) -> Model:
    """Opens a model whose weights stay on flash although they would fit, with a cache far smaller than they are.

    what: as in FlashOffload; "auto" means experts where there are some, else the dense FFN.
    share: memory for the flash tensors above the least that works, as a share of their size.
    """
    wanted: Any = "ffn" if what == "auto" else what
    llm = _open(
        path,
        flash_offload=FlashOffload(
            what=wanted, io_engine=io_engine, lookahead=lookahead, panel_bytes=65536, follow=False
        ),
        **options,
    )
    give_memory(llm, share)
    return llm


def give_memory(llm: Any, share: float) -> int:
    """Shrinks the flash session's memory below what the budget has left for it. Returns the bytes given."""
    session = llm.flash
    assert session is not None and session.plan.mode == "flash", "the model does not run from flash"
    needs = session.native.requirements()
    n_bytes = int(needs.min_memory + share * (needs.expert_bytes + needs.panel_bytes))
    session.native.set_memory(n_bytes)
    return n_bytes


def _open(path: Any, **options: Any) -> Model:
    defaults: dict[str, Any] = {
        "n_ctx": 640,
        "n_batch": 512,
        "n_ubatch": 512,
        "n_threads": 2,
        "logits_all": True,
        "verbose": False,
    }
    merged = defaults | options
    merged.setdefault("n_threads_batch", merged["n_threads"])
    return Model(str(path), **merged)


def tokens(n: int, n_vocab: int = 512, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, n_vocab, n)]


def logits_of(llm: Llama, prompt: list[int], decoded: list[int]) -> Logits:
    """Logits of a prompt, evaluated in batches, then of tokens decoded one by one: [tokens, vocabulary]."""
    llm.reset()
    llm.eval(prompt)
    for token in decoded:
        llm.eval([token])
    return np.array(llm.scores[: llm.n_tokens], copy=True)


def assert_same_logits(actual: Logits, expected: Logits, n_tokens: int) -> None:
    """Bit for bit, and of logits that could have differed."""
    assert n_tokens >= 64
    assert expected.shape == actual.shape == (n_tokens, expected.shape[1])
    assert np.isfinite(expected).all()
    assert expected.std(axis=1).min() > 0.1, "these logits say nothing"
    assert len(np.unique(expected.argmax(axis=1))) > 4, "the same answer for every token"
    different = np.flatnonzero((actual.view(np.uint32) != expected.view(np.uint32)).any(axis=1))
    assert len(different) == 0, f"logits of {len(different)} tokens differ, first of token {different[0]}"


def assert_read_from_flash(llm: Any, *, moe: bool) -> None:
    total = llm.flash.stats().total
    assert total.bytes_read > 0 and total.reads > 0
    if moe:
        assert total.misses > 0
    else:
        assert total.panel_reads > 0
