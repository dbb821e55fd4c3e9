"""How the remaining weights of a linear make up for the rows and columns that go.

Minimise ``½ tr(Ĝ Δ Â Δᵀ)`` subject to ``Δ = -W`` on what goes. With kept sets K and removed sets Q of rows and
columns, ``P = Ĝ_KK⁻¹ Ĝ_KQ`` and ``S = Â_QK Â_KK⁻¹``, the exact joint optimum eliminates columns, then rows:

    W_:K ← W_:K + W_:Q S,      W_K: ← W_K: + P W_Q:.

The published update adds the two solutions computed from the original W independently, and so misses the cross term
``P W_QQ S``; it is kept as `UpdateRule.INDEPENDENT` for reproduction.

The steps of the exact update are orthogonal in the curvature's inner product, so the predicted rise of the loss is
``½ tr(Ĝ W_Q (Â/Â_KK) W_Qᵀ) + ½ tr((Ĝ/Ĝ_KK) W_Q Â W_Qᵀ)`` with Schur complements of size q, whose roots are parts of
the Cholesky factors: no dense product needed.

Reference: van der Ouderaa et al. 2024 (LLM Surgeon), section 3.2; the joint solution is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import UpdateRule
from surgeon.curvature.damping import Factorised
from surgeon.curvature.diagonalised import DiagonalisedCurvature
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.curvature.triangular import solve_transposed
from surgeon.errors import NumericalError
from surgeon.pruning.conjugate import Convergence, Preconditioner, Problem, minimise
from surgeon.pruning.live import LiveLinear
from surgeon.pruning.weight_update import UpdateResult
from surgeon.recipe import UpdateSpec


@dataclass(frozen=True)
class _Elimination:
    """Which live structures of one side go, and the solution that spreads them over those which stay.

    ``kept`` and ``removed`` are index vectors into the live structures; ``spread`` is ``M̂_KK⁻¹ M̂_KQ`` `[k, q]`;
    ``root`` `[q, q]` and ``kept_root`` `[k, k]` are lower triangular: ``M̂_QQ - M̂_QK M̂_KK⁻¹ M̂_KQ = root rootᵀ`` and
    ``M̂_KK = kept_root kept_rootᵀ``, all of it parts of ``factorised``.
    """

    kept: Tensor
    removed: Tensor
    spread: Tensor
    root: Tensor
    kept_root: Tensor
    factorised: Factorised


def update_structures(
    live: LiveLinear, live_rows: Tensor, live_columns: Tensor, spec: UpdateSpec, where: str
) -> UpdateResult:
    """Removes rows and columns and updates the rest.

    Args:
        live: the linear before the shot, float64, with its damped curvature.
        live_rows: `[n_out]` bool, what stays; a subset of what lived.
        live_columns: `[n_in]` bool, likewise.
        spec: exact joint update, the published independent one, or none.
        where: block and linear, for the error message.

    Raises:
        NumericalError: if a factor is not positive definite although damping was raised.
        NonFiniteError: if an updated weight is not finite.
    """
    before = live.linear
    keep_rows = live_rows[before.live_rows]
    keep_columns = before.with_bias(live_columns[before.live_columns])
    weight = live.weight
    convergence = None
    if spec.rule is UpdateRule.NONE:
        updated = weight * (keep_rows[:, None] & keep_columns[None, :])
        predicted = live.curvature.energy(updated - weight)
    elif isinstance(live.curvature, KroneckerCurvature):
        updated, predicted = _by_elimination(live, live.curvature, keep_rows, keep_columns, spec)
    else:
        updated, predicted, convergence = _by_iteration(live, keep_rows, keep_columns, spec, where)
    linear = live.replaced(updated, live_rows, live_columns, None, where)
    change = (updated - weight)[keep_rows][:, keep_columns]
    relative = float(change.norm() / weight.norm()) if weight.numel() else 0.0
    return UpdateResult(linear, predicted, relative, convergence)


def _by_elimination(
    live: LiveLinear,
    curvature: KroneckerCurvature,
    keep_rows: Tensor,
    keep_columns: Tensor,
    spec: UpdateSpec,
) -> tuple[Tensor, float]:
    """The solution in closed form for one Kronecker product."""
    # Where no row goes the factor of gradients cancels, and need not be factorised.
    rows = None if keep_rows.all() else _eliminate(curvature.ordered_gradients, keep_rows)
    columns = _eliminate(curvature.ordered_activations, keep_columns)
    weight, offset = live.weight, 0.0
    if spec.newton_step and live.loss_gradient is not None:
        step = live.loss_gradient
        if curvature.has_gradients:
            step = (curvature.gradients if rows is None else rows.factorised).solve(step)
        if curvature.has_activations:
            step = columns.factorised.solve(step.T).T
        step = spec.newton_step * step
        weight, offset = weight - step, -curvature.energy(step)
    if spec.rule is UpdateRule.EXACT:
        updated, predicted = _exact(weight, rows, columns, curvature)
        return updated, predicted + offset
    updated = _independent(weight, rows, columns)
    updated[~keep_rows] = 0
    updated[:, columns.removed] = 0
    return updated, curvature.energy(updated - weight)


def _by_iteration(
    live: LiveLinear, keep_rows: Tensor, keep_columns: Tensor, spec: UpdateSpec, where: str
) -> tuple[Tensor, float, Convergence]:
    """Conjugate gradients, preconditioned with the closed form of a Kronecker product that is near."""
    keep = keep_rows[:, None] & keep_columns[None, :]
    problem = Problem(live.curvature, live.weight, keep, live.scaled_gradient(spec.newton_step), where)
    precondition = _kept_product(live.curvature, keep_rows, keep_columns, where)
    change, predicted, convergence = minimise(problem, precondition, spec.max_iterations, spec.tolerance)
    return (live.weight + change) * keep, predicted, convergence


def _kept_product(curvature: object, keep_rows: Tensor, keep_columns: Tensor, where: str) -> Preconditioner:
    """``(Ĝ_KK ⊗ Â_KK)⁻¹`` over kept rows and columns."""
    assert isinstance(curvature, DiagonalisedCurvature), f"{where}: no Kronecker product is near"
    rows, columns = keep_rows.nonzero()[:, 0], keep_columns.nonzero()[:, 0]
    sides = []
    for matrix, kept, damping in zip(curvature.nearby, (rows, columns), reversed(curvature.damping), strict=True):
        sides.append(_cholesky(matrix[kept][:, kept], damping, where))

    def solve(residual: Tensor) -> Tensor:
        inner = torch.cholesky_solve(residual[rows][:, columns], sides[0])
        result = torch.zeros_like(residual)
        result[rows[:, None], columns[None, :]] = torch.cholesky_solve(inner.T, sides[1]).T
        return result

    return solve


def _eliminate(factorised: Callable[[Tensor], Factorised], keep: Tensor) -> _Elimination:
    """Solves for the spread: one factorisation in which what stays comes first has everything in its parts.

    With ``M̂ = L Lᵀ``, ``M̂_KK = L_KK L_KKᵀ`` and ``M̂_KQ = L_KK L_QKᵀ``, so the spread is ``L_KK⁻ᵀ L_QKᵀ``; and
    ``L_QQ L_QQᵀ`` is the Schur complement.
    """
    kept, removed = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    whole = factorised(torch.cat([kept, removed]))
    lower, k = whole.cholesky, kept.numel()
    kept_root = lower[:k, :k]
    spread = solve_transposed(kept_root, lower[k:, :k].T.clone(memory_format=torch.contiguous_format))
    return _Elimination(kept, removed, spread, lower[k:, k:], kept_root, whole)


def _cholesky(matrix: Tensor, damping: float, where: str) -> Tensor:
    """Factorises a part of a damped factor (or of its inverse), which rounding can make indefinite."""
    cholesky, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise NumericalError(
            f"{where}: a {matrix.shape[0]}x{matrix.shape[0]} part of the factor is not positive definite with damping "
            f"{damping:g}; raise prune.damping"
        )
    result: Tensor = cholesky
    return result


def _exact(
    weight: Tensor, rows: _Elimination | None, columns: _Elimination, curvature: KroneckerCurvature
) -> tuple[Tensor, float]:
    updated = weight.clone()
    gone = weight[:, columns.removed]
    rooted = gone @ columns.root
    predicted = 0.5 * (curvature.damped_pulled(rooted) * rooted).sum()
    updated.index_add_(1, columns.kept, gone @ columns.spread.T)
    updated[:, columns.removed] = 0
    if rows is None:
        return updated, float(predicted)
    lost = updated[rows.removed]
    predicted += 0.5 * (rows.root.T @ lost[:, columns.kept] @ columns.kept_root).square().sum()
    updated.index_add_(0, rows.kept, rows.spread @ lost)
    updated[rows.removed] = 0
    return updated, float(predicted)


def _independent(weight: Tensor, rows: _Elimination | None, columns: _Elimination) -> Tensor:
    updated = weight.clone()
    updated.index_add_(1, columns.kept, weight[:, columns.removed] @ columns.spread.T)
    if rows is not None:
        updated.index_add_(0, rows.kept, rows.spread @ weight[rows.removed])
    return updated
