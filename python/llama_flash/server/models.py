"""The models that are served: upstream's LlamaProxy, which has one of them loaded at a time, and what each has done."""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp.server.model import LlamaProxy

from ..errors import FlashError
from ..model.gguf import check_vocabulary, read_gguf
from ..session.session import FlashSession
from .clients import stop_if_gone
from .figures import Tally
from .settings import ServedModel

__all__ = ["Models"]


class Models(LlamaProxy):  # type: ignore[misc]
    """Used in the event loop's thread only, as upstream uses its own."""

    def __init__(self, models: list[ServedModel]) -> None:
        self.tallies = {str(model.model_alias): Tally() for model in models}
        self._session: tuple[str, FlashSession] | None = None
        super().__init__(models)

    def __call__(self, model: str | None = None) -> llama_cpp.Llama:
        """The model of that name; the first one if there is none. One that has lost a worker is loaded anew.

        Raises:
            FlashError: it cannot be loaded.
        """
        if self._session is not None and self._session[1].loss is not None and self.loaded is not None:
            self._unload()
        try:
            return super().__call__(model)
        except ValueError as error:  # would be told as the client's mistake
            raise FlashError(str(error)) from error

    @property
    def loaded(self) -> str | None:
        """Name of the model that is loaded."""
        return self._current_model_alias if getattr(self, "_current_model", None) is not None else None

    def stats(self, name: str) -> dict[str, Any] | None:
        """FlashSession.describe of a model that is loaded and has flash_offload."""
        if self._session is None or self._session[0] != name or self.loaded != name:
            return None
        return self._session[1].describe()

    def _unload(self) -> None:
        self._current_model.close()
        self._current_model: Any = None

    def load_llama_from_model_settings(self, settings: ServedModel) -> llama_cpp.Llama:
        """Upstream's, with the context that the model was trained with if none is set.

        Raises:
            FlashError: see llama_cpp.Llama.
        """
        if self._session is not None:  # of the model that makes room for this one
            name, session = self._session
            self._session = None
            self.tallies[name].add(session.describe())
        meta = None if settings.hf_model_repo_id is not None else read_gguf(settings.model)
        if meta is not None:
            check_vocabulary(meta)
        if "n_ctx" not in settings.model_fields_set and meta is not None:
            trained = meta.number("context_length", settings.n_ctx)
            settings = settings.model_copy(update={"n_ctx": min(trained, settings.n_ctx)})
        llama = super().load_llama_from_model_settings(settings)
        llama.model_path = settings.model_alias  # what answers call it where the question has no name
        tally = self.tallies[str(settings.model_alias)]
        tally.loads += 1
        if llama.flash is not None:
            self._session = str(settings.model_alias), llama.flash
            llama.flash.on_call(stop_if_gone)
            llama.flash.on_event(lambda event: tally.events.update([event.kind]))
        return llama
