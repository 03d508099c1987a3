"""What is in a GGUF file: types, sizes, bundles and predictors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType

from gguf_tools.format import EXPERTS, FlashInfo, bias_name, read_flash, weight_name
from gguf_tools.source import Source, data_bytes, open_gguf

SECTORS = (512, 4096)  # bytes


@dataclass(frozen=True)
class Total:
    """Some of a file's tensors."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class SectorReads:
    """What it costs to read one record at a time, in whole sectors."""

    sector: int  # bytes
    sectors_per_record: float  # on average over the records of a layer
    over_read: float  # bytes read besides the record, as a share of the record


@dataclass(frozen=True)
class PartListing:
    """A part of a record."""

    name: str
    type: str
    offset: int  # bytes from the record's begin
    bytes: int


@dataclass(frozen=True)
class LayerListing:
    """A layer that has a bundle."""

    layer: int
    n_expert: int  # 0: dense
    n_ff: int  # of a layer of experts: of each expert
    record_bytes: int
    bundle_bytes: int
    predictor_rank: int  # 0: none
    predictor_bytes: int


@dataclass(frozen=True)
class FlashListing:
    """What the flash format adds to a file."""

    activation: str
    threshold: float | None
    layout: str
    parts: list[PartListing]
    record_bytes: int
    reads: list[SectorReads]  # a record's; of layout split: a row's, several of which make a record
    recall: float | None
    layers: list[LayerListing]


@dataclass(frozen=True)
class Listing:
    """A model."""

    files: list[str]
    architecture: str
    file_bytes: int
    data_bytes: int  # of all tensors
    by_role: dict[str, Total]
    by_type: dict[str, Total]
    flash: FlashListing | None
    values: dict[str, object]  # the key-values flash.* and of the activation


_ROLES = (  # the first that matches
    ("bundles", re.compile(r"blk\.\d+\.ffn_bundle(_exps)?\.weight")),
    ("predictors", re.compile(r"blk\.\d+\.ffn_predictor(_in|_out)?\.\w+")),
    ("experts", re.compile(r"blk\.\d+\.ffn_\w+_exps\.\w+")),
    ("feed-forward", re.compile(r"blk\.\d+\.ffn_(gate|up|down)(_shexp)?\.\w+")),
    ("attention", re.compile(r"blk\.\d+\.attn_\w+\.\w+")),
    ("embeddings and output", re.compile(r"(token_embd|position_embd|output)\.\w+")),
    ("other", re.compile(r".*", re.DOTALL)),
)


def describe(path: str | os.PathLike[str]) -> Listing:
    """Lists a GGUF file, or all shards of a model, and checks it.

    Raises GgufToolsError if it is damaged or not as docs/reference/format.md says, OSError if it cannot be opened.
    """
    path = Path(path)
    source = open_gguf(path)
    info = read_flash(source, path)
    sizes = {name: data_bytes(tensor) for name, tensor in source.tensors.items()}
    kinds = {name: tensor.kind.name for name, tensor in source.tensors.items()}
    arch = source.values.get("general.architecture")
    architecture = arch.value if arch is not None and arch.type == GGUFValueType.STRING else ""
    activation = f"{architecture}.feed_forward_activation"
    return Listing(
        files=[str(file) for file in source.files],
        architecture=architecture,
        file_bytes=sum(file.stat().st_size for file in source.files),
        data_bytes=sum(sizes.values()),
        by_role=_totals((_role(name), size) for name, size in sizes.items()),
        by_type=_totals((kinds[name], size) for name, size in sizes.items()),
        flash=_flash(source, info, sizes) if info else None,
        values={key: kv.value for key, kv in source.values.items() if key.startswith(("flash.", activation))},
    )


def sector_reads(record_bytes: int, sector: int) -> SectorReads:
    """Reads of single records that lie one after the other from the begin of a sector on, without padding."""
    period = sector // math.gcd(record_bytes, sector)  # then they lie on the sectors as before
    begins = [i * record_bytes for i in range(period)]
    touched = sum((begin + record_bytes - 1) // sector - begin // sector + 1 for begin in begins) / period
    return SectorReads(sector, touched, touched * sector / record_bytes - 1)


def _role(name: str) -> str:
    return next(role for role, pattern in _ROLES if pattern.fullmatch(name))


def _totals(items: Iterable[tuple[str, int]]) -> dict[str, Total]:
    totals: dict[str, Total] = {}
    for name, size in items:
        before = totals.get(name, Total(0, 0))
        totals[name] = Total(before.tensors + 1, before.bytes + size)
    return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))


def _flash(source: Source, info: FlashInfo, sizes: dict[str, int]) -> FlashListing:
    bundle, predictor = info.bundle, info.predictor
    layers = []
    for il, n_ff in info.n_ff.items():
        names = (weight_name(il, "predictor_in"), weight_name(il, "predictor_out"), bias_name(il, "predictor"))
        layers.append(
            LayerListing(
                layer=il,
                n_expert=info.n_expert.get(il, 0),
                n_ff=n_ff,
                record_bytes=bundle.record_bytes,
                bundle_bytes=sizes[weight_name(il, f"bundle{EXPERTS if il in info.n_expert else ''}")],
                predictor_rank=predictor.ranks[il] if predictor else 0,
                predictor_bytes=sum(sizes.get(name, 0) for name in names),
            )
        )
    read_bytes = bundle.record_bytes if bundle.layout == "bundled" else bundle.parts[-1].row_bytes
    return FlashListing(
        activation=info.activation.name,
        threshold=info.activation.threshold,
        layout=bundle.layout,
        parts=[PartListing(part.name, part.kind.name, part.offset, part.row_bytes) for part in bundle.parts],
        record_bytes=bundle.record_bytes,
        reads=[sector_reads(read_bytes, sector) for sector in SECTORS],
        recall=predictor.recall if predictor else None,
        layers=layers,
    )
