"""A plan where layers of the model lie on devices with memory of their own: what of it is left in main memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace

from ..model.gguf import GgufMeta
from ..model.graphs import Graphs
from ..model.shape import ContextShape
from ..native.calls import load_staging
from ..options import FlashOffload
from .placed import Plan
from .reads import experts_ahead

__all__ = ["at_devices"]

_COPIES = 2  # of a weight on its way to a device that does not take it from pinned memory: as read, and as sent


def at_devices(
    meta: GgufMeta,
    plan: Plan,
    options: FlashOffload,
    shape: ContextShape,
    graphs: Graphs,
    ask: Callable[[GgufMeta, ContextShape], Graphs],
) -> tuple[Graphs, Plan]:
    """The graphs of a load by the plan, and the plan without the weights that lie on devices.

    graphs: as they would be if nothing was on flash.
    """
    if shape.devices is None:
        return graphs, plan
    routers = graphs.routers  # whose way to their experts is not cut where those leave the device
    if plan.mode == "flash":  # what is on flash is computed here
        devices = replace(shape.devices, stays=tuple(plan.patterns()))
        graphs = ask(meta, replace(shape, devices=devices))
    sizes = {name: meta.tensors[name].size for name in graphs.on_device}
    gone = graphs.on_device - graphs.twice
    pinned, largest = load_staging() if sizes else 0, max(sizes.values(), default=0)
    given = _routers(plan, routers, graphs.on_device) if experts_ahead(options) else {}
    named = {name for pair in given.values() for name in pair if name}
    return graphs, replace(
        plan,
        resident_bytes=plan.resident_bytes - sum(sizes[name] for name in gone),
        on_device=gone,
        staging=pinned or _COPIES * largest,
        routers=given,
        heap_bytes=sum(meta.tensors[name].size for name in named) + (0 if pinned else largest),
    )


def _routers(
    plan: Plan, routers: Mapping[str, tuple[str, str]], on_device: Container[str]
) -> dict[str, tuple[str, str]]:
    """Those of experts on flash whose values ops cannot read; one entry each."""
    found: dict[str, tuple[str, str]] = {}
    for tensor in plan.tensors:
        router, norm = routers.get(tensor.name, ("", ""))
        if router in on_device and (router, norm) not in found.values():
            found[tensor.name] = router, norm
    return found
