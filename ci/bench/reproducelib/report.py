"""Tables 2 and 3 as text and as Markdown, beside the paper's figures as ratios to naive."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from reproducelib import paper
from reproducelib.ladder import Row

_Cells = list[list[str]]


def table_2(rows: Sequence[Row], model_bytes: int) -> Markdown:
    """I/O of each rung."""
    naive = _named(rows, "naive")
    cells = []
    for row in rows:
        theirs = paper.TABLE_2.get(row.rung.name)
        per_read = row.read / row.reads if row.read and row.reads else None
        cells.append(
            [
                row.rung.title,
                _number(row.dram, 1e9, ".2f"),
                _number(row.read, 1e6, ".0f"),
                _share(row.read, float(model_bytes)),
                _share(theirs.read_gb, paper.MODEL_GB) if theirs else "",
                _number(per_read, 1024, ".1f"),
                _number(row.rate, 1e9, ".2f"),
                f"{theirs.gb_s:.2f}" if theirs else "",
                _number(row.io, 1e-3, ".1f"),
                _share(row.io, naive.io),
                _share(theirs.io_ms, paper.TABLE_2["naive"].io_ms) if theirs else "",
                _number(row.waited, 1e-3, ".1f"),
                _number(row.hit_rate, 0.01, ".1f"),
                _number(row.newly_active, 0.01, ".2f"),
                _number(row.tok_s, 1, ".2f"),
            ]
        )
    columns = ["rung", "peak GB", "MB per token", "of the model", "(paper)", "KiB per read", "GB/s", "(paper)"]
    columns += ["I/O ms", "of naive", "(paper)", "waited ms", "hits %", "new neurons %", "tok/s"]
    note = (
        "Per token. I/O ms: reading so many bytes in pieces of that size at the raw device's rate (GB/s); waited: what "
        "of it was not hidden behind computing. Naive: its time less that without a cap. New neurons: active, and not "
        "so for any of the 5 tokens before. Paper: OPT 6.7B, 16 bit, M1 Max."
    )
    return Markdown("Table 2: I/O by rung", columns, cells, note)


def table_3(rows: Sequence[Row]) -> Markdown:
    """Where a token's time goes."""
    naive = _named(rows, "naive")
    cells = []
    for row in rows:
        theirs = paper.TABLE_3.get(row.rung.name)
        cells.append(
            [
                row.rung.title,
                *(_number(value, 1e-3, ".1f") for value in (row.waited, row.memory, row.compute, row.predict)),
                _number(row.total, 1e-3, ".1f"),
                _share(row.total, naive.total),
                _share(theirs.total, paper.TABLE_3["naive"].total) if theirs else "",
                _times(naive.total, row.total),
                _times(paper.TABLE_3["naive"].total, theirs.total) if theirs else "",
            ]
        )
    columns = ["rung", "I/O", "memory management", "compute", "of it prediction", "total"]
    columns += ["of naive", "(paper)", "times naive", "(paper)"]
    note = "I/O: waited for. Paper: OPT 6.7B on the M1 Max' CPU, 32 bit; its naive I/O is the best theoretical one."
    return Markdown("Table 3: milliseconds per token", columns, cells, note)


class Markdown:
    """A table that can be printed and written."""

    def __init__(self, title: str, columns: list[str], cells: _Cells, note: str) -> None:
        self.title, self.columns, self.cells, self.note = title, columns, cells, note

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption=self.note, caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.cells:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        lines = [self.columns, ["---", *["--:"] * (len(self.columns) - 1)], *self.cells]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{table}\n\n{self.note}\n"


def _named(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.rung.name == name)


def _number(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)


def _share(value: float | None, whole: float | None) -> str:
    return "-" if value is None or not whole else f"{value / whole:.3f}"


def _times(whole: float | None, value: float | None) -> str:
    return "-" if whole is None or not value else f"{whole / value:.2f}"
