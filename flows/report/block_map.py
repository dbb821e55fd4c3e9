"""Blocks by kinds of linears, as a table whose cells are coloured by their values."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flows.anatomy import LinearFacts
from flows.report.numbers import rough

STEPS = 10
"""Steps of the colour scale; step 0 is for what is exactly zero."""


@dataclass(frozen=True)
class Cell:
    """A value as it is written, its step on the colour scale, and its share of the end of the scale."""

    text: str
    step: int
    share: float


@dataclass(frozen=True)
class MapRow:
    """All blocks of one kind of linear, and all of them together."""

    kind: str
    cells: Sequence[Cell]
    total: Cell | None


@dataclass(frozen=True)
class BlockMap:
    """A map.

    Attributes:
        blocks: numbers of the blocks: columns.
        rows: kinds of linears, in module order.
        totals: of each block; None where values of linears do not add up to one of a block.
        total: of everything.
        top: value at the end of the colour scale, as it is written.
        unit: what cells are written in.
    """

    blocks: Sequence[int]
    rows: Sequence[MapRow]
    totals: Sequence[Cell] | None
    total: Cell | None
    top: str
    unit: str

    @property
    def differs(self) -> bool:
        """Whether blocks differ in what is written of them."""
        return self.totals is not None and len({cell.text for cell in self.totals}) > 1


Measure = Callable[[Sequence[LinearFacts]], float | None]
"""Value of one linear or of several together."""


def build_map(
    linears: Iterable[LinearFacts], measure: Measure, *, factor: float, unit: str, adds_up: bool = True
) -> BlockMap:
    """Fills a map.

    Args:
        linears: facts of all linears.
        measure: the value of some of them.
        factor: what values are multiplied by before they are written.
        unit: of the values as they are written.
        adds_up: whether several linears together have a value.
    """
    found = list(linears)
    blocks = sorted({linear.block for linear in found})
    kinds = list(dict.fromkeys(linear.linear for linear in found))
    values = {(linear.block, linear.linear): measure([linear]) for linear in found}
    highest = max((value for value in values.values() if value is not None), default=0.0)
    top = _nice(highest * factor)
    digits = 0 if top >= 20 else 1 if top >= 2 else 2

    def cell(value: float | None) -> Cell:
        return _cell(value, factor, top, digits)

    def together(chosen: Sequence[LinearFacts]) -> Cell:
        return cell(measure(chosen))

    rows = [
        MapRow(
            kind,
            [cell(values.get((block, kind))) for block in blocks],
            together([linear for linear in found if linear.linear == kind]) if adds_up else None,
        )
        for kind in kinds
    ]
    totals = [together([linear for linear in found if linear.block == block]) for block in blocks]
    return BlockMap(blocks, rows, totals if adds_up else None, together(found) if adds_up else None, f"{top:g}", unit)


def _cell(value: float | None, factor: float, top: float, digits: int) -> Cell:
    if value is None:
        return Cell("\N{EN DASH}", 0, 0.0)  # no such linear, or not known
    shown = value * factor
    if shown <= 0:
        return Cell("0", 0, 0.0)
    text = f"{shown:.{digits}f}"
    if float(text) == 0:
        text = "<1" if digits == 0 else rough(shown)
    return Cell(text, min(STEPS, max(1, round(STEPS * shown / top))), min(1.0, shown / top))


def _nice(highest: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10 times a power of ten."""
    if highest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15) if step * power >= highest * (1 - 1e-9))
