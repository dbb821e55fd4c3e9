"""Writes a comparison: `comparison.md` for people, `.csv` and `.json` for programs, `.png` to look at."""

import csv
import html
import io
import re
from pathlib import Path

from flows.compare_plot import draw_comparison
from flows.compare_spec import DENSE, percent
from flows.comparison import (
    USAGE_TITLES,
    Cell,
    Comparison,
    Measure,
    Row,
    Table,
    after_pruning,
    after_recovery,
    show_perplexity,
)
from flows.workspace import write_bytes, write_json

NAME = "comparison"
OBJECTS = "objects.json"
"""Keys of all results that the comparison was made from, so that `surgeon clean` keeps them."""
FIELDS = (
    *("table", "row", "sparsity", "reached", "nonzero", "perplexity", "loss", "recovered", "tokens", "accepted"),
    *("statistics_s", "costs_mask_s", "update_s", "recovery_s", "peak_memory_gib", "shots", "error"),
)
_NOTICEABLE = 0.001
"""Difference between the sparsity reached and that asked for, from which the table says so."""


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes all files, each in one step."""
    write_bytes(folder / f"{NAME}.md", markdown(comparison).encode())
    write_bytes(folder / f"{NAME}.csv", long_form(comparison).encode())
    write_bytes(folder / f"{NAME}.png", draw_comparison(comparison))
    write_json(folder / f"{NAME}.json", comparison.metrics())
    write_json(folder / OBJECTS, comparison.objects)


def markdown(comparison: Comparison) -> str:
    """Title, protocol, one table of perplexities for each table of the file, and the plot."""
    parts = ["# Comparison", "", "Perplexity, lower is better; the best of each column is bold.", ""]
    parts += [f"- {name}: {plain(value)}" for name, value in comparison.protocol.items()]
    parts += ["", f"![perplexity against sparsity]({NAME}.png)", ""]
    for table in comparison.tables:
        parts += [f"## {plain(table.title)}", "", *_table(table, comparison.dense["perplexity"]), ""]
    parts += [
        "Seconds and peak memory are those of the results that a row uses, each counted once, when they were computed; "
        "rows that share results share them. Evaluations are not counted.",
    ]
    return "\n".join(parts) + "\n"


def long_form(comparison: Comparison) -> str:
    """One line a cell; the dense model is at sparsity 0."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for table in comparison.tables:
        dense = Cell(0.0, 0, 0.0, comparison.dense["perplexity"], comparison.dense["loss"])
        writer.writerow(_line(table.title, DENSE, dense))
        for row in table.rows:
            writer.writerows(_line(table.title, row.name, cell) for cell in row.cells)
    return out.getvalue()


def plain(text: str) -> str:
    """Text as one line of Markdown in which nothing is markup, also within a table."""
    one_line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(one_line, quote=False))


def _table(table: Table, dense: float) -> list[str]:
    measures: list[Measure] = [after_pruning, *([after_recovery] if table.has_recovery else [])]
    columns = [*_headings(table), *USAGE_TITLES]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    whole = [show_perplexity(dense)] * len(table.sparsities)
    nothing = ["-"] * len(table.sparsities) * (len(measures) - 1)
    lines.append(_cells([DENSE, *whole, *nothing, *["-"] * len(USAGE_TITLES)]))
    for row in table.rows:
        shown = [text for measure in measures for text in _perplexities(table, row, measure)]
        lines.append(_cells([plain(row.name), *shown, *row.usage.texts()]))
    missed = [
        f"{row.name} at {percent(cell.sparsity)}: {100 * cell.reached:.2f}%"
        for row in table.rows
        for cell in row.cells
        if cell.reached is not None and abs(cell.reached - cell.sparsity) > _NOTICEABLE
    ]
    lines += _listed("Sparsity reached, where it is not the one asked for:", missed)
    kept = [f"{r.name} at {percent(c.sparsity)}" for r in table.rows for c in r.cells if c.accepted is False]
    lines += _listed("Recovery did not help, so the pruned weights stayed:", kept)
    lines += _listed("Failed:", table.errors)
    return lines + _listed("Settings:", [f"{row.name}: {row.settings}" for row in table.rows])


def _headings(table: Table) -> list[str]:
    """Sparsities, and once more for what recovery made of them."""
    sparsities = [percent(sparsity) for sparsity in table.sparsities]
    if not table.has_recovery:
        return sparsities
    tokens = sorted({cell.tokens for row in table.rows for cell in row.cells if cell.tokens is not None})
    after = "recovered" if len(tokens) != 1 else f"recovered on {tokens[0]:,} tokens"
    return [*sparsities, *(f"{sparsity}, {after}" for sparsity in sparsities)]


def _perplexities(table: Table, row: Row, measure: Measure) -> list[str]:
    texts = []
    for column, cell in enumerate(row.cells):
        value = measure(cell)
        if value is None:
            texts.append("failed" if cell.error else "-")
        else:
            text = show_perplexity(value)
            texts.append(f"**{text}**" if value == table.best(column, measure) else text)
    return texts


def _cells(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _listed(heading: str, items: list[str]) -> list[str]:
    return ["", heading, "", *[f"- {plain(item)}" for item in items]] if items else []


def _line(table: str, row: str, cell: Cell) -> dict[str, object]:
    usage = cell.usage
    values = (
        *(table, row, cell.sparsity, cell.reached, cell.nonzero, cell.perplexity, cell.loss),
        *(cell.recovered, cell.tokens, cell.accepted),
        *(usage.statistics_s, usage.costs_mask_s, usage.update_s, usage.recovery_s, usage.peak_memory_gib),
        *(cell.shots, cell.error),
    )
    return dict(zip(FIELDS, values, strict=True))
