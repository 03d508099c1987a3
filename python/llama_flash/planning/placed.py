"""Which weights are on flash: what placement.py answers, and everybody after it goes by."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..budget.rooms import Breakdown
from ..model.bundles import Bundles
from ..model.gguf import TensorInfo

__all__ = ["Plan"]

_LAYER = re.compile(r"((?:.*\.)?blk\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Plan:
    """What will be on flash, and why."""

    mode: Literal["flash", "resident", "nothing"]  # nothing: the file has no weight that could be left on flash
    tensors: tuple[TensorInfo, ...]  # the flash tensors
    resident_bytes: int  # weights that stay in DRAM
    expert_bytes: int  # on flash
    panel_bytes: int  # on flash
    expected: Breakdown  # estimates; the flash part is empty
    bundles: Bundles | None = None  # neuron bundles, always on flash
    tables: Mapping[str, bool] = field(default_factory=dict)  # flash tensors of which rows are read; True: only rows
    row_bytes: int = 0  # of those of which only rows are read, on flash
    on_device: frozenset[str] = frozenset()  # weights in the memory of devices
    staging: int = 0  # bytes through which they get there
    routers: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # on devices, by experts on flash; and norms
    heap_bytes: int = 0  # that copies of these take, to read ahead by, and the way to devices leaves in use

    @property
    def neuron_bytes(self) -> int:
        """Of bundles, on flash."""
        return self.bundles.neuron_bytes if self.bundles else 0

    @property
    def n_neurons(self) -> int:
        """In bundles, of all layers."""
        return self.bundles.n_neurons if self.bundles else 0

    @property
    def flash_bytes(self) -> int:
        return self.expert_bytes + self.panel_bytes + self.row_bytes + self.neuron_bytes

    def patterns(self) -> list[str]:
        """Regular expressions (ECMAScript) that match the names of the flash tensors and no others."""
        layers: dict[tuple[str, str], list[int]] = defaultdict(list)
        plain = []
        for name in [*(tensor.name for tensor in self.tensors), *(self.bundles.part_names() if self.bundles else ())]:
            if match := _LAYER.fullmatch(name):
                layers[match[1], match[3]].append(int(match[2]))
            else:
                plain.append(name)
        return [
            *(
                f"^{re.escape(before)}({'|'.join(map(str, sorted(which)))}){re.escape(after)}$"
                for (before, after), which in layers.items()
            ),
            *(f"^{re.escape(name)}$" for name in plain),
        ]
