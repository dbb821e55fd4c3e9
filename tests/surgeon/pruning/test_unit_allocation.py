"""Widths against brute force over all widths."""

from itertools import pairwise, product

import numpy as np
import pytest

from surgeon.choices import Ranking, Widths
from surgeon.errors import ParameterError
from surgeon.pruning.unit_allocation import UnitAllocation, UnitCurve, allocate_units, corners
from surgeon.pruning.units import SubLayerKind

MLP, ATTENTION = SubLayerKind.MLP, SubLayerKind.ATTENTION
PER_RESOURCE, PER_UNIT = Ranking.COST_PER_WEIGHT, Ranking.COST


def curve(
    costs: list[float], per_unit: float = 1.0, kind: SubLayerKind = MLP, multiple: int = 1, n_units: int | None = None
) -> UnitCurve:
    n = len(costs)
    permitted = np.arange(n + 1) % multiple == 0
    return UnitCurve("block 0", kind, np.array(costs), per_unit * np.arange((n_units or n) + 1.0), permitted)


def random_curves(seed: int) -> list[UnitCurve]:
    """Two blocks: five neurons of weight 3 and two groups of weight 8 each."""
    draw = np.random.default_rng(seed)
    return [
        curve(list(draw.exponential(size=n)), per_unit, kind)
        for kind, n, per_unit in ((ATTENTION, 2, 8.0), (MLP, 5, 3.0)) * 2
    ]


def brute_force(curves: list[UnitCurve], budget: float, *, equal: bool) -> float:
    best = np.inf
    for kept in product(*(range(1 if equal else 0, c.n_live + 1) for c in curves)):
        by_kind = {(c.kind, k) for c, k in zip(curves, kept, strict=True)}
        if equal and len(by_kind) > 2:
            continue
        if sum(c.usage[k] for c, k in zip(curves, kept, strict=True)) <= budget:
            best = min(best, sum(c.cumulative()[k] for c, k in zip(curves, kept, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [62.0, 61.0, 40.0, 25.0])
def test_equal_widths_are_the_cheapest_there_are(seed: int, budget: float) -> None:
    curves = random_curves(seed)
    found = allocate_units(curves, budget, Widths.UNIFORM, PER_RESOURCE)
    assert found.predicted_cost == pytest.approx(brute_force(curves, budget, equal=True))
    assert found.usage <= budget
    assert found.kept[0] == found.kept[2] and found.kept[1] == found.kept[3]


@pytest.mark.parametrize("seed", range(5))
def test_free_widths_are_the_cheapest_at_corners(seed: int) -> None:
    """At a corner of the hulls the greedy choice is exact: no other widths that use as little cost less."""
    curves = random_curves(seed)
    for budget in np.arange(0.0, 62.0, 1.0):
        found = allocate_units(curves, budget, Widths.FREE, PER_RESOURCE)
        assert found.usage <= budget
        at_corner = all(k in corners(c, PER_RESOURCE) for k, c in zip(found.kept, curves, strict=True))
        exact = brute_force(curves, found.usage, equal=False)
        if at_corner:
            assert found.predicted_cost == pytest.approx(exact)
        else:
            assert found.predicted_cost <= exact + max(c.costs.max() for c in curves)


def test_a_dear_unit_behind_a_cheap_one_is_not_hidden() -> None:
    """Costs 4 then 1: both together cost 2.5 each, so they go before two of 3 each."""
    found = allocate_units([curve([4.0, 1.0]), curve([3.0, 3.0])], 2.0, Widths.FREE, PER_RESOURCE)
    assert found.kept == (0, 2)


def test_free_widths_stop_within_one_unit() -> None:
    found = allocate_units([curve([1.0] * 10), curve([5.0] * 10)], 13.2, Widths.FREE, PER_RESOURCE)
    assert found.kept == (3, 10)
    assert found.threshold == pytest.approx(1.0)


def test_widths_are_rounded_inside_the_choice() -> None:
    """Eight cheap neurons can only go as four or eight."""
    costs = [0.1] * 5 + [9.0] * 3
    found = allocate_units([curve(costs, multiple=4), curve([2.0] * 8, multiple=4)], 11.0, Widths.FREE, PER_RESOURCE)
    assert found.kept == (4, 4), "the fifth cheap one would take three dear ones with it"


def test_what_is_compared() -> None:
    """A unit of 10 weights at cost 5 is cheaper per weight than one of 1 weight at cost 1, and dearer per unit."""
    curves = [curve([5.0], per_unit=10.0, kind=ATTENTION), curve([1.0] * 10)]
    assert allocate_units(curves, 19.0, Widths.FREE, PER_RESOURCE).kept == (0, 10)
    assert allocate_units(curves, 19.0, Widths.FREE, PER_UNIT).kept == (1, 9)


def test_a_sub_layer_that_costs_nothing_goes_whole() -> None:
    curves = [curve([0.0] * 4), curve([1.0] * 4)]
    assert allocate_units(curves, 4.0, Widths.FREE, PER_RESOURCE).kept == (0, 4)
    assert allocate_units(curves, 4.0, Widths.UNIFORM, PER_RESOURCE).kept == (2, 2), "equal widths keep some"


def test_what_is_gone_stays_gone() -> None:
    """Three of five units live: usage counts from there, and a met budget removes nothing."""
    shrunk = curve([1.0, 1.0, 1.0], n_units=5)
    assert allocate_units([shrunk], 3.0, Widths.FREE, PER_RESOURCE) == UnitAllocation((3,), 3.0, 0.0, 0.0)
    assert allocate_units([shrunk], 2.0, Widths.UNIFORM, PER_RESOURCE).kept == (2,)


def test_time_that_does_not_fall_is_not_paid_for() -> None:
    """Widths between steps of the hardware free nothing, so only the corners of the steps are chosen."""
    steps = np.array([0.0, 1.0, 1.0, 2.0, 2.0])
    found = allocate_units(
        [UnitCurve("block 0", MLP, np.full(4, 0.5), steps, np.ones(5, dtype=np.bool_))], 1.0, Widths.FREE, PER_RESOURCE
    )
    assert found.kept == (2,), "one unit more than fits the time is kept for nothing"


@pytest.mark.parametrize("widths", Widths)
def test_a_budget_out_of_reach_is_refused(widths: Widths) -> None:
    with pytest.raises(ParameterError, match="with the fewest units that"):
        allocate_units([curve([1.0] * 4)], -1.0, widths, PER_RESOURCE)


def test_a_multiple_that_fits_into_no_block_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"no permitted number of units of the mlp .* smallest of which has 3"):
        allocate_units([curve([1.0] * 4, multiple=8), curve([1.0] * 3, multiple=8)], 2.0, Widths.UNIFORM, PER_RESOURCE)
    kept = [
        UnitCurve(f"block {i}", SubLayerKind.ATTENTION, np.ones(n), np.arange(n + 1.0), np.arange(n + 1) == n)
        for i, n in enumerate((2, 1))
    ]
    with pytest.raises(ParameterError, match=r"units of the attention .* has 1; ask for heads: true, or"):
        allocate_units(kept, 2.0, Widths.UNIFORM, PER_RESOURCE)


@pytest.mark.parametrize("widths", Widths)
@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_budget_never_keeps_more_in_total(widths: Widths, seed: int) -> None:
    curves = random_curves(seed)
    usages = [allocate_units(curves, b, widths, PER_RESOURCE).usage for b in np.arange(62.0, 22.0, -2.0)]
    assert all(a >= b for a, b in pairwise(usages)) or widths is Widths.UNIFORM
