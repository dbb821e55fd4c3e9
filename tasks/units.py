"""Coupled units: the part of costs and masks that is theirs."""

from collections.abc import Iterable, Mapping, Sequence
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
from surgeon.store import Reference, Store, digest_arrays
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
    return tuple(dict.fromkeys(sub.output for _, sub in _parts(model)))


def dense_usage(model: ModelSpec, usage: Usage) -> float:
    """What the dense model uses: for weights all those of decoder linears, else what its units use."""
    if usage.resource is Resource.WEIGHTS:
        return float(model.n_weights)
    return float(sum(usage.of(sub)[-1] for _, sub in _parts(model)))


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


def unit_masks(context: Context, costs: Sequence[Reference], rule: MaskRule) -> tuple[dict[str, Array], dict[str, Any]]:
    """Live rows and columns of all linears of the model after a shot, one after the other; and facts."""
    model, store = context.model, Store(context.store)
    stored = [store.open(reference.key) for reference in costs]
    parts = _parts(model)
    curves = [_curve(block, sub, stored[block].array(f"{sub.kind}/costs"), rule) for block, sub in parts]
    allocation = _allocate(curves, model, rule)
    rows, columns, blocks = [], [], []
    n_live = 0
    for block in range(model.n_blocks):
        mine = [(s, k) for (b, s), k in zip(parts, allocation.kept, strict=True) if b == block]
        live = _live_parts(model, block, stored[block], mine)
        block_rows, block_columns = np.concatenate([r for r, _ in live]), np.concatenate([c for _, c in live])
        n_live += sum(int(r.sum()) * int(c.sum()) for r, c in live)
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
    _allocate([_curve(block, sub, np.zeros(sub.n_units), rule) for block, sub in _parts(model)], model, rule)


def _units(rule: MaskRule) -> UnitSpec:
    assert rule.recipe.units is not None, "units have a specification"
    return rule.recipe.units


def _parts(model: ModelSpec) -> list[tuple[int, SubLayer]]:
    """All sub-layers of the model, with their blocks."""
    return [(block, sub) for block in range(model.n_blocks) for sub in block_sub_layers(model, block)]


def _curve(block: int, sub: SubLayer, costs: NDArray[np.float64], rule: MaskRule) -> UnitCurve:
    permitted = _permitted(sub, costs.size, _units(rule))
    return UnitCurve(f"block {block}, {sub.kind}", sub.kind, costs, rule.usage.of(sub), permitted)


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


def _permitted(sub: SubLayer, n_live: int, spec: UnitSpec) -> NDArray[np.bool_]:
    kept = np.arange(n_live + 1)
    if sub.kind is SubLayerKind.MLP:
        return np.asarray(kept % spec.multiple == 0)
    return np.asarray(kept >= (0 if spec.heads else n_live))


def _live_parts(
    model: ModelSpec, block: int, stored: Any, kept: list[tuple[SubLayer, int]]
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Live rows and columns of each linear of a block."""
    shapes = model.blocks[block]
    names = [shape.name for shape in shapes]
    rows = dict(zip(names, split_rows(shapes, stored.array("live_rows")), strict=True))
    columns = dict(zip(names, split_columns(shapes, stored.array("live_columns")), strict=True))
    for sub, n_kept in kept:
        order = stored.array(f"{sub.kind}/order")
        live = torch.zeros(sub.n_units, dtype=torch.bool)
        live[torch.from_numpy(order[order.size - n_kept :])] = True
        for name, (live_rows, live_columns) in sub.live_parts(live).items():
            if live_rows is not None:
                rows[name] = rows[name] & live_rows.numpy()
            if live_columns is not None:
                columns[name] = columns[name] & live_columns.numpy()
    return [(rows[s.name], columns[s.name]) for s in shapes]
