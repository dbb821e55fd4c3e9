"""The plots of the report that are more than tables: perplexity over sparsity, and spectra of curvature factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from flows.comparison import show_perplexity
from flows.report.svg import Ink, drawing, new_figure, plain, series, style_axes, to_svg

_STEEP = 8.0
"""Ratio of the largest to the smallest perplexity above which the axis is logarithmic."""
_SMALLEST = 1e-9
"""Eigenvalues below this part of the largest are rounding of float32, and drawn there."""
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))


def draw_curve(dense: float, shots: Sequence[Mapping[str, Any]]) -> Markup:
    """Perplexity against the fraction of weights removed, from the dense model over all shots.

    Args:
        dense: perplexity before pruning.
        shots: entries of `run.json`.
    """
    with drawing("curve"):
        return _curve(dense, shots)


def _curve(dense: float, shots: Sequence[Mapping[str, Any]]) -> Markup:
    sparsities = [0.0, *(float(shot["sparsity"]) for shot in shots)]
    values = [dense, *(float(shot["perplexity"]) for shot in shots)]
    figure = new_figure(5.5, 3.7)
    axes = figure.subplots()
    style_axes(axes)
    axes.axhline(dense, color=Ink.KEPT, linewidth=1.2, linestyle=(0, (5, 4)))
    axes.plot(sparsities, values, color=Ink.REMOVED, linewidth=2.4, zorder=3)
    axes.plot(sparsities[1:], values[1:], "o", color=Ink.REMOVED, markersize=8, zorder=4)
    axes.plot(0.0, dense, "o", color=Ink.KEPT, markersize=9, zorder=4)
    labelled = {0: f"dense {show_perplexity(dense)}", len(shots): show_perplexity(values[-1])}
    labelled |= {i: show_perplexity(value) for i, value in enumerate(values) if i not in labelled and len(shots) <= 8}
    for index, text in labelled.items():
        colour = Ink.TEXT if index in (0, len(shots)) else Ink.MUTED
        falls = index > 0 and values[index] < values[index - 1]
        place, side = ((10, -16), "left") if index == 0 else ((-6, -17 if falls else 11), "right")
        axes.annotate(
            text, (sparsities[index], values[index]), place, textcoords="offset points", ha=side, color=colour
        )
    if max(values) > _STEEP * min(values):
        axes.set_yscale("log")
    axes.margins(x=0.06, y=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{100 * value:g}%"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,.6g}"))
    axes.set_xlabel("decoder weights removed")
    axes.set_ylabel("perplexity")
    steps = "; ".join(f"{s:.1%} removed, {p:,.2f}" for s, p in zip(sparsities[1:], values[1:], strict=True))
    description = f"A line from the dense model at perplexity {dense:,.2f} over the shots: {steps}."
    return to_svg(figure, "curve", "Perplexity against the fraction of weights removed", description)


@dataclass(frozen=True)
class CurveSet:
    """Eigenvalues of one factor.

    Attributes:
        name: of the factor, as in the legend.
        positions: where each eigenvalue lies among all, from 0 (the largest) to 1.
        eigenvalues: from the largest to the smallest.
    """

    name: str
    positions: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]


@dataclass(frozen=True)
class SpectrumPanel:
    """Spectra that are drawn together.

    Attributes:
        title: of the panel.
        spectra: of the factors of one side of one block.
    """

    title: str
    spectra: Sequence[CurveSet]


def draw_spectra(rows: Sequence[Sequence[SpectrumPanel]], names: Sequence[str], description: str) -> Markup:
    """Eigenvalues over their position, each relative to the largest of its factor, on a log axis.

    Args:
        rows: panels; a row for each side of the linears, a column for each block.
        names: of all spectra, in the order of the legend.
        description: what is to be seen, in words.
    """
    with drawing("spectra"):
        return _spectra(rows, names, description)


def _spectra(rows: Sequence[Sequence[SpectrumPanel]], names: Sequence[str], description: str) -> Markup:
    figure = new_figure(10.6, 2.75 * len(rows) + 0.32 * -(-len(names) // 4) + 0.2)
    grid = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for row, line in zip(rows, grid, strict=True):
        for panel, axes in zip(row, line, strict=True):
            _draw_panel(axes, panel, names, handles)
    for axes in grid[:, 0]:
        axes.set_ylabel("relative to the largest")
    for axes in grid[-1, :]:
        axes.set_xlabel("position among all")
    drawn = [name for name in names if name in handles]
    legend = figure.legend(
        [handles[name] for name in drawn],
        [plain(name) for name in drawn],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_color(Ink.TEXT)
    return to_svg(figure, "spectra", "Spectra of curvature factors", description, broad=True)


def _draw_panel(axes: Axes, panel: SpectrumPanel, names: Sequence[str], handles: dict[str, Any]) -> None:
    style_axes(axes)
    axes.set_title(plain(panel.title), fontsize=12, loc="left", color=Ink.TEXT)
    axes.set_yscale("log")
    axes.set_ylim(_SMALLEST / 2, 2.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{100 * value:g}%"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}".replace("e-0", "e-")))
    for spectrum in panel.spectra:
        index = names.index(spectrum.name)
        largest = float(spectrum.eigenvalues.max(initial=0.0))
        if largest <= 0:
            continue
        (handles[spectrum.name],) = axes.plot(
            spectrum.positions,
            np.maximum(spectrum.eigenvalues / largest, _SMALLEST),
            color=series(index),
            linestyle=_DASHES[index % len(_DASHES)],
            linewidth=1.8,
        )
