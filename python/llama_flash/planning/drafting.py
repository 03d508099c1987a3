"""Where drafts come from, as a model's file decides it: before it is loaded, for loads and for plans."""

from __future__ import annotations

from dataclasses import replace

from ..errors import FlashError
from ..model.gguf import GgufMeta
from ..model.mtp import drafting_head, mtp_head, takes_too_many, without_mtp
from ..options import FlashOffload
from ..sizes import format_size

__all__ = ["chosen", "no_room", "rounds_otherwise"]

_ROUNDED_TYPES = (0, 1)  # enum ggml_type, F32 and F16: of KV caches for which the flash kernel has several ways


def rounds_otherwise(flash_attn: bool, type_k: int) -> bool:
    """Whether several tokens in a pass are rounded otherwise than one. type_k: enum ggml_type."""
    return flash_attn and type_k in _ROUNDED_TYPES


def chosen(options: FlashOffload, meta: GgufMeta, *, possible: bool, rounded: bool) -> tuple[FlashOffload, GgufMeta]:
    """The options with `draft` as it is for this file: never "auto", and "mtp" only where its head will be used; and
    what of the file is loaded then.

    Args:
        possible: text is generated, with several tokens in a pass.
        rounded: several tokens in a pass are rounded otherwise than one.

    Raises:
        FlashError: `draft` is "mtp", and the file has no head.
    """
    if not possible:
        options = replace(options, draft="off")
    if options.draft == "mtp" and (mtp_head(meta) is None or takes_too_many(meta)):
        raise FlashError(
            f"draft: {meta.files[0]} has no head of multi-token prediction that the engine can compute: use a file "
            "that was converted with it, or draft='ngram' (--draft ngram)"
        )
    if options.draft in ("auto", "mtp"):
        usable = drafting_head(meta) is not None and not options.workers and not rounded
        options = replace(options, draft="mtp" if usable else "ngram")
    # files of workers are compared as they are
    return options, meta if options.draft == "mtp" or options.workers else without_mtp(meta)


def no_room(n_bytes: int) -> str:
    """Why drafts come from the text where the file has a head of so many bytes, and "auto" was asked for."""
    return f"the file's head takes {format_size(n_bytes)}, for which the budget is not sure to have room"
