"""How the remaining weights of a linear make up for the rows and columns that go.

Minimise ``½ tr(Ĝ Δ Â Δᵀ)`` subject to ``Δ = -W`` on what goes. With kept sets K and removed sets Q of rows and
columns, ``P = Ĝ_KK⁻¹ Ĝ_KQ`` and ``S = Â_QK Â_KK⁻¹``, the exact joint optimum eliminates columns, then rows:

    W_:K ← W_:K + W_:Q S,      W_K: ← W_K: + P W_Q:.

The published update adds the two solutions computed from the original W independently, and so misses the cross term
``P W_QQ S``; it is kept as `UpdateRule.INDEPENDENT` for reproduction.

The steps of the exact update are orthogonal in the curvature's inner product, so the predicted rise of the loss is
``½ tr(Ĝ W_Q (Â/Â_KK) W_Qᵀ) + ½ tr((Ĝ/Ĝ_KK) W_Q Â W_Qᵀ)`` with Schur complements of size q: no dense product needed.

Reference: van der Ouderaa et al. 2024 (LLM Surgeon), section 3.2; the joint solution is ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import UpdateRule
from surgeon.errors import NonFiniteError, NumericalError
from surgeon.pruning.damped import Factorised, LiveCurvature
from surgeon.pruning.linear import PrunedLinear


@dataclass(frozen=True)
class UpdateResult:
    """A linear after the shot.

    Attributes:
        linear: new weight, bias and live sets; float32, removed entries exactly zero.
        predicted_cost: rise of the loss under the damped curvature, nats per token.
        relative_change: norm of the change of kept weights over the norm of the weights before.
    """

    linear: PrunedLinear
    predicted_cost: float
    relative_change: float


@dataclass(frozen=True)
class _Elimination:
    """Which live structures of one side go, and the solution that spreads them over those which stay.

    ``kept`` and ``removed`` are index vectors into the live structures; ``spread`` is ``M̂_KK⁻¹ M̂_KQ`` `[k, q]`;
    ``schur`` is ``M̂_QQ - M̂_QK M̂_KK⁻¹ M̂_KQ`` `[q, q]`.
    """

    kept: Tensor
    removed: Tensor
    spread: Tensor
    schur: Tensor


def update_linear(
    curvature: LiveCurvature, live_rows: Tensor, live_columns: Tensor, rule: UpdateRule, where: str
) -> UpdateResult:
    """Removes rows and columns and updates the rest.

    Args:
        curvature: the linear before the shot, with its damped factors over live structures.
        live_rows: `[n_out]` bool, what stays; a subset of what lived.
        live_columns: `[n_in]` bool, likewise.
        rule: exact joint update, the published independent one, or none.
        where: block and linear, for the error message.

    Raises:
        NumericalError: if the kept part of a factor is not positive definite (rounding, without damping).
        NonFiniteError: if an updated weight is not finite.
    """
    before = curvature.linear
    keep_rows = live_rows[before.live_rows]
    keep_columns = live_columns[before.live_columns]
    if before.bias is not None:
        keep_columns = torch.cat([keep_columns, torch.ones(1, dtype=torch.bool, device=keep_columns.device)])
    rows = _eliminate(curvature.gradients, keep_rows, f"{where}, gradients")
    columns = _eliminate(curvature.activations, keep_columns, f"{where}, activations")
    weight = curvature.weight
    if rule is UpdateRule.EXACT:
        updated, predicted = _exact(weight, rows, columns, curvature)
    else:
        updated = _independent(weight, rows, columns) if rule is UpdateRule.INDEPENDENT else weight.clone()
        updated[rows.removed] = 0
        updated[:, columns.removed] = 0
        delta = updated - weight
        spread = curvature.gradients.damped @ delta @ curvature.activations.damped
        predicted = 0.5 * float((spread * delta).sum())
    if not torch.isfinite(updated).all():
        raise NonFiniteError(f"{where}: the update gave weights that are not finite; raise prune.damping")
    kept = weight[rows.kept][:, columns.kept]
    change = updated[rows.kept][:, columns.kept] - kept
    relative = float(change.norm() / weight.norm()) if weight.numel() else 0.0
    return UpdateResult(_place(before, updated, live_rows, live_columns), predicted, relative)


def _eliminate(factor: Factorised, keep: Tensor, where: str) -> _Elimination:
    """Solves for the spread, the cheaper way.

    Few removed: from columns of the inverse, ``M̂_KK⁻¹ M̂_KQ = -[M̂⁻¹]_KQ ([M̂⁻¹]_QQ)⁻¹``, with the Cholesky factor that is
    there already. Many: from a factorisation of the kept part.
    """
    kept, removed = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    m = factor.damped
    n, k, q = keep.numel(), kept.numel(), removed.numel()
    if q == 0 or k == 0:
        return _Elimination(kept, removed, m.new_zeros(k, q), m[removed][:, removed])
    if 2 * n * n * q + k * q * q < k**3 / 3 + 2 * k * k * q:
        unit = m.new_zeros(n, q)
        unit[removed, torch.arange(q, device=m.device)] = 1.0
        inverse = torch.cholesky_solve(unit, factor.cholesky)
        block = _cholesky(inverse[removed], factor, where)
        schur = torch.cholesky_inverse(block)
        return _Elimination(kept, removed, -torch.cholesky_solve(inverse[kept].T, block).T, schur)
    cross = m[kept][:, removed]
    spread = torch.cholesky_solve(cross, _cholesky(m[kept][:, kept], factor, where))
    return _Elimination(kept, removed, spread, m[removed][:, removed] - cross.T @ spread)


def _cholesky(matrix: Tensor, factor: Factorised, where: str) -> Tensor:
    """Factorises a part of a damped factor (or of its inverse), which rounding can make indefinite."""
    cholesky, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise NumericalError(
            f"{where}: a {matrix.shape[0]}x{matrix.shape[0]} part of the factor is not positive definite with damping "
            f"{factor.damping:g}; raise prune.damping"
        )
    result: Tensor = cholesky
    return result


def _exact(weight: Tensor, rows: _Elimination, columns: _Elimination, curvature: LiveCurvature) -> tuple[Tensor, float]:
    updated = weight.clone()
    gone = weight[:, columns.removed]
    predicted = 0.5 * ((curvature.gradients.damped @ gone) * (gone @ columns.schur)).sum()
    updated[:, columns.kept] += gone @ columns.spread.T
    updated[:, columns.removed] = 0
    lost = updated[rows.removed]
    predicted += 0.5 * ((lost @ curvature.activations.damped) * (rows.schur @ lost)).sum()
    updated[rows.kept] += rows.spread @ lost
    updated[rows.removed] = 0
    return updated, float(predicted)


def _independent(weight: Tensor, rows: _Elimination, columns: _Elimination) -> Tensor:
    updated = weight.clone()
    updated[:, columns.kept] += weight[:, columns.removed] @ columns.spread.T
    updated[rows.kept] += rows.spread @ weight[rows.removed]
    return updated


def _place(before: PrunedLinear, updated: Tensor, live_rows: Tensor, live_columns: Tensor) -> PrunedLinear:
    """Puts the live part back into the full shape, float32, zeros elsewhere."""
    n_live_columns = int(before.live_columns.sum())
    weight = torch.zeros(before.weight.shape, dtype=torch.float32, device=updated.device)
    row_index = before.live_rows.nonzero()[:, 0]
    weight[row_index[:, None], before.live_columns.nonzero()[:, 0][None, :]] = updated[:, :n_live_columns].float()
    bias = None
    if before.bias is not None:
        bias = torch.zeros(before.bias.shape, dtype=torch.float32, device=updated.device)
        bias[row_index] = updated[:, n_live_columns].float()
    return PrunedLinear(weight, bias, live_rows, live_columns)
