"""The exact update for any set of weights that go, by preconditioned conjugate gradients.

Minimise ``½ <Δ, F̂ Δ>`` subject to ``Δ = -W`` on what goes. With ``D`` = -W there and 0 elsewhere, and X the change of
what stays, that is the linear system

    keep ∘ F̂ X = -keep ∘ F̂ D.

All weights are correlated, none are grouped into chunks; the curvature is only applied, never inverted, so any
approximation serves. A step s > 0 of the loss gradient g adds ``s <g, Δ>`` to the objective, and ``-s keep ∘ g`` to the
right-hand side: the removal then aims at the end of a damped natural-gradient step instead of at W.

For a Kronecker product an iteration is two matrix products, ``2 n_out n_in (n_out + n_in)`` flops, and a few passes
over matrices of the weight's shape, of which six to eight are held.

Reference: Hestenes & Stiefel 1952; the formulation is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.curvature.interface import LinearCurvature
from surgeon.errors import NumericalError

Preconditioner = Callable[[Tensor], Tensor]
"""Applies an approximate inverse to a residual `[n_out, n_in (+ 1)]`; may write to a buffer of its own."""


@dataclass(frozen=True)
class Convergence:
    """How an iteration ended.

    Attributes:
        iterations: number of them.
        residual: norm of the residual over that of the right-hand side.
        reached: whether the residual is at most the tolerance.
    """

    iterations: int
    residual: float
    reached: bool


@dataclass(frozen=True)
class Problem:
    """What has to be minimised.

    Attributes:
        curvature: ``F̂``.
        weight: ``W`` `[n_out, n_in (+ 1)]`; its dtype is that of the iteration.
        keep: which weights stay, the same shape, bool; a bias always stays.
        gradient: ``s g``, the same shape, or None.
        where: block and linear, for error messages.
    """

    curvature: LinearCurvature
    weight: Tensor
    keep: Tensor
    gradient: Tensor | None
    where: str


def jacobi(problem: Problem) -> Preconditioner:
    """One over the diagonal of the curvature; weights without curvature are left where they are."""
    diagonal = problem.curvature.damped_diagonal().to(problem.weight.dtype)
    inverse = diagonal.reciprocal().where(diagonal > 0, 0.0).contiguous()
    buffer = torch.empty_like(inverse)
    return lambda residual: torch.mul(residual, inverse, out=buffer)


def minimise(
    problem: Problem, precondition: Preconditioner, max_iterations: int, tolerance: float
) -> tuple[Tensor, float, Convergence]:
    """Solves for the change of all weights.

    Returns:
        Δ `[n_out, n_in (+ 1)]`, exactly -W on what goes; the objective; and how the iteration ended.

    Raises:
        NumericalError: if the curvature turns out not to be positive definite.
    """
    keep = problem.keep
    fixed = torch.where(keep, 0.0, -problem.weight)
    pull = problem.curvature.apply(fixed)
    objective = 0.5 * _dot(pull, fixed)
    if problem.gradient is not None:
        objective += _dot(problem.gradient, fixed)
        pull += problem.gradient
    residual = pull.neg_().mul_(keep)
    right = _norm(residual)
    change = fixed  # what goes is in it already; conjugate gradients change the rest
    if right == 0.0:
        return change, objective, Convergence(0, 0.0, True)
    preconditioned = precondition(residual)
    direction = preconditioned.clone()
    slope = _dot(residual, preconditioned)
    gained = 0.0
    for iteration in range(1, max_iterations + 1):
        image = problem.curvature.apply(direction).mul_(keep)
        bend = _dot(direction, image)
        if not bend > 0.0:
            raise NumericalError(
                f"{problem.where}: the curvature is not positive definite (a direction of curvature {bend:.3g} in "
                f"iteration {iteration} of conjugate gradients); raise prune.damping or choose another prune.curvature"
            )
        step = slope / bend
        change.add_(direction, alpha=step)
        residual.sub_(image, alpha=step)
        gained += 0.5 * step * slope
        relative = _norm(residual) / right
        if relative <= tolerance:
            break
        preconditioned = precondition(residual)
        before, slope = slope, _dot(residual, preconditioned)
        direction.mul_(slope / before).add_(preconditioned)
    return change, objective - gained, Convergence(iteration, relative, relative <= tolerance)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.reshape(-1), y.reshape(-1)))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
