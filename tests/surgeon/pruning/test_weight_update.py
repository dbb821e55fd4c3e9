"""Updates for single weights against the dense constrained minimum."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from surgeon.choices import Curvature, Structure, UpdateRule
from surgeon.errors import NonFiniteError, NumericalError
from surgeon.pruning.granularity import NMPattern
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import LiveLinear, live_linear
from surgeon.pruning.sequential import update_sequentially
from surgeon.pruning.structure_update import update_structures
from surgeon.pruning.weight_update import UpdateResult, update_weights
from surgeon.recipe import Damping, UpdateSpec
from tests.surgeon.curvature.test_interface import CORRELATED, DAMPING, WHERE, make
from tests.surgeon.pruning.dense import CASES, Case, Problem, best_change, make_problem, objective, random

EXACT = UpdateSpec(UpdateRule.EXACT, max_iterations=500, tolerance=1e-9)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])


def in_float64(live: LiveLinear) -> LiveLinear:
    return replace(live, weight=live.weight.double())


def half(shape: torch.Size, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def with_bias(keep: Tensor, live: LiveLinear) -> Tensor:
    keep = live.within(keep)
    return torch.cat([keep, torch.ones(len(keep), 1, dtype=torch.bool)], dim=1) if live.has_bias else keep


def live_of(result: UpdateResult, live: LiveLinear) -> Tensor:
    """``[W b]`` after an update, over what lived before."""
    weight = live.within(result.linear.weight)
    if result.linear.bias is None:
        return weight.double()
    return torch.cat([weight, result.linear.bias[live.linear.live_rows, None]], dim=1).double()


@BIAS
@pytest.mark.parametrize("kind", CORRELATED)
def test_exact_is_the_minimum_with_all_weights_correlated(kind: Curvature, bias: bool) -> None:
    case = make(kind, bias)
    live = in_float64(case.live)
    keep = half(live.linear.weight.shape)
    result = update_weights(live, keep, EXACT, WHERE)
    stays = with_bias(keep, live)
    change, expected = best_change(case.damped, live.weight, ~stays)
    assert result.predicted_cost == pytest.approx(expected, rel=1e-6)
    assert_close(live_of(result, live), (live.weight + change) * stays, rtol=1e-5, atol=1e-5)
    assert result.linear.weight.dtype is torch.float32
    assert not result.linear.weight[~keep].any(), "what goes is exactly zero"
    assert torch.equal(result.linear.alive(), keep)
    assert result.convergence is not None
    assert result.convergence.reached


@pytest.mark.parametrize("case", CASES)
def test_exact_on_linears_with_dead_parts(case: Case) -> None:
    problem: Problem = make_problem(case)
    live = live_linear(problem.linear, problem.factors, Curvature.KFAC, DAMPING, WHERE)
    keep = half(problem.linear.weight.shape)
    result = update_weights(live, keep, EXACT, WHERE)
    f = torch.kron(live.curvature.gradients.damped, live.curvature.activations.damped)  # type: ignore[attr-defined]
    stays = with_bias(keep, live)
    _, expected = best_change(f, live.weight, ~stays)
    assert result.predicted_cost == pytest.approx(expected, rel=1e-5)
    assert objective(f, live_of(result, live) - live.weight) == pytest.approx(expected, rel=1e-4)
    dead = ~(live.linear.live_rows[:, None] & live.linear.live_columns[None, :])
    assert not result.linear.weight[dead].any()
    assert not result.linear.alive()[dead].any()


def test_a_few_iterations_are_reported_as_not_converged() -> None:
    live = in_float64(make(Curvature.KFAC, bias=True).live)
    keep = half(live.linear.weight.shape)
    costs = []
    for iterations in (1, 2, 4, 8, 30):
        result = update_weights(live, keep, UpdateSpec(UpdateRule.EXACT, iterations, 1e-6), WHERE)
        assert result.convergence is not None
        assert result.convergence.iterations <= iterations
        assert result.convergence.reached == (result.convergence.residual <= 1e-6)
        change = live_of(result, live) - live.weight
        assert result.predicted_cost == pytest.approx(live.curvature.energy(change), rel=1e-4)
        costs.append(result.predicted_cost)
    assert all(later <= earlier for earlier, later in pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]


def test_single_precision_reaches_the_minimum_of_double_precision() -> None:
    """On a Kronecker problem of 48 x 64 at 50%, as large as a dense answer allows."""
    generator = torch.Generator().manual_seed(0)
    n_out, n_in = 48, 64
    inputs = random(generator, 300, n_in) @ random(generator, n_in, n_in)
    gradients = random(generator, 300, n_out) @ random(generator, n_out, n_out)
    from tests.surgeon.pruning.dense import factors_from

    linear = PrunedLinear.dense(random(generator, n_out, n_in).float(), None)
    factors = factors_from(inputs, gradients)
    keep = half(linear.weight.shape)
    spec = UpdateSpec(UpdateRule.EXACT, 400, 1e-5)
    exact = [
        update_weights(
            live_linear(linear, factors, Curvature.KFAC, Damping(0.1, 0.1), WHERE, dtype), keep, spec, WHERE
        ).predicted_cost
        for dtype in (torch.float32, torch.float64)
    ]
    assert exact[0] == pytest.approx(exact[1], rel=1e-3)
    chunked = update_weights(
        live_linear(linear, factors, Curvature.KFAC, Damping(0.1, 0.1), WHERE, torch.float32),
        keep,
        UpdateSpec(UpdateRule.CHUNKED, max_correlate=256),
        WHERE,
    )
    assert chunked.predicted_cost > 1.2 * exact[1], "chunks lose correlations"


@BIAS
def test_one_chunk_of_everything_is_exact(bias: bool) -> None:
    live = in_float64(make(Curvature.KFAC, bias).live)
    keep = half(live.linear.weight.shape)
    whole = update_weights(live, keep, UpdateSpec(UpdateRule.CHUNKED, max_correlate=10_000), WHERE)
    exact = update_weights(live, keep, EXACT, WHERE)
    assert_close(whole.linear.weight, exact.linear.weight, rtol=1e-4, atol=1e-5)
    assert whole.predicted_cost == pytest.approx(exact.predicted_cost, rel=1e-5)


@pytest.mark.parametrize("kind", [Curvature.KFAC, Curvature.ACTIVATIONS])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_chunks_follow_their_definition(size: int, kind: Curvature) -> None:
    """Set after set, each solved as OBS would from the weights the sets before it left."""
    case = make(kind, bias=True)
    live = in_float64(case.live)
    keep = half(live.linear.weight.shape)
    stays = with_bias(keep, live)
    inverse = torch.linalg.inv(case.damped)
    weight = live.weight.flatten().clone()
    gone = (~stays).flatten().nonzero()[:, 0]
    for chunk in gone.split(size):
        weight -= inverse[:, chunk] @ torch.linalg.solve(inverse[chunk][:, chunk], weight[chunk])
    expected = weight.reshape(stays.shape) * stays
    result = update_weights(live, keep, UpdateSpec(UpdateRule.CHUNKED, max_correlate=size), WHERE)
    assert_close(live_of(result, live), expected, rtol=1e-5, atol=1e-5)
    assert result.predicted_cost == pytest.approx(objective(case.damped, expected - live.weight), rel=1e-6)


def test_none_changes_nothing_that_stays() -> None:
    case = make(Curvature.KFAC, bias=True)
    keep = half(case.live.linear.weight.shape)
    result = update_weights(in_float64(case.live), keep, UpdateSpec(UpdateRule.NONE), WHERE)
    assert torch.equal(result.linear.weight, case.live.linear.weight * keep)
    assert result.linear.bias is not None
    assert torch.equal(result.linear.bias, torch.as_tensor(case.live.linear.bias))
    assert result.relative_change == 0.0


@BIAS
@pytest.mark.parametrize("kind", [Curvature.KFAC, Curvature.EKFAC, Curvature.KRONECKER_SUM])
def test_a_newton_step_aims_at_the_minimum_of_the_whole_model(kind: Curvature, bias: bool) -> None:
    """With the gradient: minimise ``s <g, Δ> + ½ <Δ, F̂ Δ>`` subject to what goes."""
    case = make(kind, bias)
    gradient = random(torch.Generator().manual_seed(3), *case.weight.shape)
    live = replace(in_float64(case.live), loss_gradient=gradient)
    step = 0.4
    aim = case.weight - step * torch.linalg.solve(case.damped, gradient.flatten()).reshape(gradient.shape)
    keep = half(live.linear.weight.shape)
    stays = with_bias(keep, live)
    expected = aim + best_change(case.damped, aim, ~stays)[0]
    result = update_weights(live, keep, replace(EXACT, newton_step=step), WHERE)
    assert_close(live_of(result, live), expected * stays, rtol=1e-4, atol=1e-4)
    change = expected - case.weight
    total = step * float((gradient * change).sum()) + objective(case.damped, change)
    assert result.predicted_cost == pytest.approx(total, rel=1e-4)
    rows, columns = torch.ones(5, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    rows[1], columns[2], columns[4] = False, False, False
    stays = with_bias(rows[:, None] & columns[None, :], live) & rows[:, None]
    expected = aim + best_change(case.damped, aim, ~stays)[0]
    structured = update_structures(live, rows, columns, replace(EXACT, newton_step=step), WHERE)
    assert_close(live_of(structured, live), expected * stays, rtol=1e-4, atol=1e-4)
    change = expected - case.weight
    total = step * float((gradient * change).sum()) + objective(case.damped, change)
    assert structured.predicted_cost == pytest.approx(total, rel=1e-4)


@BIAS
@pytest.mark.parametrize("kind", [Curvature.EKFAC, Curvature.KRONECKER_SUM])
def test_rows_and_columns_with_a_curvature_that_is_no_product(kind: Curvature, bias: bool) -> None:
    case = make(kind, bias)
    rows, columns = torch.ones(5, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    rows[[0, 3]], columns[[1, 5]] = False, False
    result = update_structures(case.live, rows, columns, EXACT, WHERE)
    stays = with_bias(rows[:, None] & columns[None, :], case.live) & rows[:, None]
    change, expected = best_change(case.damped, case.weight, ~stays)
    assert result.predicted_cost == pytest.approx(expected, rel=1e-6)
    assert_close(live_of(result, case.live), (case.weight + change) * stays, rtol=1e-5, atol=1e-5)
    assert result.convergence is not None
    assert result.convergence.iterations < 20, "a near product preconditions well"
    assert result.linear.live_weights is None


def test_an_indefinite_curvature_is_an_error_with_an_address() -> None:
    case = make(Curvature.KFAC, bias=False)
    live = in_float64(case.live)
    object.__setattr__(live, "curvature", _Negative(live.curvature))
    with pytest.raises(NumericalError, match=r"^block 0, fc1: the curvature is not positive definite .*prune\.damping"):
        update_weights(live, half(live.linear.weight.shape), EXACT, WHERE)


class _Negative:
    """A curvature with the wrong sign."""

    def __init__(self, curvature: object) -> None:
        self._curvature = curvature

    def apply(self, x: Tensor) -> Tensor:
        return -self._curvature.apply(x)  # type: ignore[attr-defined, no-any-return]

    def damped_diagonal(self) -> Tensor:
        return self._curvature.damped_diagonal()  # type: ignore[attr-defined, no-any-return]


def test_a_weight_that_is_not_finite_is_an_error_with_an_address() -> None:
    live = in_float64(make(Curvature.KFAC, bias=False).live)
    live.weight[0, 0] = torch.nan
    keep = torch.ones(live.linear.weight.shape, dtype=torch.bool)
    with pytest.raises(NonFiniteError, match=r"^block 0, fc1: the update gave weights that are not finite"):
        update_weights(live, keep, UpdateSpec(UpdateRule.NONE), WHERE)


def sequential_by_definition(f: Tensor, weight: Tensor, goes: Tensor) -> Tensor:
    """Column after column: OBS over the columns that are left, row by row."""
    weight = weight.clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(f[column:, column:])
        error = torch.where(goes[:, column], weight[:, column], 0.0) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
        weight[goes[:, column], column] = 0.0
    return weight


@BIAS
@pytest.mark.parametrize("width", [1, 2, 4, 6, 128])
@pytest.mark.parametrize("granularity", [Structure.WEIGHTS, NMPattern(1, 2), NMPattern(2, 3)])
def test_sparsegpt_follows_its_definition(granularity: Structure | NMPattern, width: int, bias: bool) -> None:
    case = make(Curvature.ACTIVATIONS, bias)
    live = in_float64(case.live)
    target = granularity.sparsity if isinstance(granularity, NMPattern) else 0.5
    result = update_sequentially(live, target, granularity, width, WHERE)
    goes = ~with_bias(result.linear.alive(), live)
    a = live.curvature.activations.damped  # type: ignore[attr-defined]
    expected = sequential_by_definition(a, live.weight, goes)
    assert_close(live_of(result, live), expected, rtol=1e-5, atol=1e-6)
    assert int((~result.linear.alive()).sum()) == 15 if granularity is Structure.WEIGHTS else True
    if isinstance(granularity, NMPattern):
        groups = (~result.linear.alive()).reshape(5, -1, granularity.m).sum(dim=2)
        assert (groups == granularity.n).all()


def test_sparsegpt_chooses_the_cheapest_of_the_weights_as_they_are_then() -> None:
    live = in_float64(make(Curvature.ACTIVATIONS, bias=False).live)
    result = update_sequentially(live, 0.5, Structure.WEIGHTS, 2, WHERE)
    goes = ~result.linear.alive()
    a = live.curvature.activations.damped  # type: ignore[attr-defined]
    for first in (0, 2, 4):
        before = sequential_by_definition(a, live.weight, goes & (torch.arange(6) < first))
        upper = torch.linalg.cholesky(torch.linalg.inv(a), upper=True)
        costs = (before[:, first : first + 2] / upper.diagonal()[first : first + 2]).square()
        n_gone = int(goes[:, first : first + 2].sum())
        assert n_gone == 5
        assert costs[goes[:, first : first + 2]].max() < costs[~goes[:, first : first + 2]].min()


@pytest.mark.parametrize("granularity", [Structure.WEIGHTS, NMPattern(1, 2)])
def test_sparsegpt_goes_on_from_what_is_gone(granularity: Structure | NMPattern) -> None:
    live = in_float64(make(Curvature.ACTIVATIONS, bias=True).live)
    first = update_sequentially(live, 0.2, granularity, 128, WHERE)
    assert int((~first.linear.alive()).sum()) >= 6
    factors_linear = replace(live, linear=first.linear, weight=live_of(first, live))
    second = update_sequentially(factors_linear, 0.5, granularity, 128, WHERE)
    assert not (second.linear.alive() & ~first.linear.alive()).any(), "what is gone stays gone"
    assert int((~second.linear.alive()).sum()) == 15
    assert not second.linear.weight[~second.linear.alive()].any()
