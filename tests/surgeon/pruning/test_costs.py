import dataclasses

import pytest
import torch
from torch.testing import assert_close

from surgeon.choices import Cost
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.errors import NonFiniteError
from surgeon.pruning.costs import StructureCosts, structure_costs
from surgeon.pruning.linear import PrunedLinear
from surgeon.recipe import Damping
from tests.surgeon.pruning.dense import (
    CASES,
    DAMPING,
    N_IN,
    N_OUT,
    WHERE,
    Case,
    Problem,
    best_change,
    factors_from,
    gone_mask,
    kfac_linear,
    make_problem,
    objective,
    random,
)


def costs_of(problem: Problem, cost: Cost) -> StructureCosts:
    return structure_costs(kfac_linear(problem.linear, problem.factors, DAMPING), cost, WHERE)


@pytest.mark.parametrize("case", CASES)
def test_obs_cost_is_the_optimum_of_the_constrained_quadratic_problem(case: Case) -> None:
    problem = make_problem(case)
    costs = costs_of(problem, Cost.OBS)
    w = problem.w
    row_curvature = torch.kron(problem.g_damped, problem.a)
    column_curvature = torch.kron(problem.g, problem.a_damped)
    for i, row in enumerate(problem.rows):
        _, expected = best_change(row_curvature, w, gone_mask(w, [i], []))
        assert float(costs.rows[row]) == pytest.approx(expected, rel=1e-8)
    for j, column in enumerate(problem.columns):
        _, expected = best_change(column_curvature, w, gone_mask(w, [], [j]))
        assert float(costs.columns[column]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_obd_cost_is_the_quadratic_model_with_the_others_fixed(case: Case) -> None:
    problem = make_problem(case)
    costs = costs_of(problem, Cost.OBD)
    w, curvature = problem.w, torch.kron(problem.g, problem.a)
    for i, row in enumerate(problem.rows):
        expected = objective(curvature, -w * gone_mask(w, [i], []))
        assert float(costs.rows[row]) == pytest.approx(expected, rel=1e-10)
    for j, column in enumerate(problem.columns):
        expected = objective(curvature, -w * gone_mask(w, [], [j]))
        assert float(costs.columns[column]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("cost", Cost)
@pytest.mark.parametrize("case", CASES)
def test_only_live_structures_stand_and_never_the_bias(case: Case, cost: Cost) -> None:
    problem = make_problem(case)
    costs = costs_of(problem, cost)
    assert costs.rows.shape == costs.live_rows.shape == (N_OUT,)
    assert costs.columns.shape == costs.live_columns.shape == (N_IN,)
    assert costs.rows.dtype is costs.columns.dtype is torch.float64
    assert costs.live_rows.nonzero()[:, 0].tolist() == problem.rows
    assert costs.live_columns.nonzero()[:, 0].tolist() == problem.columns
    assert (costs.rows[costs.live_rows] > 0).all()
    assert (costs.columns[costs.live_columns] > 0).all()
    assert not costs.rows[~costs.live_rows].any()
    assert not costs.columns[~costs.live_columns].any()


@pytest.mark.parametrize("cost", Cost)
def test_the_bias_takes_part_in_the_cost_of_its_row(cost: Cost) -> None:
    problem = make_problem(Case(bias=True, removed=False, few_tokens=False, dead=False))
    assert problem.linear.bias is not None
    larger = dataclasses.replace(problem.linear, bias=problem.linear.bias + torch.eye(N_OUT)[3])
    before, after = costs_of(problem, cost), costs_of(dataclasses.replace(problem, linear=larger), cost)
    changed = (before.rows != after.rows).nonzero()[:, 0].tolist()
    assert changed == [3]
    assert_close(before.columns, after.columns, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_letting_the_others_adapt_never_costs_more(case: Case) -> None:
    """With the same damping on both sides: ``1 / [Ĝ⁻¹]_rr <= Ĝ_rr``."""
    problem = make_problem(case)
    live = kfac_linear(problem.linear, problem.factors, DAMPING)
    factors = live.curvature.gradients.damped, live.curvature.activations.damped
    curvature = KroneckerCurvature(*factors, live.curvature.shape, Damping(0.0, 0.0), WHERE)
    damped = dataclasses.replace(live, curvature=curvature)
    obs, obd = structure_costs(damped, Cost.OBS, WHERE), structure_costs(damped, Cost.OBD, WHERE)
    assert (obs.rows <= obd.rows * (1 + 1e-12)).all()
    assert (obs.columns <= obd.columns * (1 + 1e-12)).all()
    assert obs.rows.sum() < 0.9 * obd.rows.sum()


@pytest.mark.parametrize("cost", Cost)
@pytest.mark.parametrize("biased", [False, True])
def test_an_entirely_dead_linear_costs_nothing(biased: bool, cost: Cost) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = factors_from(random(generator, 20, N_IN), torch.zeros(20, N_OUT, dtype=torch.float64))
    linear = PrunedLinear.dense(torch.ones(N_OUT, N_IN), torch.ones(N_OUT) if biased else None)
    costs = structure_costs(kfac_linear(linear, factors, DAMPING), cost, WHERE)
    assert not costs.live_rows.any()
    assert not costs.live_columns.any()
    assert not costs.rows.any()
    assert not costs.columns.any()


def test_a_cost_that_is_not_finite_names_the_structure() -> None:
    problem = make_problem(Case(bias=False, removed=True, few_tokens=False, dead=False))
    weight = problem.linear.weight.clone()
    weight[3, 4] = torch.nan
    linear = dataclasses.replace(problem.linear, weight=weight)
    with pytest.raises(NonFiniteError, match=r"^block 0, fc1: the cost of row 3 is nan; raise prune\.damping"):
        costs_of(dataclasses.replace(problem, linear=linear), Cost.OBS)


def test_a_column_cost_that_is_not_finite_names_the_column() -> None:
    problem = make_problem(Case(bias=True, removed=True, few_tokens=False, dead=False))
    live = kfac_linear(problem.linear, problem.factors, DAMPING)
    live.curvature._rows.matrix = live.curvature.gradients.matrix.clone()
    live.curvature._rows.matrix[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=f"^block 0, fc1: the cost of column {problem.columns[0]} is inf"):
        structure_costs(live, Cost.OBS, WHERE)
