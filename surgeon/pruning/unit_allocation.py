"""How many units every sub-layer keeps, so that a budget is met at the least cost.

What a sub-layer uses (weights, parameters, or seconds) depends on how many units it keeps, and the units go in a given
order, each further one at a given cost. So every sub-layer is a curve of cost against what is freed.

- *free*: every block has widths of its own. On the lower convex hull of its curve each sub-layer gives up units in
  steps of rising cost per freed resource; the steps of all sub-layers, cheapest first, meet any budget at nearly least
  cost (exactly so at the corners of the hulls). Only permitted widths are corners, so rounding is part of the choice.
- *uniform*: all blocks keep equally many neurons and equally many key/value groups. There are few such pairs: all are
  tried, and of those that meet the budget without a step more than it needs the cheapest is taken. (Only where costs
  are negative could a step that is not needed seem to pay.)

Reference: the hull is the continuous relaxation of the multiple-choice knapsack (Sinha & Zoltners 1979).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from surgeon.choices import Ranking, Widths
from surgeon.errors import ParameterError
from surgeon.pruning.units import SubLayerKind

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ROUNDING = 1e-9
"""A budget missed by less than this part of it is met: rounding must not cost a unit."""


@dataclass(frozen=True)
class UnitCurve:
    """One sub-layer that stands for election.

    Attributes:
        name: block and sub-layer, for messages.
        kind: MLP or attention.
        costs: of each further unit in the order in which they go, `[n_live]` float64, nats per token.
        usage: what the sub-layer uses when it keeps 0, 1, … units, `[n_units + 1]` float64, not decreasing.
        permitted: whether it may keep 0, 1, … units, `[n_live + 1]` bool; what it keeps now is permitted anyway.
    """

    name: str
    kind: SubLayerKind
    costs: FloatArray
    usage: FloatArray
    permitted: NDArray[np.bool_]

    @property
    def n_live(self) -> int:
        """Units that live before this shot."""
        return int(self.costs.size)

    def cumulative(self) -> FloatArray:
        """Cost of keeping 0, 1, … n_live units, `[n_live + 1]`."""
        return np.concatenate([np.cumsum(self.costs)[::-1], [0.0]])


@dataclass(frozen=True)
class UnitAllocation:
    """What every sub-layer keeps.

    Attributes:
        kept: number of units, for each sub-layer.
        usage: what all sub-layers use now.
        predicted_cost: nats per token.
        threshold: cost per freed resource of the dearest step taken, 0 if none was; None for equal widths.
    """

    kept: tuple[int, ...]
    usage: float
    predicted_cost: float
    threshold: float | None


def allocate_units(curves: Sequence[UnitCurve], budget: float, widths: Widths, ranking: Ranking) -> UnitAllocation:
    """Chooses how many units every sub-layer keeps.

    Args:
        curves: all sub-layers.
        budget: what they may use together.
        widths: equal in all blocks, or free.
        ranking: for free widths, whether steps are compared by cost per freed resource or by cost per unit.

    Returns:
        The widths. The budget is met from below, with free widths to within one permitted step.

    Raises:
        ParameterError: if the fewest units use more than the budget.
    """
    least = _least_usage(curves, widths)
    if least > budget * (1 + _ROUNDING):
        raise ParameterError(
            f"the target leaves the units of the decoder blocks {max(budget, 0.0):,.6g}, but with the fewest units "
            f"that widths: {widths} may keep they still use {least:,.6g}; ask for less, for a smaller multiple, for "
            f"heads: true, or for widths: {Widths.FREE}"
        )
    kept, threshold = _equal(curves, budget) if widths is Widths.UNIFORM else _free(curves, budget, ranking)
    return UnitAllocation(
        kept=kept,
        usage=float(sum(c.usage[k] for c, k in zip(curves, kept, strict=True))),
        predicted_cost=float(sum(c.cumulative()[k] for c, k in zip(curves, kept, strict=True))),
        threshold=threshold,
    )


def corners(curve: UnitCurve, ranking: Ranking) -> IntArray:
    """Numbers of kept units on the lower convex hull of cost against what is freed, descending from what lives now."""
    cost, size = curve.cumulative(), _size(curve, ranking)
    hull = [curve.n_live]
    for kept in np.flatnonzero(curve.permitted[: curve.n_live])[::-1].tolist():
        while len(hull) > 1 and _slope(cost, size, hull[-1], kept) <= _slope(cost, size, hull[-2], hull[-1]):
            hull.pop()
        hull.append(kept)
    return np.array(hull, dtype=np.int64)


def _size(curve: UnitCurve, ranking: Ranking) -> FloatArray:
    """What costs are divided by: what 0, 1, … units use, or their number."""
    by_resource = ranking is Ranking.COST_PER_WEIGHT
    return curve.usage if by_resource else np.arange(curve.usage.size, dtype=np.float64)


def _slope(cost: FloatArray, size: FloatArray, more: int, fewer: int) -> float:
    """Cost per freed resource of going from more units to fewer; infinite where nothing is freed."""
    freed = size[more] - size[fewer]
    return float((cost[fewer] - cost[more]) / freed) if freed > 0 else float("inf")


def _free(curves: Sequence[UnitCurve], budget: float, ranking: Ranking) -> tuple[tuple[int, ...], float]:
    steps: list[tuple[float, int, int, int]] = []
    for i, curve in enumerate(curves):
        hull = corners(curve, ranking)
        cost, size = curve.cumulative(), _size(curve, ranking)
        for place, (more, fewer) in enumerate(zip(hull[:-1].tolist(), hull[1:].tolist(), strict=True)):
            steps.append((_slope(cost, size, more, fewer), i, place, fewer))
    kept = [curve.n_live for curve in curves]
    used = sum(curve.usage[curve.n_live] for curve in curves)
    limit = budget * (1 + _ROUNDING)
    threshold = 0.0
    for slope, i, _place, fewer in sorted(steps):
        if used <= limit:
            break
        curve, others = curves[i], used - curves[i].usage[kept[i]]
        # The last step may be longer than needed: as much of it as the budget asks for, at a permitted width.
        between = np.flatnonzero(curve.permitted[: kept[i]])
        between = between[(between >= fewer) & (others + curve.usage[between] <= limit)]
        kept[i] = int(between[-1]) if between.size else fewer
        used = others + curve.usage[kept[i]]
        threshold = slope
    return tuple(kept), threshold


def _equal(curves: Sequence[UnitCurve], budget: float) -> tuple[tuple[int, ...], None]:
    by_kind = _by_kind(curves)
    choices = {kind: _common(own) for kind, own in by_kind.items()}
    limit = budget * (1 + _ROUNDING)
    costs = {kind: _totals([c.cumulative() for c in own], choices[kind]) for kind, own in by_kind.items()}
    usage = {kind: _totals([c.usage for c in own], choices[kind]) for kind, own in by_kind.items()}
    best: tuple[float, float, dict[SubLayerKind, int]] | None = None
    for pair in product(*(range(len(own)) for own in choices.values())):
        at = dict(zip(choices, pair, strict=True))
        used = sum(usage[kind][i] for kind, i in at.items())
        if used > limit or any(used - freed <= limit for freed in _last_steps(usage, at)):
            continue
        cost = sum(costs[kind][i] for kind, i in at.items())
        if best is None or (cost, -used) < best[:2]:
            best = (cost, -used, {kind: int(choices[kind][i]) for kind, i in at.items()})
    assert best is not None, "the least usage was checked"
    return tuple(best[2][c.kind] for c in curves), None


def _last_steps(usage: Mapping[SubLayerKind, FloatArray], at: Mapping[SubLayerKind, int]) -> list[float]:
    """What keeping one step more of each kind uses less; nothing for a kind of which all is kept. Never above 0."""
    return [float(usage[kind][i] - usage[kind][i + 1]) for kind, i in at.items() if i + 1 < len(usage[kind])]


def _by_kind(curves: Sequence[UnitCurve]) -> dict[SubLayerKind, list[UnitCurve]]:
    return {kind: [c for c in curves if c.kind is kind] for kind in SubLayerKind if any(c.kind is kind for c in curves)}


def _common(curves: Sequence[UnitCurve]) -> IntArray:
    """Numbers of units that all sub-layers of a kind may keep; at least one, because a stock model has some."""
    shortest = min(c.n_live for c in curves)
    permitted = np.logical_and.reduce([c.permitted[: shortest + 1] for c in curves])
    if all(c.n_live == shortest for c in curves):
        permitted[shortest] = True
    return np.flatnonzero(permitted[1:]) + 1


def _totals(values: Sequence[FloatArray], at: IntArray) -> FloatArray:
    total: FloatArray = np.sum([v[at] for v in values], axis=0)
    return total


def _least_usage(curves: Sequence[UnitCurve], widths: Widths) -> float:
    if widths is Widths.FREE:
        return float(sum(c.usage[: c.n_live + 1][_permitted(c)].min() for c in curves))
    total = 0.0
    for kind, own in _by_kind(curves).items():
        common = _common(own)
        if not common.size:
            remedy = "a smaller multiple" if kind is SubLayerKind.MLP else "heads: true"
            raise ParameterError(
                f"widths: {Widths.UNIFORM}: no permitted number of units of the {kind} fits into all blocks, the "
                f"smallest of which has {min(c.n_live for c in own)}; ask for {remedy}, or for widths: {Widths.FREE}"
            )
        total += float(sum(c.usage[common[0]] for c in own))
    return total


def _permitted(curve: UnitCurve) -> NDArray[np.bool_]:
    permitted = curve.permitted.copy()
    permitted[curve.n_live] = True
    return permitted
