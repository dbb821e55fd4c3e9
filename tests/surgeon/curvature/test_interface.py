"""Every curvature against its dense matrix: products, diagonals, inverses, and what removals cost."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from surgeon.choices import Cost, Curvature
from surgeon.curvature.diagonalised import DiagonalisedCurvature, KroneckerSumCurvature
from surgeon.curvature.factors import EigenMoments, KroneckerTerms, LinearFactors
from surgeon.curvature.interface import LinearCurvature
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.errors import NumericalError
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import LiveLinear, live_linear
from surgeon.recipe import Damping
from tests.surgeon.pruning.dense import best_change, damped, random

N_OUT, N_IN, N_TOKENS = 5, 6, 80
DAMPING = Damping(activations=0.02, gradients=0.05)
WHERE = "block 0, fc1"
KINDS = [
    Curvature.IDENTITY,
    Curvature.ACTIVATIONS,
    Curvature.DIAGONAL,
    Curvature.KFAC,
    Curvature.NEAREST_KRONECKER,
    Curvature.KRONECKER_SUM,
    Curvature.EKFAC,
]
CORRELATED = [kind for kind in KINDS if kind not in (Curvature.IDENTITY, Curvature.DIAGONAL)]
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])


@dataclass(frozen=True)
class Case:
    """A linear with tokens whose inputs and gradients depend on each other.

    Attributes:
        live: as the code under test sees it.
        undamped: ``F`` `[n, n]` float64; damped: ``F̂``.
    """

    live: LiveLinear
    undamped: Tensor
    damped: Tensor

    @property
    def weight(self) -> Tensor:
        return self.live.weight

    @property
    def curvature(self) -> LinearCurvature:
        return self.live.curvature


def make(kind: Curvature, bias: bool, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = random(generator, N_TOKENS, N_IN) @ random(generator, N_IN, N_IN) + 0.3
    g = random(generator, N_TOKENS, N_OUT) @ random(generator, N_OUT, N_OUT) * (1 + x[:, :1].abs())
    a = torch.cat([x, torch.ones(N_TOKENS, 1, dtype=x.dtype)], dim=1) if bias else x
    factor_a, factor_g = a.T @ a / N_TOKENS, g.T @ g / N_TOKENS
    eye_a, eye_g = torch.eye(len(factor_a), dtype=x.dtype), torch.eye(N_OUT, dtype=x.dtype)
    damped_a, damped_g = damped(factor_a, DAMPING.activations), damped(factor_g, DAMPING.gradients)
    factors = LinearFactors(x.T @ x / N_TOKENS, x.mean(dim=0), factor_g)
    if kind is Curvature.IDENTITY:
        undamped = full = torch.kron(eye_g, eye_a)
        factors = LinearFactors()
    elif kind is Curvature.ACTIVATIONS:
        undamped, full = torch.kron(eye_g, factor_a), torch.kron(eye_g, damped_a)
    elif kind is Curvature.DIAGONAL:
        moments = g.square().T @ a.square() / N_TOKENS
        undamped = full = torch.diag(moments.flatten())
        factors = LinearFactors(diagonal=moments)
    elif kind is Curvature.KFAC:
        undamped, full = torch.kron(factor_g, factor_a), torch.kron(damped_g, damped_a)
    elif kind is Curvature.EKFAC:
        (g_values, u), (a_values, v) = torch.linalg.eigh(factor_g), torch.linalg.eigh(factor_a)
        spectrum = (g @ u).square().T @ (a @ v).square() / N_TOKENS
        factors = LinearFactors(factors.activations, factors.mean_input, factor_g, EigenMoments(u, v, spectrum))
        basis = torch.kron(u, v)
        more = torch.outer(torch.linalg.eigvalsh(damped_g), torch.linalg.eigvalsh(damped_a))
        more -= torch.outer(g_values, a_values)
        undamped = basis @ torch.diag(spectrum.flatten()) @ basis.T
        full = basis @ torch.diag((spectrum + more).flatten()) @ basis.T
    else:
        terms = [(factor_g, factor_a)]
        if kind is Curvature.KRONECKER_SUM:
            second = random(generator, len(factor_a), len(factor_a)) / 9, random(generator, N_OUT, N_OUT) / 9
            terms.append((second[1] + second[1].T, second[0] + second[0].T))
        factors = LinearFactors(
            terms=KroneckerTerms(torch.stack([t[0] for t in terms]), torch.stack([t[1] for t in terms]))
        )
        undamped = sum((torch.kron(*term) for term in terms), start=torch.zeros(1, 1, dtype=x.dtype))
        full = undamped - torch.kron(factor_g, factor_a) + torch.kron(damped_g, damped_a)
    weight = random(generator, N_OUT, N_IN).float()
    linear = PrunedLinear.dense(weight, random(generator, N_OUT).float() if bias else None)
    live = live_linear(linear, factors, kind, DAMPING, WHERE)
    assert live.curvature.escalations == 0
    return Case(live, undamped, full)


def columns_of(case: Case) -> int:
    return case.weight.shape[1]


@BIAS
@pytest.mark.parametrize("kind", KINDS)
def test_apply_is_the_product_with_the_damped_matrix(kind: Curvature, bias: bool) -> None:
    case = make(kind, bias)
    x = random(torch.Generator().manual_seed(1), *case.weight.shape)
    expected = (case.damped @ x.flatten()).reshape(x.shape)
    assert_close(case.curvature.apply(x), expected, rtol=1e-9, atol=1e-9)
    single = case.curvature.apply(x.float())
    assert single.dtype is torch.float32
    assert_close(single.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert case.curvature.energy(x) == pytest.approx(0.5 * float(x.flatten() @ case.damped @ x.flatten()))
    assert_close(case.curvature.damped_diagonal(), case.damped.diagonal().reshape(x.shape), rtol=1e-9, atol=1e-9)


@BIAS
@pytest.mark.parametrize("kind", KINDS)
def test_solve_is_the_inverse(kind: Curvature, bias: bool) -> None:
    case = make(kind, bias)
    x = random(torch.Generator().manual_seed(1), *case.weight.shape)
    expected = torch.linalg.solve(case.damped, x.flatten()).reshape(x.shape)
    assert_close(case.curvature.solve(x), expected, rtol=1e-7, atol=1e-7)


def test_a_sum_of_three_products_refuses_to_solve() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    terms = KroneckerTerms(torch.stack([eye, 0.1 * eye, 0.1 * eye]), torch.stack([eye, 0.1 * eye, 0.1 * eye]))
    with pytest.raises(NotImplementedError, match="more than two"):
        KroneckerSumCurvature(terms, DAMPING, WHERE).solve(eye)


def removal(case: Case, gone: Tensor, cost: Cost) -> float:
    """What removing some weights costs by the dense matrix."""
    if cost is Cost.OBS:
        return best_change(case.damped, case.weight, gone)[1]
    change = torch.where(gone, -case.weight, 0.0).flatten()
    return 0.5 * float(change @ case.undamped @ change)


@BIAS
@pytest.mark.parametrize("cost", Cost)
@pytest.mark.parametrize("kind", KINDS)
def test_costs_of_single_weights(kind: Curvature, cost: Cost, bias: bool) -> None:
    case = make(kind, bias)
    found = case.curvature.weight_costs(case.weight, cost)
    for row in range(N_OUT):
        for column in range(columns_of(case)):
            gone = torch.zeros(case.weight.shape, dtype=torch.bool)
            gone[row, column] = True
            expected = removal(case, gone, cost)
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6), (row, column)


@BIAS
@pytest.mark.parametrize("cost", Cost)
@pytest.mark.parametrize("kind", [Curvature.DIAGONAL, Curvature.IDENTITY, Curvature.EKFAC, Curvature.KRONECKER_SUM])
def test_costs_of_rows_and_columns(kind: Curvature, cost: Cost, bias: bool) -> None:
    """(Those of a Kronecker product keep energies undamped and are tested with the pruning of rows and columns.)"""
    case = make(kind, bias)
    if kind is Curvature.DIAGONAL:
        cost = Cost.OBD  # nothing adapts
    rows, columns = case.curvature.row_costs(case.weight, cost), case.curvature.column_costs(case.weight, cost)
    for row in range(N_OUT):
        gone = torch.zeros(case.weight.shape, dtype=torch.bool)
        gone[row] = True
        assert float(rows[row]) == pytest.approx(removal(case, gone, cost), rel=1e-6)
    for column in range(columns_of(case)):
        gone = torch.zeros(case.weight.shape, dtype=torch.bool)
        gone[:, column] = True
        assert float(columns[column]) == pytest.approx(removal(case, gone, cost), rel=1e-6)


def test_ekfac_with_the_moments_of_kfac_is_kfac() -> None:
    """Where the eigenvalues are products, both are the same matrix, damping included."""
    kfac, ekfac = make(Curvature.KFAC, bias=True), make(Curvature.EKFAC, bias=True)
    assert isinstance(ekfac.curvature, DiagonalisedCurvature)
    a, g = (side.matrix for side in (kfac.curvature.activations, kfac.curvature.gradients))  # type: ignore[attr-defined]
    (g_values, u), (a_values, v) = torch.linalg.eigh(g), torch.linalg.eigh(a)
    moments = EigenMoments(u, v, torch.outer(g_values, a_values))
    linear = kfac.live.linear
    factors = LinearFactors(a[:-1, :-1], a[:-1, -1], g, moments)
    same = live_linear(linear, factors, Curvature.EKFAC, DAMPING, WHERE).curvature
    x = random(torch.Generator().manual_seed(2), *kfac.weight.shape)
    assert_close(same.apply(x), kfac.curvature.apply(x), rtol=1e-8, atol=1e-8)
    assert_close(same.solve(x), kfac.curvature.solve(x), rtol=1e-6, atol=1e-6)
    assert_close(same.weight_scales(Cost.OBS), kfac.curvature.weight_scales(Cost.OBS), rtol=1e-8, atol=0)


def test_an_indefinite_sum_raises_its_damping_and_says_so() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    negative = torch.diag(torch.tensor([1.0, 0.5, -1.5], dtype=torch.float64))
    terms = KroneckerTerms(torch.stack([eye, negative]), torch.stack([eye, eye]))
    curvature = KroneckerSumCurvature(terms, Damping(0.1, 0.1), WHERE)
    assert curvature.escalations == 1
    assert curvature.damping == (1.0, 1.0)
    assert_close(curvature.apply(eye), 4 * eye + negative)
    with pytest.raises(NumericalError, match=r"fc1: the sum of 2 .* after damping was raised 3 times from 1e-05"):
        KroneckerSumCurvature(
            KroneckerTerms(torch.stack([eye, 9 * negative]), torch.stack([eye, eye])), Damping(1e-5, 1e-5), WHERE
        )


def test_nothing_is_factorised_that_no_formula_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("factorised")

    case = make(Curvature.KFAC, bias=True)
    for name in ("cholesky_ex", "cholesky", "eigh", "inv"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    case.curvature.apply(case.weight)
    case.curvature.damped_diagonal()
    for cost in (case.curvature.row_costs, case.curvature.column_costs, case.curvature.weight_costs):
        cost(case.weight, Cost.OBD)
    with pytest.raises(AssertionError, match="factorised"):
        case.curvature.weight_costs(case.weight, Cost.OBS)


@pytest.mark.parametrize("width", [1, 2])
@BIAS
@pytest.mark.parametrize("cost", Cost)
@pytest.mark.parametrize("kind", KINDS)
def test_costs_of_groups_of_columns(kind: Curvature, cost: Cost, bias: bool, width: int) -> None:
    """The last column belongs to no group, and one group has no column."""
    case = make(kind, bias)
    if kind is Curvature.DIAGONAL:
        cost = Cost.OBD  # nothing adapts
    n_groups = 1 + (N_IN - 1) // width
    owner = 1 + torch.arange(N_IN) // width
    owner[-1] = -1
    owner[owner >= n_groups] = -1
    found = case.curvature.group_costs(case.weight, owner, n_groups, cost)
    assert float(found[0]) == 0.0
    if isinstance(case.curvature, KroneckerCurvature) and kind is not Curvature.IDENTITY:
        # One Kronecker product keeps gradients undamped: nothing of them is inverted.
        eye = torch.eye(N_OUT, dtype=torch.float64)
        gradients = case.curvature.gradients.matrix if case.curvature.has_gradients else eye
        case = replace(case, damped=torch.kron(gradients, case.curvature.activations.damped))
    for group in range(1, n_groups):
        gone = torch.zeros(case.weight.shape, dtype=torch.bool)
        gone[:, :N_IN] = owner == group
        assert float(found[group]) == pytest.approx(removal(case, gone, cost), rel=1e-6)
