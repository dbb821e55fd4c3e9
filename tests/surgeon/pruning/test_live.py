import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from surgeon.choices import Cost, Curvature
from surgeon.curvature import triangular
from surgeon.curvature.damping import factorise
from surgeon.curvature.factors import KroneckerTerms, LinearFactors
from surgeon.errors import NumericalError
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import live_linear, select, without_dead
from surgeon.recipe import Damping
from tests.surgeon.pruning.dense import (
    CASES,
    COLUMN_WITHOUT_INPUT,
    DAMPING,
    N_IN,
    ROW_WITHOUT_GRADIENT,
    WHERE,
    Case,
    damped,
    kfac_linear,
    make_problem,
    random,
)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def plain_factors(n_out: int, n_in: int) -> LinearFactors:
    return LinearFactors(torch.eye(n_in), torch.zeros(n_in), torch.eye(n_out))


@pytest.mark.parametrize("case", CASES)
def test_live_curvature_is_the_restriction_of_weight_and_factors(case: Case) -> None:
    problem = make_problem(case)
    live = kfac_linear(problem.linear, problem.factors, DAMPING)
    assert live.linear.live_rows.nonzero()[:, 0].tolist() == problem.rows
    assert live.linear.live_columns.nonzero()[:, 0].tolist() == problem.columns
    assert (live.n_dead_rows, live.n_dead_columns) == (problem.n_dead_rows, problem.n_dead_columns)
    assert live.n_live_columns == len(problem.columns)
    assert torch.equal(live.weight, problem.w)
    assert_close(live.curvature.activations.matrix, problem.a)
    assert_close(live.curvature.gradients.matrix, problem.g)
    assert_close(live.curvature.activations.damped, problem.a_damped)
    assert_close(live.curvature.gradients.damped, problem.g_damped)
    for factor in (live.curvature.activations, live.curvature.gradients):
        assert_close(factor.cholesky @ factor.cholesky.T, factor.damped)
        fresh = factorise(factor.matrix, factor.damping, WHERE)  # of which the Cholesky factor is used up
        assert_close(fresh.inverted_diagonal(), torch.linalg.inv(factor.damped).diagonal(), rtol=1e-9, atol=1e-12)
        assert factor.escalations == 0


@pytest.mark.parametrize("case", CASES)
def test_factors_in_float32_are_damped_in_float64(case: Case) -> None:
    problem = make_problem(case)
    f = problem.factors
    single = LinearFactors(f.activations.float(), f.mean_input.float(), f.gradients.float())
    live = kfac_linear(problem.linear, single, DAMPING)
    expected = damped(single.gradients.double()[problem.rows][:, problem.rows], DAMPING.gradients)
    assert live.curvature.gradients.damped.dtype is torch.float64
    assert_close(live.curvature.gradients.damped, expected, rtol=1e-14, atol=1e-14)
    assert live.curvature.activations.damped.dtype is torch.float64
    assert_close(live.curvature.activations.damped, problem.a_damped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_dead_structures_become_zero_and_the_rest_keeps_its_value(case: Case) -> None:
    problem = make_problem(case)
    cleaned = without_dead(problem.linear, problem.factors)
    weight, bias = problem.place(problem.w)
    assert torch.equal(cleaned.weight.double(), weight)
    if bias is None:
        assert cleaned.bias is None
    else:
        assert cleaned.bias is not None
        assert torch.equal(cleaned.bias.double(), bias)
    if case.dead:
        assert problem.linear.weight[ROW_WITHOUT_GRADIENT].count_nonzero() > 0, "removed by lack of curvature alone"
        assert problem.linear.weight[:, COLUMN_WITHOUT_INPUT].count_nonzero() > 0


def test_a_zero_row_with_a_bias_lives_by_its_bias() -> None:
    weight, bias = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0, 0.0])
    cleaned = without_dead(PrunedLinear.dense(weight, bias), plain_factors(3, 2))
    assert cleaned.live_rows.tolist() == [True, True, False]
    assert cleaned.bias is not None
    assert cleaned.bias.tolist() == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("bias", [None, torch.zeros(2)], ids=["nobias", "zero bias"])
def test_a_row_that_reads_dead_columns_only_is_dead(bias: Tensor | None) -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    factors = LinearFactors(torch.diag(torch.tensor([0.0, 1.0])), torch.zeros(2), torch.eye(2))
    cleaned = without_dead(PrunedLinear.dense(weight, bias), factors)
    assert cleaned.live_rows.tolist() == [False, True]
    assert cleaned.live_columns.tolist() == [False, True]


def test_a_column_that_feeds_dead_rows_only_is_dead() -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    factors = LinearFactors(torch.eye(2), torch.zeros(2), torch.diag(torch.tensor([0.0, 1.0])))
    cleaned = without_dead(PrunedLinear.dense(weight, None), factors)
    assert cleaned.live_rows.tolist() == [False, True]
    assert cleaned.live_columns.tolist() == [False, True]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("how", ["no weight", "no gradient", "no input"])
def test_an_entirely_dead_linear_has_nothing_left(how: str, biased: bool) -> None:
    weight = torch.zeros(3, 4) if how == "no weight" else torch.ones(3, 4)
    factors = LinearFactors(
        torch.zeros(4, 4) if how == "no input" else torch.eye(4),
        torch.zeros(4),
        torch.zeros(3, 3) if how == "no gradient" else torch.eye(3),
    )
    linear = PrunedLinear.dense(weight, torch.zeros(3) if biased else None)
    live = kfac_linear(linear, factors, DAMPING)
    assert live.linear.n_live_weights == 0
    assert not live.linear.live_rows.any()
    assert not live.linear.live_columns.any()
    assert (live.n_dead_rows, live.n_dead_columns) == (3, 4)
    assert live.weight.shape == (0, int(biased))
    assert live.n_live_columns == 0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("cost", list(Cost))
def test_a_linear_without_gradients_has_kronecker_terms_of_zero(rank: int, biased: bool, cost: Cost) -> None:
    """What reads it is gone. Its bias is no obstacle, though its factor is zero too."""
    n = 4 + biased
    factors = LinearFactors(terms=KroneckerTerms(torch.zeros(rank, 3, 3), torch.zeros(rank, n, n)))
    kind = Curvature.NEAREST_KRONECKER if rank == 1 else Curvature.KRONECKER_SUM
    linear = PrunedLinear.dense(torch.ones(3, 4), torch.ones(3) if biased else None)
    live = live_linear(linear, factors, kind, DAMPING, WHERE)
    assert (live.n_dead_rows, live.n_dead_columns) == (3, 4)
    assert live.curvature.row_costs(live.weight, cost).shape == (0,)
    assert live.curvature.column_costs(live.weight, cost).tolist() == [0.0] * biased


@pytest.mark.parametrize("n", [triangular._LEAF, triangular._LEAF + 1, 2 * triangular._LEAF + 7])
def test_diagonal_of_the_inverse_of_a_wide_factor(n: int) -> None:
    x = random(torch.Generator().manual_seed(n), n // 2, n)
    factor = factorise(x.T @ x / len(x), 0.01, WHERE)
    assert_close(factor.inverted_diagonal(), torch.linalg.inv(factor.damped).diagonal(), rtol=1e-9, atol=0)


def test_select_takes_rows_and_columns_of_a_matrix() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    rows, columns = torch.tensor([True, False, True]), torch.tensor([False, True, True, False])
    every_row, every_column = torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert select(matrix, rows, columns).tolist() == [[1, 2], [9, 10]]
    assert select(matrix, rows, every_column).tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert select(matrix, every_row, columns).tolist() == [[1, 2], [5, 6], [9, 10]]
    assert torch.equal(select(matrix, every_row, every_column), matrix)
    assert select(matrix, ~every_row, columns).shape == (0, 2)


def test_the_factors_of_a_linear_without_dead_structures_are_not_changed() -> None:
    """Where everything lives nothing is copied, so damping must not write to the factors."""
    problem = make_problem(Case(bias=False, removed=False, few_tokens=False, dead=False))
    f = problem.factors
    before = f.activations.clone(), f.gradients.clone(), problem.linear.weight.clone()
    kfac_linear(problem.linear, f, DAMPING)
    after = f.activations, f.gradients, problem.linear.weight
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_damping_is_relative_to_the_mean_of_the_diagonal() -> None:
    factor = factorise(diagonal(1.0, 2.0, 6.0), 0.1, WHERE)
    assert_close(factor.damped, diagonal(1.3, 2.3, 6.3))
    assert_close(factor.matrix, diagonal(1.0, 2.0, 6.0))
    assert factor.damping == 0.1
    assert_close(factorise(1000 * diagonal(1.0, 2.0, 6.0), 0.1, WHERE).damped, 1000 * factor.damped)


def test_the_mean_of_the_diagonal_is_over_live_structures_and_the_bias() -> None:
    weight = torch.tensor([[1.0, 0.0, 1.0]])
    factors = LinearFactors(diagonal(3.0, 100.0, 5.0), torch.zeros(3, dtype=torch.float64), diagonal(2.0))
    without = kfac_linear(PrunedLinear.dense(weight, None), factors, Damping(1.0, 0.0))
    assert_close(without.curvature.activations.damped, diagonal(3.0 + 4, 5.0 + 4))
    biased = kfac_linear(PrunedLinear.dense(weight, torch.ones(1)), factors, Damping(1.0, 0.0))
    assert_close(biased.curvature.activations.damped, diagonal(3.0 + 3, 5.0 + 3, 1.0 + 3))


def test_each_factor_has_its_own_damping() -> None:
    problem = make_problem(Case(bias=True, removed=False, few_tokens=False, dead=False))
    live = kfac_linear(problem.linear, problem.factors, Damping(activations=0.5, gradients=0.25))
    assert_close(live.curvature.activations.damped, damped(problem.a, 0.5))
    assert_close(live.curvature.gradients.damped, damped(problem.g, 0.25))
    assert (live.curvature.activations.damping, live.curvature.gradients.damping) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("matrix", "damping", "escalations", "used"),
    [
        (torch.ones(2, 2, dtype=torch.float64), 0.0, 1, 1e-5),
        (diagonal(1.0, -1e-4), 0.0, 3, 1e-3),
        (diagonal(1.0, -0.01), 0.004, 1, 0.04),
        (diagonal(1.0, -0.1), 0.004, 2, 0.4),
        (diagonal(1.0, 1.0), 0.0, 0, 0.0),
    ],
    ids=["singular", "indefinite", "damped too little", "damped far too little", "definite"],
)
def test_damping_is_escalated_until_the_factor_is_positive_definite(
    matrix: Tensor, damping: float, escalations: int, used: float
) -> None:
    factor = factorise(matrix, damping, WHERE)
    assert factor.escalations == escalations
    assert factor.damping == pytest.approx(used, rel=1e-12)
    assert_close(factor.damped, damped(matrix, used))
    assert_close(factor.cholesky @ factor.cholesky.T, factor.damped)
    assert torch.equal(factor.matrix, matrix), "the undamped factor stays what it was"


@pytest.mark.parametrize(
    ("damping", "message"),
    [
        (
            0.0,
            r"fc1: the 2x2 factor .* even with damping 0\.001 \(asked: 0, raised 3 times; .*number 2\)\. .*damping",
        ),
        (1e-4, r"even with damping 0\.1 \(asked: 0\.0001, raised 3 times"),
    ],
)
def test_after_three_escalations_the_message_says_what_was_tried(damping: float, message: str) -> None:
    with pytest.raises(NumericalError, match=message):
        factorise(diagonal(1.0, -0.5), damping, WHERE)


@pytest.mark.parametrize("entry", [(1, 1), (1, 0)], ids=["diagonal", "off diagonal"])
@pytest.mark.parametrize(("side", "label"), [("gradients", "outputs"), ("activations", "inputs")])
def test_nan_in_a_factor_is_never_taken_for_a_dead_structure(side: str, label: str, entry: tuple[int, int]) -> None:
    factors = plain_factors(3, 3)
    row, column = entry
    getattr(factors, side)[row, column] = getattr(factors, side)[column, row] = torch.nan
    with pytest.raises(NumericalError, match=f"^block 0, fc1, {label}: the 3x3 factor"):
        kfac_linear(PrunedLinear.dense(torch.ones(3, 3), None), factors, DAMPING)


def test_a_singular_factor_is_named_by_its_side_and_its_escalation_recorded() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.ones(N_IN, dtype=torch.float64)
    factors = LinearFactors(torch.outer(direction, direction), direction, torch.eye(4, dtype=torch.float64))
    linear = PrunedLinear.dense(random(generator, 4, N_IN).float(), None)
    live = kfac_linear(linear, factors, Damping(0.0, 0.0))
    assert (live.curvature.activations.escalations, live.curvature.gradients.escalations) == (1, 0)
    assert live.curvature.activations.damping == pytest.approx(1e-5, rel=1e-12)
    assert live.curvature.gradients.damping == 0.0
    indefinite = LinearFactors(torch.eye(N_IN), torch.zeros(N_IN), diagonal(1.0, 1.0, 1.0, -0.5))
    with pytest.raises(NumericalError, match=r"^block 0, fc1, outputs: the 4x4 factor"):
        kfac_linear(linear, indefinite, Damping(0.0, 0.0))
