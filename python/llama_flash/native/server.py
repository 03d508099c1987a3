"""llama-server inside this process: its library, and the hooks through which it loads and computes.

The structures are `struct llama_hooks` of the engine's llama-ext.h and that of plugin/server/limits.h, the functions
are those of plugin/server/serve.cpp.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import FlashError
from . import bindings
from .prompts import Tokens, clear

__all__ = [
    *("FAILED", "Driver", "Drafts", "Holds", "Pages", "Prompts", "RequestLimits"),
    "Tokens",
    *("argv_of", "check_template", "copy_of", "hooks_of", "load", "serve", "shipped", "stop", "write_back"),
]

FAILED = -3  # what llama_process returns where a graph could not be computed: the batch is not tried again

logger = logging.getLogger("llama_flash")


_LIBRARY = "libllama-server-impl.so"

_Load = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
_Init = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_Freed = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Begin = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
_End = ctypes.CFUNCTYPE(
    *(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
    *(ctypes.c_void_p, ctypes.c_size_t),
)
_Int32s = ctypes.POINTER(ctypes.c_int32)
_Even = ctypes.CFUNCTYPE(None, ctypes.c_void_p, _Int32s, ctypes.c_int32)
_Computed = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, _Int32s, _Int32s, _Int32s)
_Tell = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)


class _Draft(ctypes.Structure):
    """struct llama_flash_draft"""

    _fields_ = (
        ("sequence", ctypes.c_int32),
        ("n_text", ctypes.c_int32),
        ("text", _Int32s),
        ("n_max", ctypes.c_int32),
        ("n_room", ctypes.c_int32),
        ("n_tokens", ctypes.c_int32),
        ("tokens", _Int32s),
    )


class _Ahead(ctypes.Structure):
    """struct llama_flash_ahead"""

    _fields_ = (("sequence", ctypes.c_int32), ("n_tokens", ctypes.c_int32))


_MakeDrafts = ctypes.CFUNCTYPE(
    *(None, ctypes.c_int, ctypes.POINTER(_Draft), ctypes.c_int, ctypes.POINTER(_Ahead), ctypes.c_int)
)
_HoldsPrompts = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int, ctypes.c_int)
_HEALTH = 0  # of enum llama_flash_page; else METRICS


class _Hooks(ctypes.Structure):
    """struct llama_hooks"""

    _fields_ = (
        *(("load", _Load), ("init", _Init), ("freeing", _Freed), ("freed", _Freed)),
        *(("begin", _Begin), ("end", _End), ("even", _Even), ("computed", _Computed)),
    )


_Recall = ctypes.CFUNCTYPE(
    *(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_char_p),
)
_Keep = ctypes.CFUNCTYPE(
    *(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int64, ctypes.c_bool, ctypes.c_char_p),
)


class _PromptHooks(ctypes.Structure):
    """struct llama_flash_prompt_hooks"""

    _fields_ = (("block", ctypes.c_int32), ("recall", _Recall), ("keep", _Keep))


class RequestLimits(ctypes.Structure):
    """struct llama_flash_limits."""

    _fields_ = (
        ("max_body", ctypes.c_uint64),
        ("max_grammar", ctypes.c_uint64),
        ("max_memory", ctypes.c_uint64),
        ("max_depth", ctypes.c_uint32),
        ("max_requests", ctypes.c_uint32),
        ("n_ctx", ctypes.c_uint32),
    )


class Driver(Protocol):
    """Who loads and computes for the server. None of it may raise. Models and contexts are addresses."""

    follows: bool  # whether `computed` is to be called

    def load(self, path: str, model_params: Any, context_params: Any) -> int:
        """The model, 0 if it cannot be loaded. Both parameters (structures of llama_cpp) may be changed."""

    def init(self, model: int, context_params: Any) -> int:
        """A context of the model, 0 if it cannot be made."""

    def freeing(self, model: int) -> None:
        """The model will be gone, and contexts of one's own have to be freed. Of any model in the process."""

    def freed(self, model: int) -> None:
        """The model is gone. Of any model in the process."""

    def even(self, context: int, counts: Sequence[int]) -> Sequence[int]:
        """Before `begin`: sequence i has counts[i] tokens in the call. As many, or more, then computed for nothing.

        Not asked where the engine could not forget them.
        """

    def begin(self, context: int, n_tokens: int, n_sequences: int) -> None:
        """Before a call of the engine with so many tokens, those for nothing included, of so many sequences."""

    def end(self, context: int, n_tokens: int, n_sequences: int, code: int) -> tuple[int, str]:
        """After it: the code to be returned in place of `code`, and the reason if that is a failure."""

    def computed(self, context: int, tokens: Tokens, positions: Tokens, sequences: Tokens) -> None:
        """After a call that has succeeded, of each of its tokens: what it is (-1: a vector), and where.

        The arrays are valid meanwhile.
        """


class Prompts(Protocol):
    """Who keeps what prompts have computed. By the thread of the server's main loop. Sequences are numbers."""

    block: int  # states without cells are kept behind multiples of so many tokens

    def recall(
        self, context: int, seq: int, tokens: Tokens, n_past: int, other: int, n_other: int, adapters: str
    ) -> int:
        """Before a prompt is computed, of which seq has n_past tokens and `other` n_other: how many seq has then."""

    def keep(
        self, context: int, seq: int, tokens: Callable[[], Tokens], n: int, stamp: int, idle: bool, adapters: str
    ) -> bool:
        """Between two calls, of each sequence with tokens: whether to call again though there is nothing to compute.

        stamp: another one for other tokens; -1 while they are being computed.
        """


class Drafts(Protocol):
    """Who guesses at the tokens to come. It may not raise."""

    def __call__(
        self, n_generating: int, texts: Sequence[tuple[int, Tokens, int, int]], prompts: Sequence[tuple[int, int]]
    ) -> Sequence[Tokens]:
        """A draft for each text, which is its sequence, its tokens (valid meanwhile), how many tokens of a draft can be
        of use, and how many there may be.

        Args:
            n_generating: sequences that go on with the next pass, those without a draft included.
            prompts: sequences that compute of their prompts then, and how many tokens each has left of it.
        """


class Holds(Protocol):
    """Who says when prompts begin. It may not raise."""

    def __call__(self, n_new: int, n_begun: int) -> bool:
        """Before a pass in which n_begun sequences compute: whether n_new others wait. Asked again before the next."""


class Pages(Protocol):
    """What the program says beside the server, to whoever it lets ask. By the threads of HTTP, several at once."""

    def health(self) -> dict[str, Any]:
        """Members of the object that /health is."""

    def metrics(self) -> str:
        """Text in Prometheus' format, of whole lines."""


def load() -> None:
    """Loads the library, so that what it takes is counted. Raises FlashError: it is missing."""
    _library()


def serve(
    arguments: Sequence[str],
    driver: Driver,
    pages: Pages,
    limits: RequestLimits,
    prompts: Prompts | None = None,
    drafts: Drafts | None = None,
    holds: Holds | None = None,
) -> int:
    """Runs llama-server in this thread until it is stopped. 0 then, 1 if it did not begin.

    Args:
        arguments: as on its command line, without its name. llama.cpp's own settings files are not read.
        limits: what of a request is refused before it is parsed.
        prompts: who keeps prompts; None: nobody.
        drafts: None: there are none.
        holds: None: each prompt begins at once.

    Raises:
        FlashError: the server's library is missing.
    """
    library = _library()
    hooks, tell = hooks_of(driver), _tell(library, pages)
    argv = argv_of("llama-server", arguments)
    kept = None if prompts is None else _prompt_hooks(prompts)
    make_drafts = _make_drafts(drafts) if drafts is not None else _MakeDrafts()
    holds_prompts = _HoldsPrompts(holds) if holds is not None else _HoldsPrompts()
    code: int = library.llama_flash_serve(
        *(*argv, ctypes.byref(hooks), tell, ctypes.byref(limits)),
        *(None if kept is None else ctypes.byref(kept), make_drafts, holds_prompts),
    )
    return code


def stop() -> None:
    """Ends `serve`, from another thread, once the server answers."""
    _library().llama_flash_serve_stop()


def check_template(text: str) -> None:
    """Raises ValueError, with the parser's reason, where llama-server cannot use the text as a chat template."""
    reason = ctypes.create_string_buffer(1024)
    if not _library().llama_flash_serve_template(text.encode(), reason, len(reason)):
        raise ValueError(" ".join(reason.value.decode(errors="replace").split()))


def argv_of(name: str, arguments: Sequence[str]) -> tuple[int, Any]:
    """argc and argv of a program."""
    encoded = [name.encode(), *map(os.fsencode, arguments)]
    return len(encoded), (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)


def shipped(name: str) -> Any:
    """A library that lies beside the engine's, and finds that in the process. Raises OSError: it is missing."""
    import llama_cpp  # noqa: F401  # its libllama is the one to be found

    return ctypes.CDLL(str(bindings.library_path().with_name(name)))


def copy_of(structure: Any) -> Any:
    """A copy that outlives the structure of the engine's."""
    return type(structure).from_buffer_copy(structure)


def write_back(copy: Any, structure: Any) -> None:
    """Makes the engine's structure what its copy has become."""
    ctypes.memmove(ctypes.byref(structure), ctypes.byref(copy), ctypes.sizeof(copy))


def hooks_of(driver: Driver) -> ctypes.Structure:
    """struct llama_hooks, which calls the driver. It must outlive what it is given to."""
    import llama_cpp

    def load(path: bytes, model_params: int, context_params: int) -> int:
        parameters = llama_cpp.llama_model_params.from_address(model_params)
        context = llama_cpp.llama_context_params.from_address(context_params)
        return driver.load(os.fsdecode(path), parameters, context)

    def init(model: int, context_params: int) -> int:
        return driver.init(model, llama_cpp.llama_context_params.from_address(context_params))

    def end(context: int, n_tokens: int, n_sequences: int, code: int, error: int, size: int) -> int:
        code, reason = driver.end(context, n_tokens, n_sequences, code)
        if reason and size:
            text = reason.encode()[: size - 1].decode(errors="ignore").encode() + b"\0"
            ctypes.memmove(error, text, len(text))
        return code

    def even(context: int, counts: Any, n: int) -> None:
        for i, count in enumerate(driver.even(context, counts[:n])):
            counts[i] = count

    def computed(context: int, n: int, tokens: Any, positions: Any, sequences: Any) -> None:
        driver.computed(context, *(np.ctypeslib.as_array(each, (n,)) for each in (tokens, positions, sequences)))

    return _Hooks(
        *(_Load(load), _Init(init), _Freed(driver.freeing), _Freed(driver.freed)),
        *(_Begin(driver.begin), _End(end), _Even(even), _Computed(computed) if driver.follows else _Computed()),
    )


def _prompt_hooks(prompts: Prompts) -> ctypes.Structure:
    """struct llama_flash_prompt_hooks, which calls `prompts`."""

    def view(tokens: int, n: int) -> Tokens:
        return np.ctypeslib.as_array(ctypes.cast(tokens, ctypes.POINTER(ctypes.c_int32)), (n,))

    def recall(
        context: int, seq: int, tokens: int, n: int, n_past: int, other: int, n_other: int, adapters: bytes
    ) -> int:
        try:
            return prompts.recall(context, seq, view(tokens, n), n_past, other, n_other, adapters.decode())
        except Exception:  # C++ called it; what was there may be half changed
            logger.exception("a prompt was not recalled")
            clear(context, seq)
            return 0

    def keep(context: int, seq: int, tokens: int, n: int, stamp: int, idle: bool, adapters: bytes) -> bool:
        try:
            return prompts.keep(context, seq, lambda: view(tokens, n), n, stamp, idle, adapters.decode())
        except Exception:
            logger.exception("a prompt was not kept")
            return False

    return _PromptHooks(prompts.block, _Recall(recall), _Keep(keep))


def _tell(library: Any, pages: Pages) -> Any:
    def tell(page: int, to: int) -> None:
        try:
            text = json.dumps(pages.health()) if page == _HEALTH else pages.metrics()
        except Exception:  # C++ called it; the server's own page is told
            logger.exception("statistics cannot be told")
            return
        data = text.encode()
        library.llama_flash_serve_write(to, data, len(data))

    return _Tell(tell)


def _make_drafts(drafts: Drafts) -> Any:
    def make(n_generating: int, asked: Any, n: int, prompts: Any, n_prompts: int) -> None:
        texts = [
            (each.sequence, np.ctypeslib.as_array(each.text, (each.n_text,)), each.n_max, each.n_room)
            for each in (asked[i] for i in range(n))
        ]
        ahead = [(each.sequence, each.n_tokens) for each in (prompts[i] for i in range(n_prompts))]
        for i, draft in enumerate(drafts(n_generating, texts, ahead)):
            asked[i].n_tokens = len(draft)
            for j, token in enumerate(draft.tolist()):
                asked[i].tokens[j] = token

    return _MakeDrafts(make)


def _library() -> Any:
    try:
        library = shipped(_LIBRARY)
        library.llama_flash_serve.restype = ctypes.c_int
        library.llama_flash_serve.argtypes = (
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, _Tell),
            *(ctypes.c_void_p, ctypes.c_void_p, _MakeDrafts, _HoldsPrompts),
        )
        library.llama_flash_serve_write.restype = None
        library.llama_flash_serve_write.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        library.llama_flash_serve_template.restype = ctypes.c_bool
        library.llama_flash_serve_template.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
        library.llama_flash_serve_stop.restype = None
        library.llama_flash_serve_stop.argtypes = ()
    except (OSError, AttributeError) as error:
        raise FlashError(f"the server's library cannot be loaded: {error}") from None
    return library
