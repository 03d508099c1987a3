"""Synthetic GGUF models that llama.cpp loads: any form, size, quantisation and routing.

Every tensor, layer and expert differs and the output is not tied to the embedding, so a wrong read changes the logits.
The weights are random: speed and exactness can be measured with them, quality cannot. A sparse OPT has its activation
statistics planted (opt.py). A real model can be made larger without changing what it answers (inflate.py).
"""

from gguf_tools.synthetic.codes import token_stream
from gguf_tools.synthetic.forms import ARCHITECTURES, DENSE_FORMS, MOE_FORMS, Shape
from gguf_tools.synthetic.inflate import Inflated, inflate
from gguf_tools.synthetic.opt import OptModel, OptShape
from gguf_tools.synthetic.opt_writer import write_opt
from gguf_tools.synthetic.presets import PRESETS, SKEWED, tiny
from gguf_tools.synthetic.types import Types, everything, types_named
from gguf_tools.synthetic.writer import SyntheticModel, write

__all__ = [
    "ARCHITECTURES",
    "DENSE_FORMS",
    "MOE_FORMS",
    "PRESETS",
    "SKEWED",
    "Inflated",
    "OptModel",
    "OptShape",
    "Shape",
    "SyntheticModel",
    "Types",
    "everything",
    "inflate",
    "tiny",
    "token_stream",
    "types_named",
    "write",
    "write_opt",
]
