"""What a comparison has found: tables of cells, with what each row took."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from flows.compare_spec import DENSE, percent
from surgeon.errors import SurgeonError

USAGE_TITLES = ("statistics, s", "costs and mask, s", "update, s", "recovery, s", "peak memory, GiB")
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
        recovery_s: seconds of training after pruning.
        peak_memory_gib: largest resident memory of the process meanwhile; None where it was not recorded.
    """

    statistics_s: float = 0.0
    costs_mask_s: float = 0.0
    update_s: float = 0.0
    recovery_s: float = 0.0
    peak_memory_gib: float | None = None

    def texts(self) -> list[str]:
        """As it is shown, in the order of `USAGE_TITLES`."""
        seconds = (self.statistics_s, self.costs_mask_s, self.update_s, self.recovery_s)
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
        nonzero: parameters that are left; None if the run failed.
        recovered: perplexity after recovery; None where there was none.
        tokens: trained on in recovery; None where there was none.
        accepted: whether recovery made the model better, so that it was kept; None where there was none.
        usage: of all results that lead there.
        error: why the run failed; None if it did not.
    """

    sparsity: float
    shots: int
    reached: float | None = None
    perplexity: float | None = None
    loss: float | None = None
    nonzero: int | None = None
    recovered: float | None = None
    tokens: int | None = None
    accepted: bool | None = None
    usage: Usage = Usage()
    error: str | None = None


Measure: TypeAlias = Callable[[Cell], float | None]
"""What of a cell a table shows."""


def after_pruning(cell: Cell) -> float | None:
    """Perplexity after pruning."""
    return cell.perplexity


def after_recovery(cell: Cell) -> float | None:
    """Perplexity after recovery."""
    return cell.recovered


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

    @property
    def has_recovery(self) -> bool:
        """Whether any of its models was trained after pruning."""
        return any(cell.recovered is not None for row in self.rows for cell in row.cells)

    def best(self, column: int, measure: Measure) -> float | None:
        """Lowest perplexity of a column; None if all of it failed."""
        found = [value for row in self.rows if (value := measure(row.cells[column])) is not None]
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
        """Table → row → sparsity → perplexity; failed cells are left out.

        A row whose models were trained after pruning is there once more, with "after recovery" behind its name.
        """
        return {table.title: self._metrics_of(table) for table in self.tables}

    def _metrics_of(self, table: Table) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {DENSE: {percent(0.0): self.dense["perplexity"]}}
        for row in table.rows:
            found[row.name] = _values(row, after_pruning)
            if recovered := _values(row, after_recovery):
                found[f"{row.name}, after recovery"] = recovered
        return found

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


def _values(row: Row, measure: Measure) -> dict[str, float]:
    return {percent(cell.sparsity): value for cell in row.cells if (value := measure(cell)) is not None}
