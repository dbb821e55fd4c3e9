"""The order in which groups of columns go, and what each adds, against the dense constrained minimum."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from surgeon.choices import Cost, Curvature
from surgeon.errors import NonFiniteError
from surgeon.pruning import elimination
from surgeon.pruning.elimination import Elimination, cut_in_place, eliminate
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import LiveLinear, live_linear
from surgeon.recipe import Damping
from tests.surgeon.pruning.dense import WHERE, Problem, best_change, factors_from, random

N_OUT, N_IN, N_TOKENS = 5, 12, 90
DAMPING = Damping(activations=0.02, gradients=0.0)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
WIDTHS = pytest.mark.parametrize("width", [1, 3])


def make(bias: bool, seed: int = 0) -> tuple[LiveLinear, Tensor]:
    """A linear with correlated inputs, and its dense curvature: gradients as they are, activations damped."""
    generator = torch.Generator().manual_seed(seed)
    inputs = random(generator, N_TOKENS, N_IN) @ random(generator, N_IN, N_IN) / 3 + 0.5
    gradients = random(generator, N_TOKENS, N_OUT) @ random(generator, N_OUT, N_OUT)
    linear = PrunedLinear.dense(
        random(generator, N_OUT, N_IN).float(), random(generator, N_OUT).float() if bias else None
    )
    factors = factors_from(inputs, gradients)
    problem = Problem(linear, factors, inputs, gradients, list(range(N_OUT)), list(range(N_IN)))
    a = problem.a + DAMPING.activations * problem.a.diagonal().mean() * torch.eye(len(problem.a), dtype=torch.float64)
    return live_linear(linear, factors, Curvature.KFAC, DAMPING, WHERE), torch.kron(problem.g, a)


def owner_of(width: int) -> Tensor:
    return torch.arange(N_IN) // width


def least(live: LiveLinear, dense: Tensor, groups: Tensor, width: int) -> float:
    """What removing some groups together costs at least."""
    gone = torch.zeros(live.weight.shape, dtype=torch.bool)
    gone[:, :N_IN] = torch.isin(owner_of(width), groups)
    return best_change(dense, live.weight, gone)[1]


@BIAS
@WIDTHS
def test_every_step_takes_the_cheapest_and_costs_add_up(bias: bool, width: int) -> None:
    live, dense = make(bias)
    n_groups = N_IN // width
    result = eliminate(live, owner_of(width), n_groups, Cost.OBS, WHERE, steps=n_groups)
    assert sorted(result.order.tolist()) == list(range(n_groups))
    before = 0.0
    for step in range(n_groups):
        now = least(live, dense, result.order[: step + 1], width)
        assert float(result.costs[step]) == pytest.approx(now - before, rel=1e-6, abs=1e-9)
        others = [least(live, dense, torch.cat([result.order[:step], g[None]]), width) for g in result.order[step:]]
        assert now == pytest.approx(min(others), rel=1e-6)
        before = now


@BIAS
def test_several_at_a_time_cost_what_they_cost_together(bias: bool) -> None:
    live, dense = make(bias)
    result = eliminate(live, owner_of(1), N_IN, Cost.OBS, WHERE, steps=4)
    for n_gone in (3, 6, 9, 12):
        expected = least(live, dense, result.order[:n_gone], 1)
        assert float(result.costs[:n_gone].sum()) == pytest.approx(expected, rel=1e-6)


@WIDTHS
@pytest.mark.parametrize("cost", Cost)
def test_without_steps_costs_are_those_of_each_group_alone(cost: Cost, width: int) -> None:
    live, dense = make(bias=True)
    result = eliminate(live, owner_of(width), N_IN // width, cost, WHERE, steps=0)
    assert all(a <= b for a, b in pairwise(result.costs.tolist()))
    for group, found in zip(result.order, result.costs.tolist(), strict=True):
        expected = least(live, dense, group[None], width)
        if cost is Cost.OBD:
            gone = torch.zeros(live.weight.shape, dtype=torch.bool)
            gone[:, :N_IN] = owner_of(width) == group
            change = torch.where(gone, -live.weight, 0.0)
            a = live.curvature.activations.matrix  # type: ignore[attr-defined]
            g = live.curvature.gradients.matrix  # type: ignore[attr-defined]
            expected = 0.5 * float((g @ change @ a * change).sum())
        assert found == pytest.approx(expected, rel=1e-6)


def test_two_columns_that_say_the_same_are_cheap_once() -> None:
    """Each alone is replaced by the other; the second to go is not."""
    generator = torch.Generator().manual_seed(3)
    inputs = random(generator, N_TOKENS, 4)
    inputs[:, 1] = inputs[:, 0]
    factors = factors_from(inputs, random(generator, N_TOKENS, N_OUT))
    linear = PrunedLinear.dense(torch.ones(N_OUT, 4), None)
    live = live_linear(linear, factors, Curvature.KFAC, Damping(1e-6, 0.0), WHERE)
    once = eliminate(live, torch.arange(4), 4, Cost.OBS, WHERE, steps=0)
    again = eliminate(live, torch.arange(4), 4, Cost.OBS, WHERE, steps=4)
    assert set(once.order[:2].tolist()) == {0, 1}, "both look free"
    assert int(again.order[0]) in (0, 1) and float(again.costs[0]) < 1e-3 * float(again.costs[1])
    assert float(again.costs[1:].sum()) > 100 * float(once.costs[:2].sum())


def test_groups_without_columns_cost_nothing_and_go_first() -> None:
    live, _ = make(bias=False)
    owner = owner_of(1).where(owner_of(1) != 4, 5)  # column 4 counts as one of group 5: group 4 is empty
    result = eliminate(live, owner, N_IN, Cost.OBS, WHERE, 12)
    assert int(result.order[0]) == 4
    assert float(result.costs[0]) == 0.0


def test_a_cost_that_is_not_finite_is_an_error_with_an_address() -> None:
    live, _ = make(bias=False)
    live.weight[0, 7] = float("nan")
    for steps in (0, 12):
        with pytest.raises(NonFiniteError, match=f"{WHERE}: the cost of unit 7 is not finite"):
            eliminate(live, owner_of(1), N_IN, Cost.OBS, WHERE, steps=steps)


def test_it_is_a_pure_function() -> None:
    live, _ = make(bias=True)
    before = live.weight.clone()
    first, second = (eliminate(live, owner_of(3), 4, Cost.OBS, WHERE, 4) for _ in range(2))
    assert isinstance(first, Elimination)
    assert torch.equal(first.order, second.order) and torch.equal(first.costs, second.costs)
    assert_close(live.weight, before, rtol=0, atol=0)


@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_rows_and_columns_are_cut_within_the_memory_of_a_matrix(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "_CUT_ENTRIES", at_a_time)
    for rows in ([], [0], [3], [0, 2, 3], [0, 1, 2, 3]):
        for columns in (None, [], [1, 4], [0, 1, 2, 3, 4]):
            matrix = torch.arange(20.0).reshape(4, 5)
            expected = matrix[rows] if columns is None else matrix[rows][:, columns]
            index = torch.tensor(rows, dtype=torch.int64)
            kept = cut_in_place(matrix, index, None if columns is None else torch.tensor(columns, dtype=torch.int64))
            assert torch.equal(kept, expected)
            assert kept.numel() == 0 or kept.data_ptr() == matrix.data_ptr()
