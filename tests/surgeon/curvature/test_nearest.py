"""Nearest Kronecker products and sums against the singular value decomposition of the rearranged Fisher matrix."""

from itertools import pairwise

import pytest
import torch

from surgeon.curvature.nearest import Products, Subspace, nearest_terms, next_subspace, starting_subspace
from tests.surgeon.curvature.fisher import N_IN, N_OUT, Data, best_error, dense_kfac, dense_terms, rearranged

CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True}, id="bias"),
    pytest.param({"dead": True}, id="dead"),
    pytest.param({"bias": True, "dead": True, "draws": 3}, id="bias-dead-draws"),
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_converged_terms_are_the_dense_optimum(rank, options):
    data = Data(**options)
    fisher = data.fisher()
    terms = data.terms(rank, 60)
    error = float((dense_terms(terms) - fisher).norm())
    best = best_error(fisher, N_OUT, rank)
    assert error == pytest.approx(best, rel=1e-5)
    if rank == 1:
        assert best < 0.98 * float((dense_kfac(data.kfac(), data.linear.bias is not None) - fisher).norm())


@pytest.mark.parametrize("options", CASES)
def test_even_one_pass_is_no_worse_than_kfac_and_passes_only_help(options):
    data = Data(**options)
    fisher = data.fisher()
    errors = [float((dense_kfac(data.kfac(), data.linear.bias is not None) - fisher).norm())]
    errors += [float((dense_terms(data.terms(1, n)) - fisher).norm()) for n in (1, 2, 3, 4)]
    assert errors[1] < 0.99 * errors[0]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))


@pytest.mark.parametrize("bias", [False, True])
def test_error_falls_with_rank_down_to_nothing(bias):
    data = Data(bias=bias)
    fisher = data.fisher()
    n_terms = N_OUT * (N_OUT + 1) // 2
    errors = [float((dense_terms(data.terms(rank, 40)) - fisher).norm()) for rank in range(1, n_terms + 1)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < 1e-4 * float(fisher.norm()), "as many terms as the rearranged matrix has rows: exact"


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("rank", [1, 3])
def test_terms_are_symmetric_ordered_even_and_of_fixed_sign(rank, options):
    terms = Data(**options).terms(rank, 30)
    norms = [(float(g.norm()), float(a.norm())) for g, a in zip(terms.gradients, terms.activations, strict=True)]
    values = [g * a for g, a in norms]
    assert values == sorted(values, reverse=True)
    expected = torch.linalg.svdvals(rearranged(Data(**options).fisher(), N_OUT))[:rank]
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected, rtol=1e-4, atol=0)
    for g, a in norms:
        assert g == pytest.approx(a, rel=1e-5)
    for part in (terms.gradients, terms.activations):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, part.transpose(1, 2), rtol=0, atol=0)
    assert all(float(a.trace()) >= 0 for a in terms.activations)
    assert float(terms.gradients[0].trace()) > 0


@pytest.mark.parametrize("iterations", [1, 2, 10])
@pytest.mark.parametrize("options", CASES)
def test_one_product_is_positive_semi_definite(options, iterations):
    terms = Data(**options).terms(1, iterations)
    for part in (terms.gradients[0], terms.activations[0]):
        assert float(torch.linalg.eigvalsh(part.double())[0]) > -1e-6 * float(part.trace())


def test_dead_rows_and_columns_are_zero():
    terms = Data(dead=True).terms(2, 5)
    assert not terms.gradients[:, 1].any()
    assert not terms.gradients[:, :, 1].any()
    assert not terms.activations[:, 2].any()


def test_the_same_twice():
    first, second = Data(bias=True).terms(3, 4), Data(bias=True).terms(3, 4)
    assert torch.equal(first.gradients, second.gradients)
    assert torch.equal(first.activations, second.activations)


def inner_products(matrices):
    flat = matrices.flatten(1).double()
    return flat @ flat.T


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_subspaces_are_orthonormal_and_symmetric(rank):
    start = starting_subspace(Data(bias=True).kfac(), rank, has_bias=True)
    assert start.inputs.shape == (rank, N_IN + 1, N_IN + 1)
    assert start.outputs.shape == (rank, N_OUT, N_OUT)
    for part in (start.inputs, start.outputs):
        torch.testing.assert_close(inner_products(part), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
        assert torch.equal(part, part.transpose(1, 2))


def test_dependent_products_leave_zeros_not_noise():
    square = torch.diag(torch.arange(1.0, N_OUT + 1))
    outputs = torch.stack([square, 2 * square, torch.ones(N_OUT, N_OUT)])
    found = next_subspace(Products(outputs, torch.zeros(3, N_IN, N_IN)))
    kept = torch.diag(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(inner_products(found.outputs), kept, rtol=0, atol=1e-6)
    assert not found.inputs.any()
    terms = nearest_terms(Subspace(found.outputs, found.inputs), Products(0 * outputs, torch.zeros(3, N_IN, N_IN)))
    assert not terms.gradients.any()
    assert not terms.activations.any()
