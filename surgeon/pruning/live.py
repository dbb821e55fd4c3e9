"""A linear restricted to what lives, with its damped curvature: everything a cost or an update needs.

Over live rows and columns; with a bias, the weight is ``[W b]`` and ``A`` that of the input `[a, 1]`, whose last row
belongs to the bias, which is always live.

Dead structures are taken out before anything is inverted: rows of zero weight or zero gradient, columns of zero weight
or zero activation. Removing them is free.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import Curvature
from surgeon.curvature.diagonal import DiagonalCurvature
from surgeon.curvature.diagonalised import KroneckerSumCurvature, ekfac_curvature
from surgeon.curvature.factors import KroneckerTerms, LinearFactors
from surgeon.curvature.interface import LinearCurvature
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.errors import NonFiniteError
from surgeon.pruning.linear import PrunedLinear
from surgeon.recipe import Damping


@dataclass(frozen=True)
class LiveLinear:
    """The live part of a linear.

    Attributes:
        linear: the linear with dead structures taken out of its live sets and set to zero.
        weight: ``[W b]`` over live rows and columns (the bias last), `[n_live_out, n_live_in (+ 1)]`.
        curvature: damped, over the same.
        n_dead_rows: rows found dead now.
        n_dead_columns: columns found dead now.
        loss_gradient: of the mean loss per token, over the same; None where it is not known.
    """

    linear: PrunedLinear
    weight: Tensor
    curvature: LinearCurvature
    n_dead_rows: int
    n_dead_columns: int
    loss_gradient: Tensor | None = None

    @property
    def has_bias(self) -> bool:
        """Whether the last column is the bias."""
        return self.linear.bias is not None

    @property
    def n_live_columns(self) -> int:
        """Live columns, the bias not counted."""
        return self.weight.shape[1] - self.has_bias

    def within(self, matrix: Tensor) -> Tensor:
        """The part of a matrix `[n_out, n_in]` over live rows and columns, `[n_live_out, n_live_in]`."""
        return select(matrix, self.linear.live_rows, self.linear.live_columns)

    def placed(self, live: Tensor, fill: float | bool = 0) -> Tensor:
        """The full matrix `[n_out, n_in]` from one over live rows and columns (and a bias, which is left out)."""
        n_columns = self.n_live_columns
        full = torch.full(self.linear.weight.shape, fill, dtype=live.dtype, device=live.device)
        rows, columns = self.linear.live_rows, self.linear.live_columns
        if rows.all() and columns.all():
            return full.copy_(live[:, :n_columns])
        full[rows.nonzero()[:, 0][:, None], columns.nonzero()[:, 0][None, :]] = live[:, :n_columns]
        return full

    def scaled_gradient(self, step: float) -> Tensor | None:
        """``s g``, what a step of the correction adds to the objective; None without a step."""
        if not step:
            return None
        assert self.loss_gradient is not None, "a step needs the gradient of the loss"
        return step * self.loss_gradient

    def replaced(
        self, updated: Tensor, live_rows: Tensor, live_columns: Tensor, live_weights: Tensor | None, where: str
    ) -> PrunedLinear:
        """The whole linear with other live weights ``[W b]``; float32.

        Args:
            updated: over what lived before, `[n_live_out, n_live_in (+ 1)]`, zero where nothing lives any more.
            live_rows: what lives now, `[n_out]` bool.
            live_columns: `[n_in]` bool.
            live_weights: `[n_out, n_in]` bool, or None where all weights of live rows and columns live.
            where: block and linear, for the error message.

        Raises:
            NonFiniteError: if a weight is not finite.
        """
        if not torch.isfinite(updated).all():
            raise NonFiniteError(f"{where}: the update gave weights that are not finite; raise prune.damping")
        updated = updated.float()
        return PrunedLinear(self.placed(updated), self._placed_bias(updated), live_rows, live_columns, live_weights)

    def _placed_bias(self, live: Tensor) -> Tensor | None:
        """The bias `[n_out]` from the last column of a matrix over live rows and columns; None without a bias."""
        if self.linear.bias is None:
            return None
        full = torch.zeros(self.linear.bias.shape, dtype=live.dtype, device=live.device)
        full[self.linear.live_rows] = live[:, -1]
        return full


def select(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Part of a matrix: rows and columns given as `[n]` bool; the matrix itself, not a copy, where all are wanted."""
    if not rows.all():
        matrix = matrix[rows]
    return matrix if columns.all() else matrix[:, columns]


def without_dead(linear: PrunedLinear, factors: LinearFactors) -> PrunedLinear:
    """Takes rows and columns out of the live sets that do nothing, and sets them to zero.

    A row is dead if all its weights (and its bias) are zero or its gradient always is; a column if all its weights
    are zero or its input always is. Weights are looked at without those of structures dead for lack of curvature. NaN
    is not zero: a structure whose curvature is NaN lives, so that its factor fails to factorise. What the factors do
    not hold kills nothing.
    """
    live_rows, live_columns = linear.live_rows, linear.live_columns
    n_in = linear.weight.shape[1]
    if factors.gradients is not None:
        live_rows = live_rows & (factors.gradients.diagonal() != 0)
    if factors.activations is not None:
        live_columns = live_columns & (factors.activations.diagonal() != 0)
    if factors.terms is not None:
        live_rows = live_rows & (factors.terms.gradients[0].diagonal() != 0)
        live_columns = live_columns & (factors.terms.activations[0].diagonal()[:n_in] != 0)
    if factors.diagonal is not None:
        live_rows = live_rows & (factors.diagonal != 0).any(dim=1)
        live_columns = live_columns & (factors.diagonal[:, :n_in] != 0).any(dim=0)
    left = linear.restricted(live_rows, live_columns)
    live_rows = live_rows & (left.augmented(left.weight.dtype) != 0).any(dim=1)
    live_columns = live_columns & (left.weight != 0).any(dim=0)
    return left.restricted(live_rows, live_columns)


def live_linear(
    linear: PrunedLinear,
    factors: LinearFactors,
    curvature: Curvature,
    damping: Damping,
    where: str,
    dtype: torch.dtype = torch.float64,
) -> LiveLinear:
    """Restricts weight and factors to what lives, and damps.

    Args:
        linear: weight `[n_out, n_in]` and live sets.
        factors: what that kind of curvature is made of.
        curvature: which approximation.
        damping: relative damping of both factors.
        where: block and linear, for error messages.
        dtype: of the weight; what is factorised is in float64 whatever it is.
    """
    cleaned = without_dead(linear, factors)
    rows, columns = cleaned.live_rows, cleaned.live_columns
    with_bias = cleaned.with_bias(columns)
    weight = select(cleaned.augmented(dtype), rows, with_bias)
    shape = (weight.shape[0], weight.shape[1])
    gradient = factors.loss_gradient
    return LiveLinear(
        linear=cleaned,
        weight=weight,
        curvature=_curvature(cleaned, factors, curvature, damping, where, shape, (rows, with_bias)),
        n_dead_rows=int(linear.live_rows.sum() - rows.sum()),
        n_dead_columns=int(linear.live_columns.sum() - columns.sum()),
        loss_gradient=None if gradient is None else select(gradient, rows, with_bias).to(dtype),
    )


def _curvature(
    linear: PrunedLinear,
    factors: LinearFactors,
    kind: Curvature,
    damping: Damping,
    where: str,
    shape: tuple[int, int],
    live: tuple[Tensor, Tensor],
) -> LinearCurvature:
    rows, columns = live
    if kind is Curvature.IDENTITY:
        return KroneckerCurvature(None, None, shape, damping, where, linear.weight.device)
    if kind is Curvature.DIAGONAL:
        assert factors.diagonal is not None, f"{where}: no diagonal"
        return DiagonalCurvature(select(factors.diagonal, rows, columns))
    if kind in (Curvature.NEAREST_KRONECKER, Curvature.KRONECKER_SUM):
        assert factors.terms is not None, f"{where}: no Kronecker terms"
        terms = KroneckerTerms(
            torch.stack([select(g, rows, rows) for g in factors.terms.gradients]),
            torch.stack([select(a, columns, columns) for a in factors.terms.activations]),
        )
        if not rows.any():
            # Without gradients all terms are zero, and so is what they say of the bias, which is all that is left.
            terms.activations[0] = torch.eye(shape[1])
        if len(terms.gradients) == 1:
            return KroneckerCurvature(terms.gradients[0], terms.activations[0], shape, damping, where)
        return KroneckerSumCurvature(terms, damping, where)
    assert factors.activations is not None, f"{where}: no input factors"
    activations = factors.activations if linear.bias is None else factors.augmented_activations()
    activations = select(activations, columns, columns)
    if kind is Curvature.ACTIVATIONS:
        return KroneckerCurvature(None, activations, shape, damping, where)
    assert factors.gradients is not None, f"{where}: no output factors"
    gradients = select(factors.gradients, rows, rows)
    if kind is Curvature.KFAC:
        return KroneckerCurvature(gradients, activations, shape, damping, where)
    assert factors.moments is not None, f"{where}: no moments"
    if factors.moments.moments.shape != shape:
        raise ValueError(f"{where}: moments of shape {tuple(factors.moments.moments.shape)}, but {shape} is live")
    return ekfac_curvature(gradients, activations, factors.moments, damping)
