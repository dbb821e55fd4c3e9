import dataclasses

import pytest
import torch
from torch import Tensor

from surgeon.choices import UpdateRule
from surgeon.errors import NonFiniteError, NumericalError
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.structure_update import update_structures
from surgeon.pruning.weight_update import UpdateResult
from surgeon.recipe import Damping, UpdateSpec
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

REMOVALS = [
    pytest.param((1, 3), (), id="rows"),
    pytest.param((), (0, 2), id="columns"),
    pytest.param((0, 3), (1, 2, 4), id="both"),
    pytest.param((1,), (3,), id="one of each"),
]
PLAIN = Case(bias=True, removed=True, few_tokens=False, dead=False)
EPS32 = 2.0**-24
"""Relative error of rounding to float32."""


def update(
    problem: Problem, gone_rows: tuple[int, ...], gone_columns: tuple[int, ...], rule: UpdateRule
) -> UpdateResult:
    """Removes live structures, given by their position among the live ones."""
    live = kfac_linear(problem.linear, problem.factors, DAMPING)
    return update_structures(live, *problem.masks(gone_rows, gone_columns), UpdateSpec(rule), WHERE)


def assert_places(result: UpdateResult, problem: Problem, updated: Tensor) -> None:
    """The result holds ``updated`` `[W b]`: to 1e-8 of the largest weight, and rounded to float32."""
    weight, bias = problem.place(updated)
    tolerance = 1e-8 * float(problem.w.abs().max())
    assert result.linear.weight.dtype is torch.float32
    assert ((result.linear.weight - weight).abs() <= EPS32 * weight.abs() + tolerance).all()
    if bias is None:
        assert result.linear.bias is None
    else:
        assert result.linear.bias is not None
        assert result.linear.bias.dtype is torch.float32
        assert ((result.linear.bias - bias).abs() <= EPS32 * bias.abs() + tolerance).all()


def assert_removed(result: UpdateResult, live_rows: Tensor, live_columns: Tensor) -> None:
    """What went is exactly zero, a row's bias with it, and no longer lives."""
    assert torch.equal(result.linear.live_rows, live_rows)
    assert torch.equal(result.linear.live_columns, live_columns)
    assert not result.linear.weight[~live_rows].any()
    assert not result.linear.weight[:, ~live_columns].any()
    if result.linear.bias is not None:
        assert not result.linear.bias[~live_rows].any()


@pytest.mark.parametrize(("gone_rows", "gone_columns"), REMOVALS)
@pytest.mark.parametrize("case", CASES)
def test_exact_update_is_the_minimiser_with_all_removed_at_once(
    case: Case, gone_rows: tuple[int, ...], gone_columns: tuple[int, ...]
) -> None:
    problem = make_problem(case)
    w = problem.w
    result = update(problem, gone_rows, gone_columns, UpdateRule.EXACT)
    curvature = torch.kron(problem.g_damped, problem.a_damped)
    delta, expected = best_change(curvature, w, gone_mask(w, gone_rows, gone_columns))
    assert_places(result, problem, w + delta)
    assert_removed(result, *problem.masks(gone_rows, gone_columns))
    assert result.predicted_cost == pytest.approx(expected, rel=1e-9)
    kept = delta * ~gone_mask(w, gone_rows, gone_columns)
    assert result.relative_change == pytest.approx(float(kept.norm() / w.norm()), rel=1e-6)


@pytest.mark.parametrize(("gone_rows", "gone_columns"), REMOVALS)
@pytest.mark.parametrize("case", CASES)
def test_independent_update_is_the_sum_of_two_separate_solutions(
    case: Case, gone_rows: tuple[int, ...], gone_columns: tuple[int, ...]
) -> None:
    problem = make_problem(case)
    w = problem.w
    result = update(problem, gone_rows, gone_columns, UpdateRule.INDEPENDENT)
    curvature = torch.kron(problem.g_damped, problem.a_damped)
    by_rows, _ = best_change(curvature, w, gone_mask(w, gone_rows, []))
    by_columns, _ = best_change(curvature, w, gone_mask(w, [], gone_columns))
    updated = (w + by_rows + by_columns) * ~gone_mask(w, gone_rows, gone_columns)
    assert_places(result, problem, updated)
    assert_removed(result, *problem.masks(gone_rows, gone_columns))
    assert result.predicted_cost == pytest.approx(objective(curvature, updated - w), rel=1e-9)


@pytest.mark.parametrize(("gone_rows", "gone_columns"), REMOVALS)
@pytest.mark.parametrize("case", CASES)
def test_without_update_the_others_stay_as_they_are(
    case: Case, gone_rows: tuple[int, ...], gone_columns: tuple[int, ...]
) -> None:
    problem = make_problem(case)
    w = problem.w
    result = update(problem, gone_rows, gone_columns, UpdateRule.NONE)
    updated = w * ~gone_mask(w, gone_rows, gone_columns)
    weight, bias = problem.place(updated)
    assert torch.equal(result.linear.weight.double(), weight)
    assert bias is None or torch.equal(torch.as_tensor(result.linear.bias).double(), bias)
    assert_removed(result, *problem.masks(gone_rows, gone_columns))
    curvature = torch.kron(problem.g_damped, problem.a_damped)
    assert result.predicted_cost == pytest.approx(objective(curvature, updated - w), rel=1e-10)
    assert result.relative_change == 0.0


@pytest.mark.parametrize(("gone_rows", "gone_columns"), REMOVALS)
@pytest.mark.parametrize("case", CASES)
def test_no_rule_beats_the_exact_one(case: Case, gone_rows: tuple[int, ...], gone_columns: tuple[int, ...]) -> None:
    for seed in range(5):
        problem = make_problem(case, seed)
        exact, independent, none = (
            update(problem, gone_rows, gone_columns, rule).predicted_cost
            for rule in (UpdateRule.EXACT, UpdateRule.INDEPENDENT, UpdateRule.NONE)
        )
        assert exact < none
        if gone_rows and gone_columns:
            assert exact < independent
        else:
            assert exact == pytest.approx(independent, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_independent_update_misses_the_cross_term(case: Case) -> None:
    problem = make_problem(case)
    gone_rows, gone_columns = [0, 3], [1, 2, 4]
    w, g, a = problem.w, problem.g_damped, problem.a_damped
    kept_rows = [i for i in range(len(g)) if i not in gone_rows]
    kept_columns = [j for j in range(len(a)) if j not in gone_columns]
    p = torch.linalg.solve(g[kept_rows][:, kept_rows], g[kept_rows][:, gone_rows])
    s = torch.linalg.solve(a[kept_columns][:, kept_columns], a[kept_columns][:, gone_columns]).T
    cross = torch.zeros_like(w)
    cross[torch.tensor(kept_rows)[:, None], torch.tensor(kept_columns)] = p @ w[gone_rows][:, gone_columns] @ s
    exact = update(problem, tuple(gone_rows), tuple(gone_columns), UpdateRule.EXACT)
    independent = update(problem, tuple(gone_rows), tuple(gone_columns), UpdateRule.INDEPENDENT)
    expected, _ = problem.place(cross)
    missed = exact.linear.weight.double() - independent.linear.weight.double()
    assert float(cross.abs().max()) > 0.01
    torch.testing.assert_close(missed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_rows_first_gives_the_same_as_columns_first(case: Case) -> None:
    problem = make_problem(case)
    gone_rows, gone_columns = [0, 3], [1, 2, 4]
    updated, g, a = problem.w.clone(), problem.g_damped, problem.a_damped
    kept_rows = [i for i in range(len(g)) if i not in gone_rows]
    kept_columns = [j for j in range(len(a)) if j not in gone_columns]
    p = torch.linalg.solve(g[kept_rows][:, kept_rows], g[kept_rows][:, gone_rows])
    updated[kept_rows] += p @ updated[gone_rows]
    updated[gone_rows] = 0
    s = torch.linalg.solve(a[kept_columns][:, kept_columns], a[kept_columns][:, gone_columns]).T
    updated[:, kept_columns] += updated[:, gone_columns] @ s
    updated[:, gone_columns] = 0
    assert_places(update(problem, tuple(gone_rows), tuple(gone_columns), UpdateRule.EXACT), problem, updated)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("rows_first", [False, True], ids=["columns first", "rows first"])
def test_two_shots_without_damping_are_as_good_as_one(rows_first: bool, bias: bool) -> None:
    """The same weights, and costs that add up, when the curvature is that of the first shot."""
    problem = make_problem(Case(bias=bias, removed=False, few_tokens=False, dead=False))
    undamped = Damping(0.0, 0.0)
    all_rows, all_columns = problem.masks([], [])
    rows, columns = problem.masks([0, 3], [1, 2, 4])
    live = kfac_linear(problem.linear, problem.factors, undamped)
    at_once = update_structures(live, rows, columns, UpdateSpec(UpdateRule.EXACT), WHERE)
    middle = (rows, all_columns) if rows_first else (all_rows, columns)
    first = update_structures(live, *middle, UpdateSpec(UpdateRule.EXACT), WHERE)
    again = kfac_linear(first.linear, problem.factors, undamped)
    second = update_structures(again, rows, columns, UpdateSpec(UpdateRule.EXACT), WHERE)
    torch.testing.assert_close(second.linear.weight, at_once.linear.weight, rtol=1e-5, atol=1e-5)
    assert first.predicted_cost + second.predicted_cost == pytest.approx(at_once.predicted_cost, rel=1e-5)


@pytest.mark.parametrize("rule", UpdateRule)
@pytest.mark.parametrize("case", CASES)
def test_nothing_removed_changes_nothing(case: Case, rule: UpdateRule) -> None:
    problem = make_problem(case)
    result = update(problem, (), (), rule)
    weight, bias = problem.place(problem.w)
    assert torch.equal(result.linear.weight, weight.float())
    assert bias is None or torch.equal(torch.as_tensor(result.linear.bias), bias.float())
    assert_removed(result, *problem.masks([], []))
    assert result.predicted_cost == 0.0
    assert result.relative_change == 0.0


@pytest.mark.parametrize("rule", UpdateRule)
@pytest.mark.parametrize("case", CASES)
def test_all_rows_removed_leaves_nothing(case: Case, rule: UpdateRule) -> None:
    problem = make_problem(case)
    result = update(problem, tuple(range(len(problem.rows))), (), rule)
    assert result.linear.n_live_weights == 0
    assert not result.linear.weight.any()
    assert result.linear.bias is None or not result.linear.bias.any()
    curvature = torch.kron(problem.g_damped, problem.a_damped)
    assert result.predicted_cost == pytest.approx(objective(curvature, -problem.w), rel=1e-10)
    assert result.relative_change == 0.0


@pytest.mark.parametrize("case", CASES)
def test_all_columns_removed_leave_the_bias_to_make_up_for_them(case: Case) -> None:
    problem = make_problem(case)
    gone = tuple(range(len(problem.columns)))
    result = update(problem, (), gone, UpdateRule.EXACT)
    w = problem.w
    delta, expected = best_change(torch.kron(problem.g_damped, problem.a_damped), w, gone_mask(w, [], gone))
    assert result.predicted_cost == pytest.approx(expected, rel=1e-9)
    assert_places(result, problem, w + delta)
    assert not result.linear.weight.any()
    assert result.linear.n_live_weights == 0
    if problem.has_bias:
        assert delta[:, -1].abs().min() > 1e-3, "the bias takes over the mean of the output"


@pytest.mark.parametrize("rule", UpdateRule)
def test_everything_removed(rule: UpdateRule) -> None:
    problem = make_problem(PLAIN)
    result = update(problem, tuple(range(len(problem.rows))), tuple(range(len(problem.columns))), rule)
    assert not result.linear.weight.any()
    assert result.linear.bias is not None
    assert not result.linear.bias.any()
    curvature = torch.kron(problem.g_damped, problem.a_damped)
    assert result.predicted_cost == pytest.approx(objective(curvature, -problem.w), rel=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_single_row_left(case: Case) -> None:
    problem = make_problem(case)
    gone = tuple(range(1, len(problem.rows)))
    result = update(problem, gone, (0,), UpdateRule.EXACT)
    w = problem.w
    delta, expected = best_change(torch.kron(problem.g_damped, problem.a_damped), w, gone_mask(w, gone, [0]))
    assert result.linear.weight.any(dim=1).nonzero()[:, 0].tolist() == [problem.rows[0]]
    assert_places(result, problem, w + delta)
    assert result.predicted_cost == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_predicted_cost_of_one_structure_is_its_obs_cost_under_the_damped_curvature(case: Case) -> None:
    problem = make_problem(case)
    w, g, a = problem.w, problem.g_damped, problem.a_damped
    for i in range(len(problem.rows)):
        expected = 0.5 * float(w[i] @ a @ w[i] / torch.linalg.inv(g)[i, i])
        assert update(problem, (i,), (), UpdateRule.EXACT).predicted_cost == pytest.approx(expected, rel=1e-9)
    for j in range(len(problem.columns)):
        expected = 0.5 * float(w[:, j] @ g @ w[:, j] / torch.linalg.inv(a)[j, j])
        assert update(problem, (), (j,), UpdateRule.EXACT).predicted_cost == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rule", UpdateRule)
@pytest.mark.parametrize("biased", [False, True])
def test_an_entirely_dead_linear_stays_zero(biased: bool, rule: UpdateRule) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = factors_from(random(generator, 20, N_IN), torch.zeros(20, N_OUT, dtype=torch.float64))
    linear = PrunedLinear.dense(torch.ones(N_OUT, N_IN), torch.ones(N_OUT) if biased else None)
    live = kfac_linear(linear, factors, DAMPING)
    result = update_structures(live, live.linear.live_rows, live.linear.live_columns, UpdateSpec(rule), WHERE)
    assert not result.linear.weight.any()
    assert result.linear.n_live_weights == 0
    assert (result.predicted_cost, result.relative_change) == (0.0, 0.0)
    assert (result.linear.bias is not None) == biased
    assert result.linear.bias is None or not result.linear.bias.any()


@pytest.mark.parametrize("rule", UpdateRule)
def test_only_the_bias_lives_on_when_no_input_arrives(rule: UpdateRule) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = factors_from(torch.zeros(20, N_IN, dtype=torch.float64), random(generator, 20, N_OUT))
    bias = random(generator, N_OUT).float()
    live = kfac_linear(PrunedLinear.dense(torch.ones(N_OUT, N_IN), bias), factors, DAMPING)
    result = update_structures(live, live.linear.live_rows, live.linear.live_columns, UpdateSpec(rule), WHERE)
    assert not result.linear.weight.any()
    assert result.linear.bias is not None
    assert torch.equal(result.linear.bias, bias)
    assert (result.predicted_cost, result.relative_change) == (0.0, 0.0)


@pytest.mark.parametrize("rule", UpdateRule)
def test_weights_that_are_not_finite_are_an_error(rule: UpdateRule) -> None:
    problem = make_problem(PLAIN)
    weight = problem.linear.weight.clone()
    weight[problem.rows[1], problem.columns[1]] = torch.inf
    broken = dataclasses.replace(problem, linear=dataclasses.replace(problem.linear, weight=weight))
    with pytest.raises(NonFiniteError, match=r"^block 0, fc1: .*not finite; raise prune\.damping"):
        update(broken, (0,), (2,), rule)


@pytest.mark.parametrize("gone", [(0, 1, 2), (0,)], ids=["many", "one"])
def test_a_factor_that_is_not_positive_definite_is_an_error(gone: tuple[int, ...]) -> None:
    problem = make_problem(PLAIN)
    assert len(problem.rows) == 6
    live = kfac_linear(problem.linear, problem.factors, DAMPING)
    live.curvature._rows.matrix = -torch.ones(6, 6)
    message = r"^block 0, fc1, outputs: the 6x6 factor is not positive definite even .*larger prune\.damping"
    with pytest.raises(NumericalError, match=message):
        update_structures(live, *problem.masks(gone, []), UpdateSpec(UpdateRule.EXACT), WHERE)


@pytest.mark.parametrize("n_gone", [1, 2, 3, 5, 8, 12, 15])
@pytest.mark.parametrize("few_tokens", [False, True], ids=["enough", "few"])
def test_few_and_many_removed_structures_are_solved_for_alike(few_tokens: bool, n_gone: int) -> None:
    """One factorisation, with what stays in front, serves both."""
    generator = torch.Generator().manual_seed(n_gone)
    n_out, n_in, n_tokens = 16, 17, 3 if few_tokens else 90
    inputs = random(generator, n_tokens, n_in) @ random(generator, n_in, n_in)
    gradients = random(generator, n_tokens, n_out) @ random(generator, n_out, n_out)
    linear = PrunedLinear.dense(random(generator, n_out, n_in).float(), None)
    live = kfac_linear(linear, factors_from(inputs, gradients), DAMPING)
    w, g, a = linear.weight.double(), live.curvature.gradients.damped, live.curvature.activations.damped
    gone_rows = torch.randperm(n_out, generator=generator)[:n_gone].tolist()
    gone_columns = torch.randperm(n_in, generator=generator)[:n_gone].tolist()
    kept_rows = [i for i in range(n_out) if i not in gone_rows]
    kept_columns = [j for j in range(n_in) if j not in gone_columns]
    rows = torch.tensor([i in kept_rows for i in range(n_out)])
    columns = torch.tensor([j in kept_columns for j in range(n_in)])
    result = update_structures(live, rows, columns, UpdateSpec(UpdateRule.EXACT), WHERE)
    # Stationary in every kept weight, which makes it the optimum of this convex problem.
    p = torch.linalg.solve(g[kept_rows][:, kept_rows], g[kept_rows][:, gone_rows])
    s = torch.linalg.solve(a[kept_columns][:, kept_columns], a[kept_columns][:, gone_columns]).T
    updated = torch.zeros_like(w)
    left = w[:, kept_columns] + w[:, gone_columns] @ s
    updated[torch.tensor(kept_rows)[:, None], torch.tensor(kept_columns)] = left[kept_rows] + p @ left[gone_rows]
    delta = updated - w
    slope = g @ delta @ a
    assert float(slope[kept_rows][:, kept_columns].abs().max()) < 1e-9 * float(slope.abs().max())
    tolerance = 1e-8 * float(w.abs().max())
    assert ((result.linear.weight - updated).abs() <= EPS32 * updated.abs() + tolerance).all()
    assert result.predicted_cost == pytest.approx(0.5 * float((slope * delta).sum()), rel=1e-9)
