"""Coupled units: the part of costs and masks that is theirs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.choices import Allocation, Cost, Resource
from surgeon.curvature.factors import LinearFactors
from surgeon.errors import ParameterError
from surgeon.pruning.elimination import eliminate
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import live_linear
from surgeon.pruning.unit_allocation import UnitAllocation, UnitCurve, allocate_units
from surgeon.pruning.units import Shape, SubLayer, SubLayerKind, sub_layers
from surgeon.recipe import Recipe, UnitSpec
from surgeon.store import Reference, digest_arrays
from tasks.context import Context, ModelSpec, split_columns, split_rows
from tasks.rule import MaskRule, Usage

Array = NDArray[Any]


def block_sub_layers(model: ModelSpec, block: int) -> tuple[SubLayer, SubLayer]:
    """The attention and the MLP of a block.

    Raises:
        ParameterError: the couplings of the model are not known.
    """
    if model.couplings is None:
        raise ParameterError("structure: units needs a described family of models")
    shapes = {s.name: Shape(s.n_out, s.n_in, s.has_bias) for s in model.blocks[block]}
    return sub_layers(model.couplings[block], shapes)


def output_linears(model: ModelSpec) -> tuple[str, ...]:
    """Names of the linears whose columns read units, in any block."""
    return tuple(dict.fromkeys(sub.output for _, sub in unit_parts(model)))


def dense_usage(model: ModelSpec, usage: Usage) -> float:
    """What the dense model uses: for weights all those of decoder linears, else what its units use."""
    if usage.resource is Resource.WEIGHTS:
        return float(model.n_weights)
    return float(sum(usage.of(sub)[-1] for _, sub in unit_parts(model)))


def unit_costs(
    sub_layers_: Sequence[SubLayer],
    linears: Mapping[str, PrunedLinear],
    statistics: Iterable[tuple[str, LinearFactors]],
    recipe: Recipe,
    where: str,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """In which order the units of a block go, and what each costs; and facts by output linear."""
    spec = recipe.units
    assert spec is not None, "units have a specification"
    by_output = {sub.output: sub for sub in sub_layers_}
    arrays: dict[str, Array] = {}
    facts: dict[str, Any] = {}
    for name, factors in statistics:
        sub = by_output[name]
        here = f"{where}, {name}"
        live = live_linear(linears[name], factors, recipe.curvature.kind, recipe.damping, here)
        units = sub.live_units(linears[name].live_columns).nonzero()[:, 0]
        place = torch.full((sub.n_units,), -1, dtype=torch.int64, device=units.device)
        place[units] = torch.arange(units.numel(), device=units.device)
        result = eliminate(
            live, place[sub.owner(live.linear.live_columns)], units.numel(), recipe.cost, here, spec.rescorings
        )
        arrays[f"{sub.kind}/order"] = units[result.order].cpu().numpy()
        arrays[f"{sub.kind}/costs"] = result.costs.cpu().numpy()
        facts[name] = {"dead_columns": live.n_dead_columns}
        if recipe.cost is Cost.OBS:
            facts[name] |= {"damping": list(live.curvature.damping), "escalations": live.curvature.escalations}
    return arrays, facts


@dataclass(frozen=True)
class UnitOrder:
    """In which order the units of one sub-layer go.

    Attributes:
        units: those that live, by index in the dense model, the first to go in front, `[n_live]` int64.
        costs: of each further unit, `[n_live]` float64.
        n_frozen: how many of the last stay whatever they cost.
    """

    units: Array
    costs: Array
    n_frozen: int = 0


def unit_masks(context: Context, costs: Sequence[Reference], rule: MaskRule) -> tuple[dict[str, Array], dict[str, Any]]:
    """Live rows and columns of all linears of the model after a shot, one after the other; and facts."""
    store = context.store.open()
    stored = [store.open(reference.key) for reference in costs]
    orders = [
        UnitOrder(stored[block].array(f"{sub.kind}/order"), stored[block].array(f"{sub.kind}/costs"))
        for block, sub in unit_parts(context.model)
    ]
    return masks_of(
        context.model, orders, lambda b: (stored[b].array("live_rows"), stored[b].array("live_columns")), rule
    )


def masks_of(
    model: ModelSpec, orders: Sequence[UnitOrder], live: Callable[[int], tuple[Array, Array]], rule: MaskRule
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The same from orders of units.

    Args:
        model: shapes and couplings.
        orders: for each sub-layer, see `unit_parts`.
        live: block → live rows and live columns of its linears before, one linear after the other.
        rule: how much is to go, and how widths are chosen.
    """
    parts = unit_parts(model)
    curves = [unit_curve(block, sub, order, rule) for (block, sub), order in zip(parts, orders, strict=True)]
    allocation = _allocate(curves, model, rule)
    rows, columns, blocks = [], [], []
    n_live = 0
    for block in range(model.n_blocks):
        mine = [
            (sub, order.units[order.units.size - kept :])
            for (b, sub), order, kept in zip(parts, orders, allocation.kept, strict=True)
            if b == block
        ]
        left = _live_parts(model, block, live(block), mine)
        block_rows, block_columns = np.concatenate([r for r, _ in left]), np.concatenate([c for _, c in left])
        n_live += sum(int(r.sum()) * int(c.sum()) for r, c in left)
        blocks.append(digest_arrays({"rows": block_rows, "columns": block_columns}, {}))
        rows.append(block_rows)
        columns.append(block_columns)
    return {"live_rows": np.concatenate(rows), "live_columns": np.concatenate(columns)}, {
        "sparsity": 1.0 - n_live / model.n_weights,
        "threshold": allocation.threshold,
        "predicted_cost": allocation.predicted_cost,
        "n_removed": sum(c.n_live for c in curves) - sum(allocation.kept),
        "kept": {
            kind.value: [k for c, k in zip(curves, allocation.kept, strict=True) if c.kind is kind]
            for kind in SubLayerKind
        },
        "blocks": blocks,
    }


def require_reachable(model: ModelSpec, rule: MaskRule) -> None:
    """Finds out whether any widths of the dense model meet a target, whatever they cost.

    Raises:
        ParameterError: none do.
    """
    whole = [(block, sub, UnitOrder(np.arange(sub.n_units), np.zeros(sub.n_units))) for block, sub in unit_parts(model)]
    _allocate([unit_curve(*part, rule) for part in whole], model, rule)


def _units(rule: MaskRule) -> UnitSpec:
    assert rule.recipe.units is not None, "units have a specification"
    return rule.recipe.units


def unit_parts(model: ModelSpec) -> list[tuple[int, SubLayer]]:
    """All sub-layers of the model, with their blocks."""
    return [(block, sub) for block in range(model.n_blocks) for sub in block_sub_layers(model, block)]


def unit_curve(block: int, sub: SubLayer, order: UnitOrder, rule: MaskRule) -> UnitCurve:
    """A sub-layer that stands for election."""
    permitted = permitted_widths(sub, order.costs.size, rule)
    permitted[: order.n_frozen] = False
    return UnitCurve(f"block {block}, {sub.kind}", sub.kind, order.costs, rule.usage.of(sub), permitted)


def _allocate(curves: list[UnitCurve], model: ModelSpec, rule: MaskRule) -> UnitAllocation:
    whole = float(sum(c.usage[-1] for c in curves))
    if rule.recipe.allocation is Allocation.GLOBAL:
        budget = whole - rule.target * dense_usage(model, rule.usage)
        return allocate_units(curves, budget, _units(rule).widths, rule.recipe.ranking)
    each = [
        allocate_units([c], (1.0 - rule.target) * float(c.usage[-1]), _units(rule).widths, rule.recipe.ranking)
        for c in curves
    ]
    return UnitAllocation(
        kept=tuple(part.kept[0] for part in each),
        usage=sum(part.usage for part in each),
        predicted_cost=sum(part.predicted_cost for part in each),
        threshold=max(part.threshold or 0.0 for part in each),
    )


def permitted_widths(sub: SubLayer, n_live: int, rule: MaskRule) -> NDArray[np.bool_]:
    """Whether a sub-layer may keep 0, 1, … of the units that live, `[n_live + 1]`."""
    spec, kept = _units(rule), np.arange(n_live + 1)
    if sub.kind is SubLayerKind.MLP:
        return np.asarray(kept % spec.multiple == 0)
    return np.asarray(kept >= (0 if spec.heads else n_live))


def _live_parts(
    model: ModelSpec, block: int, before: tuple[Array, Array], kept: Sequence[tuple[SubLayer, Array]]
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Live rows and columns of each linear of a block."""
    shapes = model.blocks[block]
    names = [shape.name for shape in shapes]
    rows = dict(zip(names, split_rows(shapes, before[0]), strict=True))
    columns = dict(zip(names, split_columns(shapes, before[1]), strict=True))
    for sub, units in kept:
        live = torch.zeros(sub.n_units, dtype=torch.bool)
        live[torch.from_numpy(units)] = True
        for name, (live_rows, live_columns) in sub.live_parts(live).items():
            if live_rows is not None:
                rows[name] = rows[name] & live_rows.numpy()
            if live_columns is not None:
                columns[name] = columns[name] & live_columns.numpy()
    return [(rows[s.name], columns[s.name]) for s in shapes]
