"""Tables as the page draws them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        head: names of the columns.
        rows: cells; the first of each names the row. A cell is text, or a bar.
        left: columns that are set flush left, besides the first.
        style: class of the style sheet.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left: Sequence[int] = ()
    style: str = ""


def bar(share: float, *, time: bool = False) -> dict[str, Any]:
    """A cell with a bar.

    Args:
        share: its length, between 0 and 1; the number itself is in a cell beside it.
        time: whether it is about time, not about what was removed.
    """
    return {"share": min(1.0, max(0.0, share)), "time": time}
