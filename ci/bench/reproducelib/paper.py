"""The paper's own figures: "LLM in a flash" (arXiv 2312.11514v3), OPT 6.7B with half its size in memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRung:
    """A row of table 2 (M1 Max, 16 bit)."""

    dram_gb: float
    read_gb: float  # per token
    gb_s: float
    io_ms: float


TABLE_2 = {
    "naive": PaperRung(0.0, 13.4, 6.10, 2196),
    "hybrid": PaperRung(6.7, 6.7, 6.10, 1090),
    "predictor": PaperRung(4.8, 0.9, 1.25, 738),
    "window": PaperRung(6.5, 0.2, 1.25, 164),
    "bundling": PaperRung(6.5, 0.2, 2.25, 87),
}
MODEL_GB = 13.4


@dataclass(frozen=True)
class PaperSplit:
    """A row of table 3 (M1 Max, CPU, 32 bit), milliseconds per token. Naive's I/O is the best theoretical one."""

    io: float
    memory: float
    compute: float
    total: float


TABLE_3 = {"naive": PaperSplit(2196, 0, 986, 3182), "bundling": PaperSplit(105, 58, 506, 669)}

# Appendix C.1, shares of a layer's neurons: predicted for a token, cached by its window, newly loaded by a token
PREDICTED, CACHED, NEWLY_LOADED = 0.10, 0.24, 0.024
CACHED_TOKENS = 5
