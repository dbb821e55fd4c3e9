"""Masks of single weights and N:M groups against sorting everything."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from surgeon.choices import Allocation, Structure
from surgeon.errors import ParameterError
from surgeon.pruning.costs import GONE
from surgeon.pruning.granularity import NMPattern, parse_granularity
from surgeon.pruning.selection import Selection, check_divides, select_weights, weights_that_stay

SHAPES = [(4, 8), (6, 16), (3, 24)]
WEIGHTS = Structure.WEIGHTS


def make_costs(seed: int = 0, ties: bool = False, gone: float = 0.0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    costs = []
    for shape in SHAPES:
        values = draw.integers(0, 5, shape) / 4 if ties else draw.lognormal(0, 6, shape)
        one = values.astype(np.float32)
        one[draw.random(shape) < gone] = GONE
        costs.append(one)
    return costs


def stays(costs: list[np.ndarray], found: Selection, granularity: Structure | NMPattern) -> list[np.ndarray]:
    pairs = zip(costs, found.cuts, strict=True)
    return [weights_that_stay(torch.from_numpy(one), granularity, cut).numpy() for one, cut in pairs]


@pytest.mark.parametrize("gone", [0.0, 0.2])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.97])
def test_one_threshold_is_that_of_sorting_all_costs(target: float, ties: bool, gone: float) -> None:
    costs = make_costs(ties=ties, gone=gone)
    found = select_weights(lambda: costs, target, WEIGHTS, Allocation.GLOBAL)
    everything = np.concatenate([one.ravel() for one in costs])
    n = max(math.ceil(target * everything.size), int((everything == GONE).sum()))
    expected = np.ones(everything.size, dtype=bool)
    expected[np.argsort(everything, kind="stable")[:n]] = False  # ties by linear, then by index
    mine = np.concatenate([one.ravel() for one in stays(costs, found, WEIGHTS)])
    assert np.array_equal(mine, expected)
    assert found.sparsity == n / everything.size
    now = ~expected & (everything != GONE)
    assert found.n_removed == int(now.sum())
    assert found.predicted_cost == pytest.approx(float(everything[now].sum(dtype=np.float64)))
    assert found.threshold == (everything[now].max() if now.any() else 0.0)


def test_costs_of_any_size_are_in_order() -> None:
    """Zero, denormal and huge numbers, and minus zero."""
    one = np.array([[0.0, -0.0, 1e-45, 1e-38, 1.0, 3e38, 7e-20, 2.0]], dtype=np.float32)
    for n in range(1, 8):
        found = select_weights(lambda: [one], n / 8, WEIGHTS, Allocation.GLOBAL)
        kept = weights_that_stay(torch.from_numpy(one), WEIGHTS, found.cuts[0]).numpy()
        expected = np.ones(8, dtype=bool)
        expected[np.argsort(one[0], kind="stable")[:n]] = False
        assert np.array_equal(kept[0], expected), n


@pytest.mark.parametrize("allocation", [Allocation.PER_LAYER, Allocation.PER_ROW])
def test_a_share_for_each_linear_or_row(allocation: Allocation) -> None:
    costs = make_costs(ties=True, gone=0.1)
    found = select_weights(lambda: costs, 0.6, WEIGHTS, allocation)
    for one, kept in zip(costs, stays(costs, found, WEIGHTS), strict=True):
        if allocation is Allocation.PER_LAYER:
            assert (~kept).sum() == math.ceil(0.6 * one.size)
            parts = [(one.ravel(), kept.ravel())]
        else:
            assert ((~kept).sum(axis=1) == math.ceil(0.6 * one.shape[1])).all()
            parts = list(zip(one, kept, strict=True))
        for values, mine in parts:
            assert values[~mine].max() <= values[mine].min()


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 8), NMPattern(1, 4), NMPattern(3, 4)])
@pytest.mark.parametrize("allocation", Allocation)
@pytest.mark.parametrize("ties", [False, True])
def test_a_full_pattern_has_exactly_n_zeros_in_every_group(
    pattern: NMPattern, allocation: Allocation, ties: bool
) -> None:
    costs = make_costs(ties=ties)
    found = select_weights(lambda: costs, pattern.sparsity, pattern, allocation)
    for one, kept in zip(costs, stays(costs, found, pattern), strict=True):
        groups, mine = one.reshape(-1, pattern.m), kept.reshape(-1, pattern.m)
        assert ((~mine).sum(axis=1) == pattern.n).all()
        for values, keep in zip(groups, mine, strict=True):
            expected = np.ones(pattern.m, dtype=bool)
            expected[np.argsort(values, kind="stable")[: pattern.n]] = False
            assert np.array_equal(keep, expected)
    assert found.sparsity == pattern.sparsity


def test_at_intermediate_shots_the_cheapest_groups_go_first_and_masks_only_grow() -> None:
    pattern = NMPattern(2, 4)
    costs = make_costs()
    before = [np.ones(shape, dtype=bool) for shape in SHAPES]
    for target in (0.125, 0.25, 0.5):
        found = select_weights(partial(list, costs), target, pattern, Allocation.GLOBAL)
        kept = stays(costs, found, pattern)
        n_groups = np.concatenate([(~one).reshape(-1, 4).sum(axis=1) for one in kept])
        assert set(n_groups) <= {0, 2}
        assert (n_groups == 2).sum() == math.ceil(target * sum(one.size for one in costs) / 2)
        total = np.concatenate([np.sort(one.reshape(-1, 4), axis=1)[:, :2].sum(axis=1) for one in make_costs()])
        assert total[n_groups == 2].max() <= np.append(total[n_groups == 0], np.inf).min()
        assert not any((now & ~then).any() for now, then in zip(kept, before, strict=True))
        before = kept
        costs = [np.where(now, one, np.float32(GONE)) for one, now in zip(costs, kept, strict=True)]


def test_a_target_that_is_met_already_removes_nothing() -> None:
    costs = make_costs(gone=0.6)
    found = select_weights(lambda: costs, 0.3, WEIGHTS, Allocation.GLOBAL)
    assert found.n_removed == 0
    assert [np.array_equal(k, one != GONE) for one, k in zip(costs, stays(costs, found, WEIGHTS), strict=True)]


def test_widths_that_do_not_divide_are_refused() -> None:
    check_divides(12, NMPattern(2, 4), "block 3, fc1")
    check_divides(10, WEIGHTS, "block 3, fc1")
    with pytest.raises(ParameterError, match="structure 2:4: block 3, fc1 has 10 inputs, which do not divide"):
        check_divides(10, NMPattern(2, 4), "block 3, fc1")


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4"])
def test_patterns_that_leave_or_take_everything_are_refused(text: str) -> None:
    with pytest.raises(ParameterError, match=f"structure {text}: N of every M weights"):
        parse_granularity(text)


def test_granularities_by_name() -> None:
    assert parse_granularity("2:4") == NMPattern(2, 4)
    assert str(parse_granularity("4:8")) == "4:8"
    assert parse_granularity("rows") is Structure.ROWS
    with pytest.raises(ParameterError, match="structure 'row': allowed: units, rows, columns"):
        parse_granularity("row")
