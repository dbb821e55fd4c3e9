"""Scores of weights against the explicit Kronecker product and explicit sums, float64."""

import pytest
import torch

from surgeon.curvature.factors import LinearFactors
from surgeon.layers.costs import magnitude_score, removal_cost, taylor_score


def problem(bias, rank=None, seed=0):
    """A linear of 3 outputs and 4 inputs with factors of random samples; few samples leave them singular."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = rank or 50
    x, g = draw(n, 4) + 0.5, draw(n, 3)
    x[:, 2] = 0  # a dead input
    gradient = draw(3, 5 if bias else 4)
    factors = LinearFactors(x.T @ x / n, x.mean(dim=0), g.T @ g / n, loss_gradient=gradient)
    return draw(3, 4), draw(3) if bias else None, factors


def whole(weight, bias):
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_removal_cost_is_the_quadratic_model_at_zero(bias, rank):
    weight, b, factors = problem(bias, rank)
    inputs = factors.augmented_activations() if bias else factors.activations
    delta = -whole(weight, b).reshape(-1)  # rows one after the other, as kron(G, A) has them
    curved = 0.5 * delta @ torch.kron(factors.gradients, inputs) @ delta
    plain = LinearFactors(factors.activations, factors.mean_input, factors.gradients)
    assert removal_cost(weight, b, plain) == pytest.approx(float(curved), rel=1e-12)
    sloped = curved + factors.loss_gradient.reshape(-1) @ delta
    assert removal_cost(weight, b, factors) == pytest.approx(float(sloped), rel=1e-12)


def test_removal_cost_of_nothing_is_nothing():
    _, b, factors = problem(True)
    assert removal_cost(torch.zeros(3, 4), torch.zeros_like(b), factors) == 0.0


@pytest.mark.parametrize("bias", [True, False])
def test_taylor_and_magnitude_are_explicit_sums(bias):
    weight, b, factors = problem(bias)
    values, gradient = whole(weight, b).tolist(), factors.loss_gradient.tolist()
    taylor = sum(abs(w * g) for ws, gs in zip(values, gradient, strict=True) for w, g in zip(ws, gs, strict=True))
    assert taylor_score(weight, b, factors) == pytest.approx(taylor, rel=1e-12)
    assert magnitude_score(weight, b) == pytest.approx(sum(abs(w) for ws in values for w in ws), rel=1e-12)
