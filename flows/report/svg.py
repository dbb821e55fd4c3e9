"""Figures of matplotlib as SVG that belongs into a page: it follows the page's theme and has a text alternative.

A figure is drawn in colours that stand for something (`Ink`); each is then replaced by a variable of the style sheet,
so that light and dark need one drawing. Text stays text. The same figure gives the same bytes.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

N_SERIES = 8
"""Colours for lines that are told apart (`series`)."""
_SETTINGS: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12.0, "text.parse_math": False}


class Ink(StrEnum):
    """What a colour stands for: drawn in the value, and by its name a variable of the style sheet."""

    TEXT = "#000101"
    MUTED = "#000201"
    LINE = "#000301"
    SURFACE = "#000401"
    KEPT = "#000501"
    REMOVED = "#000601"


def series(index: int) -> str:
    """The colour of a line that is told apart from `N_SERIES` - 1 others."""
    return f"#001{index % N_SERIES:x}01"


_VARIABLES = {str(ink): f"var(--{ink.name.lower()})" for ink in Ink} | {
    series(index): f"var(--series-{index})" for index in range(N_SERIES)
}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Settings to draw with and to write: the same whatever a user's matplotlib is set to.

    Args:
        name: of the figure; identifiers in it are made from it.
    """
    with style.context(["default", {**_SETTINGS, "svg.hashsalt": name}], after_reset=True):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    return figure


def style_axes(axes: Axes) -> None:
    """A quiet frame: a line below, a grid for the values, small labels."""
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(Ink.LINE)
    axes.tick_params(length=0, labelcolor=Ink.MUTED)
    axes.grid(True, axis="y", color=Ink.LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(Ink.MUTED)


def to_svg(figure: Figure, name: str, title: str, description: str, *, broad: bool = False) -> Markup:
    """The figure as an element for a page.

    Args:
        figure: drawn in colours of `Ink` and `series`.
        name: of the figure, unlike that of any other on the page: identifiers begin with it.
        title: what it shows, in a few words.
        description: what is to be seen, for those who do not see it.
        broad: whether it cannot be read on a narrow screen, and is scrolled there.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # The style is for every element of the page it lands in, and the rest is about the file.
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r'\b(id="|href="#|url\(#)', lambda found: f"{found[1]}{name}-", body)
    body = re.sub(r"#00[0-9a-f]{4}\b", lambda found: _VARIABLES.get(found[0], found[0]), body)
    width, height = (72 * size for size in figure.get_size_inches())
    head = (
        f'<svg class="plot{" broad" * broad}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    return Markup(head + body.strip())


def plain(text: str, longest: int = 40) -> str:
    """A name as matplotlib shows it: one line, printable, and in a legend too."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    line = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return f" {line}" if line.startswith("_") else line
