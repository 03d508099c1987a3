"""What llama-server loads and computes, through FlashSession: the same steps as those of llama_cpp.Llama.

`load` is open_session and the load itself, `init` the context and attach, `begin` and `end` are around each call of the
engine. All of them run in the server's thread; none raises, for C++ called them: what went wrong is kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import FlashError, FlashWorkerError
from ..model.load import load_model, new_context
from ..native.server import FAILED, Tokens, copy_of, write_back
from ..options import FlashOffload
from ..session.session import FlashSession, open_session
from ..session.steps import beside_drafts

__all__ = ["EngineDriver"]

logger = logging.getLogger("llama_flash")

_STOPPED = "the computation was stopped"


class EngineDriver:
    """Of one server; a native.server.Driver.

    Args:
        flash_offload: as `Llama` takes it.
        loaded: is called with each session, when its context exists.
        lora_path: adapter that the server will apply.
        aside: bytes that the server will keep beside the context, as in ContextShape.

    Attributes:
        failure: what ended the last load.
        drafts: who guesses at the tokens to come; None where that is off.
        follows: whether a head of the model's file may do that, which has to see what is computed.
    """

    def __init__(
        self,
        flash_offload: bool | Mapping[str, Any] | FlashOffload,
        loaded: Callable[[FlashSession], None],
        lora_path: str | None = None,
        aside: int = 0,
    ) -> None:
        self.failure: BaseException | None = None
        self._flash_offload, self._loaded = flash_offload, loaded
        self._lora_path, self._aside = lora_path, aside
        options = FlashOffload.coerce(flash_offload)
        self.drafts = None if options is None or options.draft == "off" else self.make_drafts
        self.follows = options is not None and options.draft in ("auto", "mtp")
        self._paths: dict[int, str] = {}  # by model
        self._sessions: dict[int, FlashSession] = {}  # by model
        self._waiting: set[int] = set()  # models whose session waits for its context
        self._contexts: dict[int, tuple[int, FlashSession]] = {}  # by context: its model, and the session

    @property
    def loss(self) -> FlashWorkerError | None:
        """Why no call can succeed any more: a worker is lost. The model has to be loaded again."""
        for session in list(self._sessions.values()):
            if (loss := session.loss) is not None:
                return loss
        return None

    def close(self) -> None:
        """What is left of a load that failed."""
        for model in list(self._sessions):
            self.freeing(model)
            self.freed(model)

    def load(self, path: str, model_params: Any, context_params: Any) -> int:
        try:
            return self._load(path, model_params, context_params)
        except BaseException as failure:
            self.failure = failure
            return 0

    def init(self, model: int, context_params: Any) -> int:
        try:
            return self._init(model, context_params)
        except BaseException as failure:
            self.failure = failure
            return 0

    def freeing(self, model: int) -> None:
        if model in self._sessions:
            self._sessions[model].leave_context()

    def freed(self, model: int) -> None:
        session = self._sessions.pop(model, None)
        self._paths.pop(model, None)
        self._waiting.discard(model)
        self._contexts = {context: of for context, of in self._contexts.items() if of[0] != model}
        if session is not None:
            try:
                session.close()
            except Exception:
                logger.exception("a session did not close")

    def even(self, context: int, counts: Sequence[int]) -> Sequence[int]:
        if context not in self._contexts:
            return counts
        try:
            return self._contexts[context][1].even(counts)
        except Exception:
            logger.exception("tokens of %d sequences are computed as they are", len(counts))
            return counts

    def begin(self, context: int, n_tokens: int, n_sequences: int) -> None:
        if context not in self._contexts:
            return
        try:
            self._contexts[context][1].before_call(n_tokens)
        except FlashWorkerError:  # `end` says it, and the results are void
            return
        except Exception:  # of a forked child, whose calls are aborted
            logger.exception("before a call of %d tokens", n_tokens)

    def end(self, context: int, n_tokens: int, n_sequences: int, code: int) -> tuple[int, str]:
        if context not in self._contexts:
            return code, ""
        try:
            self._contexts[context][1].after_call(n_tokens, n_sequences)
        except FlashError as error:
            return FAILED, str(error)
        except Exception as error:
            logger.exception("after a call of %d tokens", n_tokens)
            return FAILED, str(error)
        # 2, "aborted", would be taken for a full KV cache, and half of the batch be tried
        return (FAILED, _STOPPED) if code == 2 else (code, "")

    def computed(self, context: int, tokens: Tokens, positions: Tokens, sequences: Tokens) -> None:
        if context not in self._contexts:
            return
        try:
            self._contexts[context][1].follow(tokens, positions, sequences)
        except Exception:  # C++ called it; without a draft everything is right, too
            logger.exception("no drafts behind %d tokens", len(tokens))

    def make_drafts(
        self, n_generating: int, texts: Sequence[tuple[int, Tokens, int, int]], prompts: Sequence[tuple[int, int]] = ()
    ) -> Sequence[Tokens]:
        """For a native.server.Drafts."""
        try:
            for session in self._sessions.values():
                if session.drafter is not None:
                    beside = beside_drafts(session.steps, n_generating, [number for number, *_ in texts], prompts)
                    return session.drafter.draft(texts, *beside)
        except Exception:  # C++ called it; without a draft everything is right, too
            logger.exception("no drafts for %d sequences", len(texts))
        return [np.zeros(0, np.intc) for _ in texts]

    def _keeps_scores(self, context_params: Any) -> bool:
        """Whether the caller keeps logits of all tokens of a context, beside the engine's."""
        return False

    def _scores_bytes(self, session: FlashSession, context_params: Any) -> int:
        return 4 * int(context_params.n_ctx) * session.meta.n_vocab if self._keeps_scores(context_params) else 0

    def _load(self, path: str, model_params: Any, context_params: Any) -> int:
        kept = copy_of(context_params)  # the session asks it as long as it lives
        session = open_session(
            self._flash_offload,
            model_path=path,
            model_params=model_params,
            context_params=kept,
            logits_all=self._keeps_scores(context_params),
            lora_path=self._lora_path,
            aside=self._aside,
            verbose=False,
        )
        write_back(kept, context_params)
        try:
            with contextlib.nullcontext() if session is None else session.loading():
                model = load_model(path, model_params)
        except BaseException:
            if session is not None:
                session.close()
            raise
        self._paths[model] = path
        if session is not None:
            self._sessions[model] = session
            self._waiting.add(model)
        return model

    def _init(self, model: int, context_params: Any) -> int:
        context = new_context(self._paths.get(model, "the model"), model, context_params)
        session = self._sessions.get(model)
        if session is None:
            return context
        if model in self._waiting:  # a second context of the same model finds the memory divided
            self._waiting.discard(model)
            try:
                session.attach(context, self._scores_bytes(session, context_params))
            except BaseException:
                import llama_cpp

                llama_cpp.llama_free(context)
                raise
            self._loaded(session)
        self._contexts[context] = (model, session)
        return context
