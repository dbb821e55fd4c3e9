"""Scores on downstream tasks as a table."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def render_downstream(found: dict[str, Any], console: Console) -> None:
    """The table of `surgeon evaluate --tasks`, with what it means below."""
    is_pair = len(found["models"]) == 2
    table = Table(title=Text(_title(found)), title_justify="left")
    names = ("dense", "pruned", "difference", "stderr") if is_pair else ("value", "stderr")
    for name in ("task", "metric", *names, "documents", "shots"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for row in found["rows"]:
        table.add_row(*downstream_row(row, is_pair=is_pair))
    console.print(table)
    for line in downstream_lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def downstream_row(row: dict[str, Any], *, is_pair: bool) -> list[str]:
    """The cells of a metric; an arrow says whether more or less of it is better."""
    arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
    if is_pair:
        numbers = [
            _number(row["dense"]),
            _number(row["pruned"]),
            _number(row["difference"], "+"),
            _number(row["stderr"]),
        ]
    else:
        numbers = [_number(row["model"]), _number(row["model_stderr"])]
    shots = "mixed" if row["shots"] is None else str(row["shots"])
    return [row["task"], row["metric"] + arrow, *numbers, f"{row['documents']:,}", shots]


def downstream_lines(found: dict[str, Any]) -> list[str]:
    """What has to be known about the numbers."""
    lines = []
    if len(found["models"]) == 2:
        lines.append(
            "stderr is that of the difference, over the same documents in both models; differences within two of it "
            "may be chance (the errors of each model are in the JSON)"
        )
    if found["limit"] is not None:
        lines.append(f"only the first {found['limit']} documents of each task: not comparable with published numbers")
    return lines


def _title(found: dict[str, Any]) -> str:
    sources = " and ".join(model["source"] for model in found["models"].values())
    return f"{sources}: lm-eval {found['lm_eval']}, {found['dtype']}, batches of {found['batch_size']}"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else format(value, f"{sign},.4f")  # noqa: RUF001
