"""Costs and updates against a loss: on problems whose Fisher information is exactly one Kronecker product.

A linear with squared loss ``½ rᵀ Λ r``, ``r = W [a, 1] - y``, over all pairs of an input and a residual from
``±√n_out Λ^-½ e_k``: gradients ``Λ r`` are independent of the inputs, their mean is zero and their second moment Λ.
The loss is then its quadratic model, with ``F = Λ ⊗ A``, without any remainder.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from surgeon.choices import Cost, UpdateRule
from surgeon.curvature.factors import LinearFactors
from surgeon.pruning.costs import structure_costs
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.structure_update import update_structures
from surgeon.recipe import Damping, UpdateSpec
from tests.surgeon.pruning.dense import WHERE, factors_from, kfac_linear, random

N_OUT, N_IN, N_INPUTS = 4, 5, 11
UNDAMPED = Damping(0.0, 0.0)
BIASES = pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])


@dataclasses.dataclass(frozen=True)
class Regression:
    """Tokens of a regression and the linear at its optimum.

    Attributes:
        inputs: `[n_tokens, n_in]`; targets: `[n_tokens, n_out]`.
        root: ``Λ^½`` `[n_out, n_out]`.
        linear: weights of least loss.
    """

    inputs: Tensor
    targets: Tensor
    root: Tensor
    linear: PrunedLinear

    def augmented_inputs(self) -> Tensor:
        if self.linear.bias is None:
            return self.inputs
        return torch.cat([self.inputs, torch.ones(len(self.inputs), 1, dtype=torch.float64)], dim=1)

    def loss(self, linear: PrunedLinear) -> float:
        """Mean over tokens, nats."""
        outputs = self.augmented_inputs() @ linear.augmented(torch.float64).T
        return 0.5 * float(((outputs - self.targets) @ self.root).square().sum() / len(self.inputs))

    def factors(self) -> LinearFactors:
        """From the gradients that autograd finds for the sum of the token losses."""
        outputs = (self.augmented_inputs() @ self.linear.augmented(torch.float64).T).requires_grad_()
        total = 0.5 * ((outputs - self.targets) @ self.root).square().sum()
        return factors_from(self.inputs, torch.autograd.grad(total, outputs)[0])

    def least_loss(self, live_rows: Tensor, live_columns: Tensor) -> float:
        """Least loss with some rows and columns at zero, by least squares on the tokens."""
        x = self.augmented_inputs()
        free = live_rows[:, None] & live_columns
        if self.linear.bias is not None:
            free = torch.cat([free, live_rows[:, None]], dim=1)
        design = torch.kron(x, self.root)[:, free.T.flatten()]
        wanted = (self.targets @ self.root).flatten()
        left = wanted - design @ torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution[:, 0]
        return 0.5 * float(left.square().sum() / len(x))


def make_regression(bias: bool, seed: int = 0) -> Regression:
    generator = torch.Generator().manual_seed(seed)
    root = random(generator, N_OUT, N_OUT)
    root = root @ root.T / N_OUT + 0.3 * torch.eye(N_OUT, dtype=torch.float64)
    residuals = N_OUT**0.5 * torch.linalg.inv(root)
    residuals = torch.cat([residuals, -residuals])
    some = random(generator, N_INPUTS, N_IN) @ random(generator, N_IN, N_IN) + random(generator, N_IN)
    weight = random(generator, N_OUT, N_IN).float()
    offsets = random(generator, N_OUT).float() if bias else None
    linear = PrunedLinear.dense(weight, offsets)
    inputs = some.repeat_interleave(len(residuals), dim=0)
    outputs = inputs @ weight.double().T
    if offsets is not None:
        outputs = outputs + offsets.double()
    return Regression(inputs, outputs - residuals.repeat(N_INPUTS, 1), root, linear)


def masks(gone_rows: list[int], gone_columns: list[int]) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([r not in gone_rows for r in range(N_OUT)])
    return rows, torch.tensor([c not in gone_columns for c in range(N_IN)])


@BIASES
def test_the_problem_is_what_it_claims_to_be(bias: bool) -> None:
    regression = make_regression(bias)
    everything = masks([], [])
    assert regression.least_loss(*everything) == pytest.approx(regression.loss(regression.linear), rel=1e-12)
    torch.testing.assert_close(regression.factors().gradients, regression.root @ regression.root)


@BIASES
def test_quadratic_model_is_the_rise_of_the_loss(bias: bool) -> None:
    regression = make_regression(bias)
    factors = regression.factors()
    activations = factors.augmented_activations() if bias else factors.activations
    delta = random(torch.Generator().manual_seed(1), N_OUT, N_IN + bias)
    w = regression.linear.augmented(torch.float64) + delta
    moved = PrunedLinear.dense(w[:, :N_IN], w[:, N_IN] if bias else None)
    predicted = 0.5 * float(delta.flatten() @ torch.kron(factors.gradients, activations) @ delta.flatten())
    rise = regression.loss(moved) - regression.loss(regression.linear)
    assert rise == pytest.approx(predicted, rel=1e-10)


@BIASES
def test_obd_cost_is_the_rise_when_one_structure_goes(bias: bool) -> None:
    regression = make_regression(bias)
    live = kfac_linear(regression.linear, regression.factors(), UNDAMPED)
    costs = structure_costs(live, Cost.OBD, WHERE)
    before = regression.loss(regression.linear)
    for row in range(N_OUT):
        rise = regression.loss(regression.linear.restricted(*masks([row], []))) - before
        assert float(costs.rows[row]) == pytest.approx(rise, rel=1e-10)
    for column in range(N_IN):
        rise = regression.loss(regression.linear.restricted(*masks([], [column]))) - before
        assert float(costs.columns[column]) == pytest.approx(rise, rel=1e-10)


@BIASES
def test_obs_cost_is_the_least_rise_when_one_structure_goes(bias: bool) -> None:
    regression = make_regression(bias)
    live = kfac_linear(regression.linear, regression.factors(), UNDAMPED)
    costs = structure_costs(live, Cost.OBS, WHERE)
    before = regression.loss(regression.linear)
    for row in range(N_OUT):
        rise = regression.least_loss(*masks([row], [])) - before
        assert float(costs.rows[row]) == pytest.approx(rise, rel=1e-9)
    for column in range(N_IN):
        rise = regression.least_loss(*masks([], [column])) - before
        assert float(costs.columns[column]) == pytest.approx(rise, rel=1e-9)


@pytest.mark.parametrize("rule", UpdateRule)
@BIASES
def test_predicted_cost_is_the_rise_of_the_loss(bias: bool, rule: UpdateRule) -> None:
    regression = make_regression(bias)
    live = kfac_linear(regression.linear, regression.factors(), UNDAMPED)
    rows, columns = masks([1], [0, 3])
    result = update_structures(live, rows, columns, UpdateSpec(rule), WHERE)
    before = regression.loss(regression.linear)
    rise = regression.loss(result.linear) - before
    assert result.predicted_cost == pytest.approx(rise, rel=1e-6)
    least = regression.least_loss(rows, columns) - before
    if rule is UpdateRule.EXACT:
        assert result.predicted_cost == pytest.approx(least, rel=1e-9)
    else:
        assert result.predicted_cost > 1.01 * least
