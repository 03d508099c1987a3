"""Which function a checkpoint has between up (and gate) and down, and whether the engine computes it."""

from __future__ import annotations

from collections.abc import Mapping

from gguf_tools.format import Activation
from gguf_tools.huggingface.config import Config


def read_activation(
    config: Config, *keys: str, known: Mapping[str, str], dense: str = "", default: str | None = None
) -> tuple[Activation | None, str]:
    """The activation, and what the checkpoint calls it. None: every neuron is always active.

    known: its name -> docs/reference/format.md's. dense: the one that the architecture's graph computes where the file
    names none. default: what the architecture has where its configuration does not say it; None: it must say it.
    Raises GgufToolsError, naming it, for an activation that the engine would compute wrongly.
    """
    name = config.text(*keys) if default is None else config.text(*keys, default=default)
    if name in known:
        threshold = config.number("hidden_act_param") if known[name] == "fatrelu" else None
        return Activation(known[name], threshold), name
    if name == dense or (name == "swish" and dense == "silu"):
        return None, name
    key = next((key for key in keys if config.has(key)), keys[0])
    computed = ", ".join([*known, dense] if dense else known)
    raise config.error(
        f"activation {name!r}: the engine would compute it wrongly, for this architecture it knows {computed} "
        "(if the model was trained with another one than its config.json says, correct it there)",
        key,
    )
