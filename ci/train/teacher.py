"""A shipped model as a teacher: its draft model begins with what it knows, and may learn what it expects next.

What lives here: reading the weights back from the GGUF file, where a student begins, and the loss. Not here: the steps
(train.py).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import gguf_tensors
from model import FORMS, LanguageModel

__all__ = ["Teacher"]


class Teacher:
    """Of the form `arcee`. Raises SystemExit: the file is not one of that form."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._model = LanguageModel(FORMS["arcee"])
        weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors
        }
        state = self._model.state_dict()
        for name in state:
            ((target, _),) = gguf_tensors({name: state[name]})
            if target not in weights:
                raise SystemExit(f"{path}: has no {target}: a teacher is of the form arcee")
            state[name] = torch.from_numpy(np.array(weights[target])).view(state[name].shape)
        self._model.load_state_dict(state)
        self._model.to(device).eval()

    @torch.no_grad()
    def start(self, student: LanguageModel) -> None:
        """Gives a student of the same width embedding, output and norms, and of the first layers attention and the
        neurons whose columns of down are the longest."""
        ours, theirs = student.state_dict(), self._model.state_dict()
        for name, tensor in ours.items():
            source = theirs[name]
            if source.shape != tensor.shape:
                block = name.split("ffn.")[0]
                kept = theirs[f"{block}ffn.down.weight"].norm(dim=0).topk(student.config.n_ff).indices.sort().values
                source = source[kept] if "up" in name else source[:, kept]
            tensor.copy_(source)

    def loss(self, student: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Mean cross-entropy, in nats per token, of the student's next token against the teacher's distribution.

        tokens: [batch, time]; the student's logits are [batch, time - 1, n_vocab].
        """
        with torch.no_grad():
            wanted = self._model(tokens[:, :-1], dtype).flatten(0, 1).float().softmax(-1)
        said = student(tokens[:, :-1], dtype).flatten(0, 1).float()
        return F.cross_entropy(said, wanted)
