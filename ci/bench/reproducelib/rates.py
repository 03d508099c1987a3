"""Figure 2: random reads past the page cache by chunk size and number in flight, with the reader that decoding uses."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from llama_flash.native.calls import probe_reads

CHUNKS = tuple(4096 << i for i in range(9))  # 4 KiB to 1 MiB
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
_ROUNDS = 3

Rates = Mapping[tuple[int, int], float]  # (chunk, depth) -> bytes per second


def measure_rates(path: Path, seconds: float, report: Callable[[str], None]) -> Rates:
    """seconds: for each size and depth, spread over rounds, the median of which evens out the device's drift."""
    measured: dict[tuple[int, int], list[float]] = {(chunk, depth): [] for chunk in CHUNKS for depth in DEPTHS}
    for i in range(_ROUNDS):
        report(f"random reads, round {i + 1} of {_ROUNDS}")
        for (chunk, depth), values in measured.items():
            probe = probe_reads(path, chunk, depth, seconds / _ROUNDS)
            values.append(probe.bytes / (probe.ns / 1e9))
    return {key: statistics.median(values) for key, values in measured.items()}


def rate_of(rates: Rates, size: float) -> float:
    """Bytes per second of reads of `size` bytes on average, at the best depth: between the sizes next to it."""
    best = {chunk: max(rate for (other, _), rate in rates.items() if other == chunk) for chunk, _ in rates}
    below = max((chunk for chunk in best if chunk <= size), default=min(best))
    above = min((chunk for chunk in best if chunk >= size), default=max(best))
    if below >= above:
        return best[below]
    share = math.log(size / below) / math.log(above / below)
    return math.exp((1 - share) * math.log(best[below]) + share * math.log(best[above]))


def write_csv(rates: Rates, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["chunk_bytes", "reads_in_flight", "bytes_per_second"])
        writer.writerows([chunk, depth, round(rate)] for (chunk, depth), rate in rates.items())
