"""What the user may choose about flash offload. How it is chosen for them is in budget/ and planning/."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .addresses import address_of, addresses_in
from .sizes import parse_size

__all__ = ["FlashOffload", "reject_misspelt"]

What = Literal["auto", "experts", "ffn", "all"]
IoEngine = Literal["auto", "io_uring", "pread"]
_DRAFTS = ("auto", "off", "ngram", "mtp")
Predictor = Literal["auto", "exact", "lowrank", "off"]

_MOST_WORKERS = 15  # of the engine's devices: 16


@dataclass(frozen=True)
class FlashOffload:
    """Options of `llama_cpp.Llama(..., flash_offload=FlashOffload(...))`. The defaults need no tuning.

    Attributes:
        dram_budget: bytes that the whole process may take: interpreter, resident weights, KV cache, buffers and the
            slots for weights from flash. "auto": the tightest memory cgroup or the machine's free memory, less what
            others use. Else a size ("2GiB", 2147483648) or a share of the model file ("50%").
        reserve: bytes of the budget left unused, for what cannot be counted beforehand. None: 3 %, at least 32 MiB.
        what: which weights stay on flash. "auto": none if the whole model fits, else as few kinds as the budget
            needs. "experts", "ffn" (experts and dense FFN) or "all" (every matrix and table) choose by hand.
        predictor: how the active neurons of a file with neuron bundles are found. "exact": gate (without gate: up)
            stays resident and is computed in full, the answers are the resident run's. "lowrank": by the file's
            predictors, which costs less memory and may miss a neuron. "off": not at all, whole layers are read.
            "auto": exact where the budget allows, else lowrank where there are predictors.
        window: tokens before the current one whose neurons stay in slots; None: as many as have room.
        lookahead: read ahead the experts that the next layer's router will probably choose, two of them, and the
            neurons that its predictor expects ("lowrank"). "auto": as many experts, none to three, as make tokens
            fastest, which is tried out while decoding; neurons always.
        draft: guesses at the next tokens, which one pass checks together; no byte of an answer changes. "ngram": what
            followed when the text was like this before. "mtp": by the head of multi-token prediction in the model's
            file. A path: by a smaller model with the same vocabulary. "auto": "mtp" where the file has such a head
            and the budget is sure to have room for it, else "ngram". In each step as many tokens are drafted as pay, or
            none.
        follow: give memory back and take it again while the model runs, as limits and neighbours move.
        warm_start: remember which weights were hot, in a small file of the user's cache folder, and
            read them in the background after the next load (needs `follow`); and how they were used, for plans.
        io_engine: "io_uring", "pread" (a pool of threads) or "auto" (io_uring where it works and the device's profile,
            `llama-flash profile`, does not say that pread is faster).
        io_depth: most reads in flight at once; None: as many as the device's profile finds useful; without one 32, and
            128 where single neurons are read.
        io_threads: threads of the pread pool.
        panel_bytes: size of the runs of rows in which dense weights are streamed.
        prompt_cache: keep the state of prompts on flash, so that what was computed once is read: a folder, or True for
            one in the user's cache folder. It holds what people typed: the folder is open to its owner alone.
        prompt_cache_size: bytes that these files may take on the disk; what was used longest ago goes first.
        workers: other processes ("host:port", each a `llama-flash worker`) that hold the layers, each with flash and a
            budget of its own; the embedding and the output matrix stay here. A sequence, or a text with commas
            between them. docs/explanation/workers.md.
        worker_token_file: the file whose first line the workers were given, too.
        worker_timeout: seconds within which a worker must say that it is alive. What it computes may take longer.

    Raises:
        ValueError: a value that makes no sense, with the accepted ones.
        TypeError: an option that does not exist, a size that is neither number nor text.
    """

    dram_budget: int | str = "auto"
    reserve: int | str | None = None
    what: What = "auto"
    predictor: Predictor = "auto"
    window: int | None = None
    lookahead: bool | Literal["auto"] = "auto"
    draft: str | os.PathLike[str] = "off"
    follow: bool = True
    warm_start: bool = True
    io_engine: IoEngine = "auto"
    io_depth: int | None = None
    io_threads: int = 8
    panel_bytes: int | str = "4MiB"
    prompt_cache: bool | str | os.PathLike[str] = False
    prompt_cache_size: int | str = "8GiB"
    workers: Sequence[str] | str = ()
    worker_token_file: str | os.PathLike[str] | None = None
    worker_timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.dram_budget != "auto":
            _checked("dram_budget", self.dram_budget, ', or "auto"', reference=1 << 40)
        if self.reserve is not None and (self.reserve != 0 or isinstance(self.reserve, bool)):
            _checked("reserve", self.reserve, ", or 0, or None")
        _one_of("what", self.what, get_args(What))
        _one_of("io_engine", self.io_engine, get_args(IoEngine))
        _one_of("predictor", self.predictor, get_args(Predictor))
        if self.window is not None:
            _in_range("window", self.window, 0, 1 << 20)
        if self.lookahead != "auto" and not isinstance(self.lookahead, bool):
            raise ValueError(f"lookahead: {self.lookahead!r} is not one of True, False, 'auto'")
        if not isinstance(self.prompt_cache, bool | str | os.PathLike) or self.prompt_cache == "":
            raise ValueError(f"prompt_cache: {self.prompt_cache!r} is not one of True, False, a folder")
        _in_range("prompt_cache_size", _checked("prompt_cache_size", self.prompt_cache_size), 1 << 20, 1 << 60)
        if not self.drafts_by_model and self.draft not in _DRAFTS:
            known = ", ".join(map(repr, _DRAFTS))
            raise ValueError(f"draft: {self.draft!r} is not one of {known}, nor a GGUF file")
        for name in ("follow", "warm_start"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}: {value!r} is not one of True, False")
        if self.io_depth is not None:
            _in_range("io_depth", self.io_depth, 1, 4096)
        _in_range("io_threads", self.io_threads, 1, 256)
        _in_range("panel_bytes", _checked("panel_bytes", self.panel_bytes), 4096, 1 << 30)
        self._check_workers()

    def _check_workers(self) -> None:
        workers = addresses_in(self.workers)
        object.__setattr__(self, "workers", workers)
        for worker in workers:
            try:
                address_of(worker)
            except ValueError as error:
                raise ValueError(f"workers: {error}") from None
        if len(set(workers)) < len(workers) or len(workers) > _MOST_WORKERS:
            raise ValueError(f"workers: {', '.join(workers)}: each once, and {_MOST_WORKERS} at most")
        if not isinstance(self.worker_timeout, int | float) or not 0.1 <= self.worker_timeout <= 3600:
            raise ValueError(f"worker_timeout: {self.worker_timeout!r} is not a number of seconds from 0.1 to 3600")
        if workers and self.draft == "mtp":
            raise ValueError("draft: 'mtp' needs all layers here, not at workers; 'ngram' and a smaller model do not")
        if workers and self.prompt_cache is not False:
            raise ValueError("prompt_cache: the state of prompts lies at the workers, which do not keep it")

    @property
    def drafts_by_model(self) -> bool:
        """Whether `draft` names a file."""
        if isinstance(self.draft, os.PathLike):
            return True
        return isinstance(self.draft, str) and (os.sep in self.draft or self.draft.endswith(".gguf"))

    @classmethod
    def coerce(cls, value: bool | Mapping[str, Any] | FlashOffload | None) -> FlashOffload | None:
        """Options meant by `flash_offload=value`; None where it is switched off (False, None)."""
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls(**value)
        raise TypeError(f"flash_offload: expected True, False, a dict or FlashOffload, got {type(value).__name__}")


def reject_misspelt(names: Iterable[str]) -> None:
    """Raises TypeError if one of the keyword arguments `names` can only be meant for flash offload, or for workers.

    `llama_cpp.Llama` ignores keyword arguments that it does not know, so `flash_ofload=True` would run without it.
    """
    if isinstance(names, Mapping) and names.get("rpc_servers"):
        raise TypeError(
            "Llama.__init__() does not know rpc_servers, which it would ignore: start `llama-flash worker` there, and "
            "name the workers: flash_offload=llama_flash.FlashOffload(workers=['127.0.0.1:50052', ...])"
        )
    for name in names:
        if name.startswith("flash_") or difflib.get_close_matches(name, ["flash_offload"], cutoff=0.8):
            raise TypeError(
                f"Llama.__init__() got an unexpected keyword argument {name!r}; "
                "did you mean 'flash_offload'? Its options go into flash_offload=llama_flash.FlashOffload(...)"
            )


def _checked(name: str, value: int | str, others: str = "", reference: int | None = None) -> int:
    try:
        return parse_size(value, reference=reference)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}{others}") from None


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, accepted))}")


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not a whole number from {low} to {high}")
