"""How the remaining weights of a linear make up for single weights that go.

- `exact` solves for all of them together (`surgeon/pruning/conjugate.py`).
- `chunked` goes through the removed weights row by row in sets Q of a limited size, as published: with
  ``[F̂⁻¹]_QQ = Ĝ⁻¹_rr' ∘ Â⁻¹_cc'`` it solves ``[F̂⁻¹]_QQ μ = W_Q`` and subtracts ``Ĝ⁻¹ M Â⁻¹``, M being μ on Q. Each set
  starts from the weights the sets before it left, but those were solved without it: correlations between sets are lost.
- `none` sets them to zero.

Reference: van der Ouderaa et al. 2024 (LLM Surgeon), sections 3.2 and 3.3; the exact solution is ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import UpdateRule
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.errors import NumericalError
from surgeon.pruning.conjugate import Convergence, Problem, jacobi, minimise
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import LiveLinear
from surgeon.recipe import UpdateSpec


@dataclass(frozen=True)
class UpdateResult:
    """A linear after the shot.

    Attributes:
        linear: new weight, bias and live sets; float32, removed entries exactly zero.
        predicted_cost: rise of the loss under the damped curvature, nats per token.
        relative_change: norm of the change of kept weights over the norm of the weights before.
        convergence: of conjugate gradients; None where the rule does not iterate.
    """

    linear: PrunedLinear
    predicted_cost: float
    relative_change: float
    convergence: Convergence | None = None


def update_weights(live: LiveLinear, keep: Tensor, spec: UpdateSpec, where: str) -> UpdateResult:
    """Removes weights and updates the rest.

    Args:
        live: the linear before the shot, float32, with its damped curvature.
        keep: `[n_out, n_in]` bool, what stays; a subset of what lived.
        spec: exact, chunked or none.
        where: block and linear, for error messages.

    Raises:
        NumericalError: if the curvature is not positive definite.
        NonFiniteError: if an updated weight is not finite.
    """
    weight = live.weight
    stays = live.linear.with_bias(live.within(keep))
    convergence = None
    if spec.rule is UpdateRule.EXACT:
        problem = Problem(live.curvature, weight, stays, live.scaled_gradient(spec.newton_step), where)
        change, predicted, convergence = minimise(problem, jacobi(problem), spec.max_iterations, spec.tolerance)
        updated = weight + change
    else:
        updated = _chunked(live, stays, spec.max_correlate, where) if spec.rule is UpdateRule.CHUNKED else weight
        updated = updated.to(weight.dtype) * stays
        change = updated - weight
        predicted = live.curvature.energy(change)
    updated = torch.where(stays, updated, 0.0)
    return finished(live, keep, updated, predicted, convergence, where)


def finished(
    live: LiveLinear, keep: Tensor, updated: Tensor, predicted: float, convergence: Convergence | None, where: str
) -> UpdateResult:
    """Puts updated live weights ``[W b]`` back into the whole linear.

    Raises:
        NonFiniteError: if one is not finite.
    """
    before = live.linear
    linear = live.replaced(updated, before.live_rows, before.live_columns, keep & before.alive(), where)
    norm = float(live.weight.norm())
    stays = live.within(keep)
    n = live.n_live_columns
    change = ((updated - live.weight)[:, :n] * stays).norm() ** 2
    if live.has_bias:
        change = change + (updated - live.weight)[:, n:].norm() ** 2
    return UpdateResult(linear, predicted, float(change) ** 0.5 / norm if norm else 0.0, convergence)


def _chunked(live: LiveLinear, stays: Tensor, max_correlate: int, where: str) -> Tensor:
    curvature = live.curvature
    assert isinstance(curvature, KroneckerCurvature), f"{where}: chunks need a Kronecker product"
    weight = live.weight.double()
    inputs = torch.cholesky_inverse(curvature.activations.cholesky)
    outputs = torch.cholesky_inverse(curvature.gradients.cholesky) if curvature.has_gradients else None
    for chunk in torch.split((~stays).nonzero(), max_correlate):
        rows, columns = chunk[:, 0], chunk[:, 1]
        between = (rows[:, None] == rows[None, :]).double() if outputs is None else outputs[rows[:, None], rows]
        system = between * inputs[columns[:, None], columns]
        cholesky, info = torch.linalg.cholesky_ex(system)
        if int(info) != 0:
            raise NumericalError(
                f"{where}: the inverse curvature of {len(chunk)} removed weights is not positive definite; raise "
                "prune.damping"
            )
        multipliers = torch.cholesky_solve(weight[rows, columns][:, None], cholesky)[:, 0]
        used, position = torch.unique(rows, return_inverse=True)
        spread = torch.zeros(len(used), weight.shape[1], dtype=torch.float64, device=weight.device)
        spread[position, columns] = multipliers
        spread = spread @ inputs
        if outputs is None:
            weight[used] -= spread
        else:
            weight -= outputs[:, used] @ spread
    return weight
