"""Whether drafts are made for a model, and where the guesses come from."""

from __future__ import annotations

from typing import Any

from ..errors import FlashError
from ..options import FlashOffload
from ..planning.drafting import rounds_otherwise

__all__ = ["checked", "source_of"]


def source_of(options: FlashOffload, context_params: Any, predictor: str, model: Any) -> tuple[str, str]:
    """Where guesses come from ("ngram", "mtp", "model", "off"), and why they do not come where that was asked for.

    Args:
        context_params: llama_context_params.
        predictor: how active neurons are found.
        model: llama_model pointer.
    """
    if options.draft == "off" or bool(context_params.embeddings):
        return "off", ""
    reason = _reason(context_params, predictor, model)
    if reason:
        return "off", reason
    if options.drafts_by_model:
        return "model", ""
    return ("mtp" if options.draft == "mtp" else "ngram"), ""


def _reason(context_params: Any, predictor: str, model: Any) -> str:
    """Why drafts would change the answer, or cannot be taken back; "" where they can be made."""
    import llama_cpp as engine

    if engine.llama_model_is_recurrent(model) or engine.llama_model_is_hybrid(model):
        return "the model's recurrent state cannot go back to where a draft was wrong"
    flash_attn = context_params.flash_attn_type == engine.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if rounds_otherwise(flash_attn, context_params.type_k):
        return "with flash_attn=True, several tokens in a pass are rounded otherwise than one"
    if predictor == "lowrank":
        return "with predictor='lowrank', other neurons are computed for several tokens in a pass than for one"
    return ""


def checked(options: FlashOffload) -> None:
    """Raises FlashError where `draft` names a file that cannot be read."""
    if options.drafts_by_model:
        try:
            with open(options.draft, "rb"):
                pass
        except OSError as error:
            raise FlashError(f"draft: {options.draft}: {error.strerror}") from None
