"""What a comparison has found: tables of cells, with what each row took."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.compare_spec import DENSE, percent
from surgeon.errors import SurgeonError

USAGE_TITLES = ("statistics, s", "costs and mask, s", "update, s", "peak memory, GiB")
"""Columns for what a row took."""


def show_perplexity(value: float) -> str:
    """A perplexity as it is shown."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


@dataclass(frozen=True)
class Usage:
    """What some results took when they were computed, each counted once.

    Attributes:
        statistics_s: seconds for statistics of the calibration text.
        costs_mask_s: seconds for costs and masks.
        update_s: seconds for updates and corrections.
        peak_memory_gib: largest resident memory of the process meanwhile; None where it was not recorded.
    """

    statistics_s: float = 0.0
    costs_mask_s: float = 0.0
    update_s: float = 0.0
    peak_memory_gib: float | None = None

    def texts(self) -> list[str]:
        """As it is shown, in the order of `USAGE_TITLES`."""
        seconds = (self.statistics_s, self.costs_mask_s, self.update_s)
        memory = "-" if self.peak_memory_gib is None else f"{self.peak_memory_gib:.2f}"
        return [*(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in seconds), memory]


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity.

    Attributes:
        sparsity: asked for.
        shots: number of shots it was reached in.
        reached: sparsity reached; None if the run failed.
        perplexity: on the evaluation windows; None if the run failed.
        loss: nats per token; None if the run failed.
        usage: of all results that lead there.
        error: why the run failed; None if it did not.
    """

    sparsity: float
    shots: int
    reached: float | None = None
    perplexity: float | None = None
    loss: float | None = None
    usage: Usage = Usage()
    error: str | None = None


@dataclass
class Row:
    """One method: its cells from the lowest sparsity, its settings, and what all of it took."""

    name: str
    settings: str
    cells: list[Cell] = field(default_factory=list)
    usage: Usage = Usage()


@dataclass
class Table:
    """Rows that share sparsities."""

    title: str
    rows: list[Row] = field(default_factory=list)

    @property
    def sparsities(self) -> list[float]:
        """Its columns."""
        return [cell.sparsity for cell in self.rows[0].cells] if self.rows else []

    def best(self, column: int) -> float | None:
        """Lowest perplexity of a column; None if all of it failed."""
        found = [value for row in self.rows if (value := row.cells[column].perplexity) is not None]
        return min(found, default=None)

    @property
    def errors(self) -> list[str]:
        """What went wrong, one line a cell."""
        return [f"{row.name} at {percent(c.sparsity)}: {c.error}" for row in self.rows for c in row.cells if c.error]


@dataclass
class Comparison:
    """All tables, and what they share.

    Attributes:
        dense: perplexity and loss before pruning.
        protocol: what all rows share, by name.
        tables: in the order of the file.
        objects: keys of all results that it was made from.
    """

    dense: dict[str, float]
    protocol: dict[str, str]
    tables: list[Table]
    objects: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """Table → row → sparsity → perplexity; failed cells are left out."""
        return {
            table.title: {
                DENSE: {percent(0.0): self.dense["perplexity"]},
                **{
                    row.name: {percent(c.sparsity): c.perplexity for c in row.cells if c.perplexity is not None}
                    for row in table.rows
                },
            }
            for table in self.tables
        }

    def raise_failures(self, folder: Path) -> None:
        """Raises if cells have failed.

        Raises:
            SurgeonError: saying how many, and where to read on.
        """
        errors: list[Any] = [error for table in self.tables for error in table.errors]
        if errors:
            cells = sum(len(row.cells) for table in self.tables for row in table.rows)
            raise SurgeonError(
                f"{len(errors)} of {cells} cells failed, the others are in {folder}. The first: {errors[0]}"
            )
