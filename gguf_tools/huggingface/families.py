"""Which architectures are known, and by what names their configurations go."""

from __future__ import annotations

from collections.abc import Callable, Container

from gguf_tools.huggingface.config import Config
from gguf_tools.huggingface.falcon import plan_falcon
from gguf_tools.huggingface.llama import (
    plan_arcee,
    plan_bamboo,
    plan_llama,
    plan_minicpm,
    plan_mistral,
    plan_nemotron,
    plan_sparsellama,
)
from gguf_tools.huggingface.opt import plan_opt
from gguf_tools.huggingface.plan import Plan

Planner = Callable[[Config, Container[str]], Plan]  # configuration, names of the weights

_BY_MODEL_TYPE: dict[str, Planner] = {
    "opt": plan_opt,
    "llama": plan_llama,
    "mistral": plan_mistral,
    "sparsellama": plan_sparsellama,
    "bamboo": plan_bamboo,
    "turbosparse": plan_bamboo,
    "minicpm": plan_minicpm,
    "falcon": plan_falcon,
    "RefinedWeb": plan_falcon,
    "RefinedWebModel": plan_falcon,
    "arcee": plan_arcee,
    "nemotron": plan_nemotron,
}
# a model that says it is one of these is one, also where model_type names what it was derived from
_BY_ARCHITECTURE: dict[str, Planner] = {"BambooForCausalLM": plan_bamboo}


def plan_for(config: Config, names: Container[str]) -> Plan:
    """Raises GgufToolsError for an unknown architecture, and for what the engine would not compute as it should."""
    if config.has("quantization_config"):
        raise config.error("is there: convert the checkpoint from which it was quantised", "quantization_config")
    architectures = config.values.get("architectures")
    for architecture in architectures if isinstance(architectures, list) else []:
        if isinstance(architecture, str) and architecture in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[architecture](config, names)
    model_type = config.text("model_type")
    if model_type not in _BY_MODEL_TYPE:
        raise config.error(f"is {model_type!r:.60}, known: {', '.join(_BY_MODEL_TYPE)}", "model_type")
    return _BY_MODEL_TYPE[model_type](config, names)
