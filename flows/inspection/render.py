"""The views of `surgeon inspect` as tables on a terminal."""

from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.anatomy_facts import CostSummary
from flows.compare_spec import percent
from flows.inspection.block import BlockView, Factor, LinearView
from flows.inspection.objects import bytes_by_kind
from flows.inspection.run import RunView, Totals
from surgeon.curvature.spectrum import LARGEST_CONDITION

T = TypeVar("T")
_SHOWN = (0.05, 0.5, 0.95)
"""Quantiles of costs in a table; the JSON has more."""


def render_objects(rows: list[dict[str, Any]], console: Console) -> None:
    """Objects of a store, and what each kind takes."""
    table = Table()
    for name in ("name", "kind", "arrays", "digest", "MiB"):
        table.add_column(name, justify="right" if name == "MiB" else "left", no_wrap=name != "arrays")
    for row in rows:
        arrays = ", ".join(f"{name} {shape}" for name, shape in list(row["arrays"].items())[:2])
        more = f" … {len(row['arrays']) - 2} more" if len(row["arrays"]) > 2 else ""
        size = _mib(row["bytes"]) if row["payload"] else "evicted"
        table.add_row(row["name"], row["kind"], arrays + more, row["digest"][:12], size)
    console.print(table)
    kinds = bytes_by_kind(rows)
    table = _table("by kind", "kind", "objects", "MiB")
    for kind, (count, n_bytes) in kinds.items():
        table.add_row(kind, f"{count:,}", _mib(n_bytes))
    table.add_row("all", f"{sum(c for c, _ in kinds.values()):,}", _mib(sum(s for _, s in kinds.values())))
    console.print(table)


def render_run(view: RunView, console: Console) -> None:
    """A run: its shots, its kinds of linears, its blocks."""
    console.print(_shots(view))
    console.print(_totals("linear", f"linears of all blocks after shot {view.shot}", view.kinds, view))
    console.print(_blocks(view))
    _print_missing(view.anatomy.missing, console)


def render_block(view: BlockView, console: Console) -> None:
    """A block or a linear: what lives, its factors, its costs."""
    console.print(_linears(view))
    if any(linear.factors for linear in view.linears):
        console.print(_factors(view))
    if view.units or any(linear.costs for linear in view.linears):
        console.print(_costs(view))
    _print_missing(view.missing, console)


def _print_missing(missing: list[str], console: Console) -> None:
    for line in missing:
        console.print(f"not known: {line}", highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=Text(title), title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def _shots(view: RunView) -> Table:
    table = _table("shots", "shot", "asked", "sparsity", "removed", "predicted cost", "threshold", "largest update")
    masks = {mask.shot: mask for mask in view.anatomy.masks}
    for number, totals in view.shots.items():
        mask = masks.get(number)
        asked, removed, threshold = "-", "-", "-"
        if mask:
            asked, removed = f"{mask.parameters['target']:.2%}", f"{mask.n_removed:,}"
            threshold = _optional(mask.threshold, _small)
        numbers = (f"{totals.sparsity:.2%}", removed, _optional(totals.predicted_cost, _small), threshold)
        table.add_row(str(number), asked, *numbers, _largest(totals.update_size))
    return table


def _totals(first: str, title: str, totals: dict[str, Totals], view: RunView) -> Table:
    """One row for each kind of linear, with its shape and damping."""
    corrected = any(each.correction_size for each in totals.values())
    solved = any(each.solved for each in totals.values())
    optional = (*(("corrected by",) if corrected else ()), *(("not converged", "worst residual") if solved else ()))
    table = _table(title, first, "shape", "weights left", "sparsity", "damping A, G", "update size", *optional)
    for name, each in totals.items():
        mine = [facts for facts in view.anatomy.linears if facts.linear == name]
        row = [f"{mine[0].n_out}x{mine[0].n_in}", f"{each.n_live:,}", f"{each.sparsity:.2%}"]
        row += [_damping_of(view, name), _range(each.update_size)]
        row += [_range(each.correction_size)] if corrected else []
        row += [f"{each.not_converged} of {each.solved}", _optional(each.worst_residual, _small)] if solved else []
        table.add_row(name, *row)
    return table


def _damping_of(view: RunView, name: str) -> str:
    """Damping in force of one kind of linear; a range where blocks differ."""
    mine = [d for d in view.anatomy.dampings if d.linear == name]
    sides = ([d.activations for d in mine], [d.gradients for d in mine])
    return ", ".join(_span([value for value in side if value is not None]) for side in sides)


def _span(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _blocks(view: RunView) -> Table:
    """One row a block; costs of those kinds of candidates of which any went."""
    here = [costs for costs in view.anatomy.costs if costs.shot == view.shot]
    kinds = list(dict.fromkeys((c.of, c.unit) for c in here if any(o.n_gone for o in here if o.of == c.of)))
    columns = ["block", "sparsity", "predicted cost", "largest update"]
    for of, unit in kinds:
        columns += [f"{of}: gone of", *(f"{unit} {percent(q)}" for q in _SHOWN), "dearest gone"]
    table = _table(f"blocks after shot {view.shot}, and costs in it", *columns)
    for block, totals in view.blocks.items():
        name = f"{block}, removed" if block in view.anatomy.removed else str(block)
        cost = _optional(totals.predicted_cost, _small)
        row = [name, f"{totals.sparsity:.2%}", cost, _largest(totals.update_size)]
        for kind in kinds:
            found = [costs for costs in here if costs.block == block and (costs.of, costs.unit) == kind]
            row += _cost_cells(found[0]) if found else ["-"] * (len(_SHOWN) + 2)
        table.add_row(*row)
    return table


def _cost_cells(costs: CostSummary) -> list[str]:
    quantiles = [_optional(costs.quantiles.get(q), _small) for q in _SHOWN]
    return [f"{costs.n_gone:,} of {costs.count:,}", *quantiles, _optional(costs.largest_gone, _small)]


def _linears(view: BlockView) -> Table:
    units = ", ".join(
        f"{live:,} of {view.n_units[kind]:,} {view.units[kind].of}" for kind, live in view.live_units().items()
    )
    title = f"block {view.block} after shot {view.shot}" + (f": {units}" if units else "")
    title += ": removed whole" if view.is_removed else ""
    columns: dict[str, Callable[[LinearView], str]] = {
        "linear": lambda v: v.facts.linear,
        "rows left": lambda v: f"{_optional(v.facts.live_rows, _whole)} of {v.facts.n_out:,}",
        "columns left": lambda v: f"{_optional(v.facts.live_columns, _whole)} of {v.facts.n_in:,}",
        "sparsity": lambda v: f"{v.facts.sparsity:.2%}",
        "predicted cost": lambda v: _optional(v.facts.predicted_cost, _small),
        "update size": lambda v: _optional(v.facts.update_size, _small),
    }
    if any(v.facts.correction_size is not None for v in view.linears):
        columns["corrected by"] = lambda v: _optional(v.facts.correction_size, _small)
    if any(v.facts.iterations is not None for v in view.linears):
        columns["iterations"] = lambda v: _optional(v.facts.iterations, str)
        columns["residual"] = lambda v: _optional(v.facts.residual, _small)
    table = _table(title, *columns)
    for linear in view.linears:
        table.add_row(*(cell(linear) for cell in columns.values()))
    return table


def _factors(view: BlockView) -> Table:
    names = ("factor", "size", "effective rank", "condition", "damping", "condition, damped", "largest", "smallest")
    table = _table(f"factors of shot {view.shot}, over what lived before it", *names)
    for linear in view.linears:
        for side, factor in linear.factors.items():
            table.add_row(f"{linear.facts.linear}, {side}", *_factor_cells(factor))
    return table


def _factor_cells(factor: Factor) -> list[str]:
    spectrum = factor.spectrum
    ends = [_small(float(spectrum.values[i])) if spectrum.values.size else "-" for i in (-1, 0)]
    return [
        f"{spectrum.values.size:,}",
        f"{spectrum.effective_rank():.1f}",
        _optional(spectrum.condition(), _condition),
        f"{factor.damping:g}" if factor.damping else "-",
        _optional(spectrum.condition(factor.damping), _condition) if factor.damping else "-",
        *ends,
    ]


def _condition(value: float) -> str:
    """Beyond what float32 resolves it is only a bound."""
    return f">= {_small(value)}" if value >= LARGEST_CONDITION else _small(value)


def _costs(view: BlockView) -> Table:
    columns = ("costs of", "in", "gone of", *(percent(q) for q in _SHOWN), "dearest gone", "threshold")
    table = _table(f"costs in shot {view.shot}", *columns)
    samples = [*view.units.values(), *(sample for linear in view.linears for sample in linear.costs)]
    for sample in samples:
        summary = view.summary(sample)
        name = sample.of if sample.linear is None else f"{sample.linear}, {sample.of}"
        table.add_row(name, sample.unit, *_cost_cells(summary), _optional(sample.threshold, _small))
    return table


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return "-"
    low, high = (_small(value) for value in values)
    return low if low == high else f"{low} to {high}"


def _largest(values: tuple[float, float] | None) -> str:
    return "-" if values is None else _small(values[1])


def _optional(value: T | None, show: Callable[[T], str]) -> str:
    return "-" if value is None else show(value)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f}"


def _whole(value: int) -> str:
    return f"{value:,}"


def _small(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}"
