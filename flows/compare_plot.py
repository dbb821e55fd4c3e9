"""Draws a comparison: perplexity against sparsity, one panel for each table."""

import io
import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from flows.compare_spec import percent
from flows.comparison import Comparison, Measure, Table, after_pruning, after_recovery, show_perplexity

_PANELS_A_LINE = 2
_WIDTH, _HEIGHT, _LEGEND_LINE = 6.6, 4.2, 0.21
"""Inches of a panel, and of a line of its legend."""
_LONGEST = 46
"""Characters of a name that fit into a column of a legend."""
_WRAPPED = 24
"""Characters of a line of a name beside a panel."""
_MARKERS = "osD^vP*X<>hp8d"
_LINES = ("-", "--", "-.", ":")
_DPI = 150
_RUINED = 50
"""Times the perplexity of the dense model, above which a model is of no use and a difference of no interest."""


def draw_comparison(comparison: Comparison) -> bytes:
    """The plot as PNG; the same bytes for the same numbers."""
    shown = [(table, measure) for table in comparison.tables for measure in _measures(table)]
    across = min(_PANELS_A_LINE, len(shown))
    down = math.ceil(len(shown) / across)
    rows = max(len(table.rows) for table, _ in shown)
    figure = Figure(figsize=(_WIDTH * across, (_HEIGHT + _LEGEND_LINE * (rows + 1)) * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flat
    for (table, measure), panel in zip(shown, panels, strict=False):
        draw = _draw_points if len(table.sparsities) == 1 else _draw_lines
        draw(panel, table, measure, comparison.dense["perplexity"])
        panel.set_title(_label(f"{table.title}, recovered" if measure is after_recovery else table.title, 60))
    for panel in list(figure.axes)[len(shown) :]:
        panel.remove()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    return out.getvalue()


def _shown(value: float, dense: float) -> float:
    """Where a perplexity is drawn: a ruined model at the edge, so that the others can be told apart."""
    return min(value, _RUINED * dense)


def _measures(table: Table) -> list[Measure]:
    return [after_pruning, after_recovery] if table.has_recovery else [after_pruning]


def _draw_lines(panel: Axes, table: Table, measure: Measure, dense: float) -> None:
    """Lines over sparsity, told apart by marker and dashes as well as by colour."""
    handles = [panel.axhline(dense, color="0.3", linestyle=(0, (6, 3)), linewidth=1.2)]
    for index, row in enumerate(table.rows):
        points = [(cell.sparsity, value) for cell in row.cells if (value := measure(cell)) is not None]
        handles += panel.plot(
            [sparsity for sparsity, _ in points],
            [_shown(value, dense) for _, value in points],
            color=f"C{index % 10}",
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_LINES[index // 10 % len(_LINES)],
            markersize=6,
            linewidth=1.4,
        )
    names = [f"dense ({dense:.4g})", *(_label(row.name, _LONGEST) for row in table.rows)]
    panel.legend(
        handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=1, fontsize="small", frameon=False
    )
    panel.set_xticks(table.sparsities)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: percent(value)))
    panel.set_xlabel("weights removed")
    panel.set_yscale("log")
    panel.set_ylabel(f"perplexity (log scale, cut at {_RUINED} times dense)")
    _ticks(panel, "y")


def _draw_points(panel: Axes, table: Table, measure: Measure, dense: float) -> None:
    """One sparsity: a line of text for each row with a point and its value."""
    for index, row in enumerate(table.rows):
        value = measure(row.cells[0])
        if value is not None:
            shown = _shown(value, dense)
            panel.plot(shown, index, color=f"C{index % 10}", marker=_MARKERS[index % len(_MARKERS)], markersize=8)
            style = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
            panel.annotate(show_perplexity(value), (shown, index), xytext=(8, 0), **style)
        else:
            panel.annotate(
                "failed", (0.02, index), xycoords=("axes fraction", "data"), va="center", fontsize="small", color="0.4"
            )
    line = panel.axvline(dense, color="0.3", linestyle=(0, (6, 3)), linewidth=1.2)
    panel.legend([line], [f"dense ({dense:.4g})"], loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    names = [textwrap.fill(_label(row.name, _LONGEST), _WRAPPED) for row in table.rows]
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(table.rows) - 0.4, -0.6)
    panel.set_xscale("log")
    panel.margins(x=0.15)
    panel.set_xlabel(f"perplexity with {percent(table.sparsities[0])} of the weights removed (log scale)")
    _ticks(panel, "x")


def _ticks(panel: Axes, which: str) -> None:
    """Plain numbers on a log axis, also where it spans less than a decade."""
    axis = panel.yaxis if which == "y" else panel.xaxis
    low, high = sorted(panel.get_ylim() if which == "y" else panel.get_xlim())
    decades = math.log10(high / low)
    steps = (
        (1.0,)
        if decades > 3
        else (1.0, 2.0, 5.0)
        if decades > 0.8
        else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    )
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())
    panel.grid(True, which="major", color="0.9")
    panel.set_axisbelow(True)


def _label(name: str, longest: int) -> str:
    """A name as one line, without what matplotlib would read as a formula or as a label to hide."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(name.split()))
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
