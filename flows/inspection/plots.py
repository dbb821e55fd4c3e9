"""The views of `surgeon inspect` as figures."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from flows.anatomy_facts import QUANTILES, CostSummary
from flows.cost_samples import COST, Sample
from flows.inspection.block import BlockView
from flows.inspection.objects import bytes_by_kind
from flows.inspection.run import RunView, linear_names
from flows.workspace import write_bytes

_DPI = 110
_METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""No times in the files, so that the same numbers give the same picture."""
_BINS = 60
_UNITS = {COST: "cost, nats per token"}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format its name says, in one step."""
    suffix = path.suffix.lower()
    out = io.BytesIO()
    figure.savefig(out, format=suffix[1:], dpi=_DPI, metadata=_METADATA[suffix])
    write_bytes(path, out.getvalue())


def draw_objects(objects: list[dict[str, Any]]) -> Figure:
    """Bytes by kind of object, the most at the top."""
    kinds = bytes_by_kind(objects)
    figure = Figure(figsize=(7.5, 1.4 + 0.3 * len(kinds)), layout="constrained")
    panel = figure.subplots()
    sizes = [n_bytes / 2**20 for _, n_bytes in kinds.values()]
    bars = panel.barh([f"{kind} ({count})" for kind, (count, _) in kinds.items()], sizes, color="C0")
    panel.bar_label(bars, [f"{size:,.1f}" for size in sizes], padding=3, fontsize="small")
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlabel("MiB in the store")
    panel.set_ylabel("kind (number of objects)")
    panel.set_title(f"{sum(sizes):,.0f} MiB in {sum(count for count, _ in kinds.values()):,} objects")
    return figure


def draw_run(view: RunView) -> Figure:
    """What is gone of each linear, and the costs of each block with what went."""
    kinds = _kinds([costs for costs in view.anatomy.costs if costs.shot == view.shot])
    n_blocks = len(view.blocks)
    figure = Figure(figsize=(max(7.5, 3.0 + 0.26 * n_blocks), 3.3 + 3.2 * len(kinds)), layout="constrained")
    panels = figure.subplots(1 + len(kinds), 1, squeeze=False)[:, 0]
    _draw_allocation(figure, panels[0], view)
    for panel, costs in zip(panels[1:], kinds.values(), strict=True):
        _draw_costs_by_block(panel, costs)
    return figure


def draw_block(view: BlockView) -> Figure:
    """Eigenvalues of the factors, and costs with what went."""
    samples = _merged([*view.units.values(), *(sample for linear in view.linears for sample in linear.costs)])
    has_factors = any(linear.factors for linear in view.linears)
    n_panels = max(1, has_factors + len(samples))
    figure = Figure(figsize=(7.5, 3.6 * n_panels), layout="constrained")
    panels = list(figure.subplots(n_panels, 1, squeeze=False)[:, 0])
    if has_factors:
        _draw_spectra(panels.pop(0), view)
    for panel, sample in zip(panels, samples, strict=False):
        _draw_histogram(panel, sample, view)
    if not has_factors and not samples:
        panels[0].set_title(f"block {view.block}, shot {view.shot}: neither factors nor costs are in the store")
        panels[0].set_axis_off()
    return figure


def _draw_allocation(figure: Figure, panel: Axes, view: RunView) -> None:
    names = linear_names(view.anatomy)
    gone = np.full((len(names), len(view.blocks)), np.nan)
    for facts in view.anatomy.linears:
        gone[names.index(facts.linear), facts.block] = facts.sparsity
    image = panel.imshow(gone, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(float(np.nanmax(gone)), 1e-9))
    panel.set_yticks(range(len(names)), names)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("block")
    panel.set_ylabel("linear")
    panel.set_title(f"weights gone after shot {view.shot}: {view.shots[view.shot].sparsity:.2%} of all")
    figure.colorbar(image, ax=panel, format=PercentFormatter(1.0), label="gone")


def _kinds(costs: Sequence[CostSummary]) -> dict[tuple[str, str], list[CostSummary]]:
    """Costs of a shot by kind of candidate, of those kinds of which any went (if none did, of all)."""
    found: dict[tuple[str, str], list[CostSummary]] = {}
    for one in costs:
        if one.count:
            found.setdefault((one.of, one.unit), []).append(one)
    chosen = {kind: mine for kind, mine in found.items() if any(one.n_gone for one in mine)}
    return chosen or found


def _draw_costs_by_block(panel: Axes, costs: list[CostSummary]) -> None:
    """A bar of quantiles for each block, its median, and the dearest of what went."""
    blocks = np.array([one.block for one in costs])
    quantile = {q: np.array([one.quantiles[q] for one in costs]) for q in QUANTILES}
    for low, high, shade in ((0.01, 0.99, 0.25), (0.05, 0.95, 0.45), (0.25, 0.75, 0.7)):
        span, label = quantile[high] - quantile[low], f"{low:.0%} to {high:.0%}"
        panel.bar(blocks, span, bottom=quantile[low], width=0.8, alpha=shade, color="C0", label=label)
    panel.plot(blocks, quantile[0.5], "_", color="black", label="median")
    gone = [(one.block, one.largest_gone) for one in costs if one.largest_gone is not None]
    panel.plot([b for b, _ in gone], [value for _, value in gone], "v", color="C3", label="dearest that went")
    thresholds = {one.threshold for one in costs}
    if len(thresholds) == 1 and (threshold := thresholds.pop()) is not None:
        panel.axhline(threshold, color="0.2", linestyle="--", linewidth=1.2, label="threshold")
    if (quantile[0.01] > 0).all():
        panel.set_yscale("log")
    else:
        smallest = [value for values in quantile.values() for value in values if value > 0]
        panel.set_yscale("symlog", linthresh=min(smallest, default=1.0))
    panel.set_xlim(-0.5, blocks[-1] + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("block")
    panel.set_ylabel(_UNITS.get(costs[0].unit, costs[0].unit))
    panel.set_title(f"costs of {costs[0].of} in shot {costs[0].shot}")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize="small", ncols=3, frameon=False)
    panel.grid(True, axis="y", color="0.9")
    panel.set_axisbelow(True)


def _draw_spectra(panel: Axes, view: BlockView) -> None:
    """Eigenvalues from the largest to the smallest; what damping adds is a dotted line of the same colour."""
    lowest, drawn = math.inf, 0
    for index, linear in enumerate(linear for linear in view.linears if linear.factors):
        for side, factor in linear.factors.items():
            values = factor.spectrum.values[::-1]
            positive = values[values > 0]
            if not positive.size:
                continue
            color, line = f"C{index % 10}", "-" if side == "A" else "--"
            ranks = np.arange(1, positive.size + 1)
            panel.plot(ranks, positive, label=f"{linear.facts.linear}, {side}", color=color, linestyle=line)
            lowest = min(lowest, float(np.quantile(positive, 0.02)))
            drawn += 1
            if factor.damping:
                panel.axhline(factor.spectrum.added(factor.damping), color=color, linestyle=":", linewidth=1)
    if drawn:
        panel.set_yscale("log")
        panel.set_ylim(bottom=lowest / 10)
        panel.legend(fontsize="small", ncols=2 if drawn > 6 else 1)
    panel.set_xlabel("eigenvalue, from the largest")
    panel.set_ylabel("value")
    panel.set_title(f"block {view.block}, shot {view.shot}: factors (dotted: what damping adds)")
    panel.grid(True, color="0.9")


def _merged(samples: Sequence[Sample]) -> list[Sample]:
    """One sample for each kind of candidate, those of all linears put together."""
    kinds: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        if sample.values.size:
            kinds.setdefault((sample.of, sample.unit), []).append(sample)
    merged = []
    for (of, unit), mine in kinds.items():
        thresholds = {sample.threshold for sample in mine}
        threshold = thresholds.pop() if len(thresholds) == 1 else None
        values, gone = np.concatenate([s.values.ravel() for s in mine]), np.concatenate([s.gone.ravel() for s in mine])
        merged.append(Sample(mine[0].linear if len(mine) == 1 else None, of, unit, values, gone, threshold))
    return merged


def _draw_histogram(panel: Axes, sample: Sample, view: BlockView) -> None:
    """Costs on a log scale; those that are zero stand at the left edge."""
    values, gone = sample.values, sample.gone
    n_bins = min(_BINS, max(10, values.size // 4))
    positive = values[values > 0]
    if positive.size:
        edges = np.geomspace(positive.min() / 1.001, positive.max() * 1.001, n_bins + 1)
        panel.set_xscale("log")
    else:
        edges = np.linspace(0.0, 1.0, n_bins + 1)
    shown = np.clip(values, edges[0], edges[-1])
    parts = [shown[gone], shown[~gone]]
    labels = [f"went: {parts[0].size:,}", f"stayed: {parts[1].size:,}"]
    panel.hist(parts, bins=edges.tolist(), stacked=True, color=["C3", "C0"], label=labels)
    if sample.threshold is not None:
        panel.axvline(sample.threshold, color="0.2", linestyle="--", linewidth=1.2, label="threshold")
    panel.set_xlabel(_UNITS.get(sample.unit, sample.unit))
    panel.set_ylabel(f"number of {sample.of}")
    panel.margins(y=0.2)  # room for the legend
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    place = f", {sample.linear}" if sample.linear else ""
    panel.set_title(f"costs of {sample.of}: block {view.block}{place}, shot {view.shot}")
    panel.legend(fontsize="small")
