"""Curvatures that a pair of bases makes diagonal: EKFAC, and the sum of two Kronecker products.

    F̂ = (B_G ⊗ B_A) diag(Ŝ) (B_G ⊗ B_A)ᵀ,      F̂ X = B_G (Ŝ ∘ (B_Gᵀ X B_A)) B_Aᵀ

``B_G`` `[n_out, n_out]` and ``B_A`` `[n_in (+ 1), n_in (+ 1)]` are invertible, ``Ŝ`` `[n_out, n_in (+ 1)]` is positive.
With ``D = B⁻ᵀ``, ``F̂⁻¹ = (D_G ⊗ D_A) diag(1/Ŝ) (D_G ⊗ D_A)ᵀ``, and everything asked of a curvature is in closed form:

==========  ==================================================  ====================================================
structure   OBD                                                 OBS
==========  ==================================================  ====================================================
row r       ``½ Σ_l (W B_A)_rl² [(B_G∘B_G) S]_rl``              ``½ Σ_l (W B_A)_rl² / [(D_G∘D_G)(1/Ŝ)]_rl``
column c    ``½ Σ_k (B_Gᵀ W)_kc² [S (B_A∘B_A)ᵀ]_kc``            ``½ Σ_k (B_Gᵀ W)_kc² / [(1/Ŝ)(D_A∘D_A)ᵀ]_kc``
weight rc   ``½ W_rc² [(B_G∘B_G) S (B_A∘B_A)ᵀ]_rc``             ``½ W_rc² / [(D_G∘D_G)(1/Ŝ)(D_A∘D_A)ᵀ]_rc``
==========  ==================================================  ====================================================

EKFAC: the bases are the eigenvectors of ``G`` and ``A`` (so ``D = B``), ``S`` the second moments of the gradient in
them. It is damped as K-FAC is: ``Ŝ_ij = S_ij + (g_i + d_G)(a_j + d_A) - g_i a_j`` with the eigenvalues g, a of the
factors and their dampings d. So where K-FAC is right, both are the same.

Sum of products: ``Ĝ_1 = L Lᵀ`` and ``L⁻¹ G_2 L⁻ᵀ = Q diag(μ) Qᵀ`` give ``B_G = L Q``, which makes ``Ĝ_1`` the identity
and ``G_2`` diagonal; likewise for ``A``. Then ``Ŝ = 1 + μ_G μ_Aᵀ`` is exact for two products. Of further ones only the
diagonal in these bases is in ``Ŝ``: `apply` is exact, costs are an approximation, and `solve` is refused.

Reference: George et al. 2018, *Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis*, arXiv
1806.03884; Koroko et al. 2022, arXiv 2201.10285 (sums); the costs are ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import Cost
from surgeon.curvature.damping import ESCALATION, MAX_ESCALATIONS, Factorised, damped, factorise
from surgeon.curvature.factors import EigenMoments, KroneckerTerms
from surgeon.curvature.groups import members_of, plain_costs, summed_costs, with_bias
from surgeon.curvature.interface import LinearCurvature
from surgeon.errors import NumericalError
from surgeon.recipe import Damping

_BATCH_ENTRIES = 1 << 22
"""Numbers in the largest batch of matrices that is formed at once."""
_FLOOR = 1e-6
"""Least value of Ŝ of a sum of products, where 1 is that of its first, before damping is raised."""


@dataclass(frozen=True)
class _Basis:
    """``B`` and ``D = B⁻ᵀ`` of one side, `[n, n]` float64."""

    primal: Tensor
    dual: Tensor


class DiagonalisedCurvature(LinearCurvature):
    """``(B_G ⊗ B_A) diag(Ŝ) (B_G ⊗ B_A)ᵀ``.

    Args:
        rows: basis of the outputs.
        columns: basis of the inputs.
        spectrum: ``S`` `[n_out, n_in (+ 1)]` float64, without damping.
        damped_spectrum: ``Ŝ``, positive.
        nearby: ``Ĝ`` and ``Â`` of a Kronecker product that is near, float64, to precondition with.
        damping: relative damping in force, of inputs and outputs.
        escalations: how often it had to be raised.
    """

    def __init__(
        self,
        rows: _Basis,
        columns: _Basis,
        spectrum: Tensor,
        damped_spectrum: Tensor,
        nearby: tuple[Tensor, Tensor],
        damping: tuple[float, float],
        escalations: int = 0,
    ) -> None:
        self.shape = (spectrum.shape[0], spectrum.shape[1])
        self._rows = rows
        self._columns = columns
        self._spectrum = spectrum
        self._damped_spectrum = damped_spectrum
        self.nearby = nearby
        self._damping = damping
        self._escalations = escalations
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}

    def apply(self, x: Tensor) -> Tensor:
        """``B_G (Ŝ ∘ (B_Gᵀ X B_A)) B_Aᵀ``."""
        rows, columns, spectrum = self._as(x.dtype)
        inner = (rows.T @ x @ columns).mul_(spectrum)
        return rows @ inner @ columns.T

    def solve(self, x: Tensor) -> Tensor:
        """``D_G ((D_Gᵀ X D_A) / Ŝ) D_Aᵀ``."""
        rows, columns = self._rows.dual, self._columns.dual
        return rows @ ((rows.T @ x.double() @ columns) / self._damped_spectrum) @ columns.T

    def damped_diagonal(self) -> Tensor:
        """``(B_G∘B_G) Ŝ (B_A∘B_A)ᵀ``."""
        return self._rows.primal.square() @ self._damped_spectrum @ self._columns.primal.square().T

    def row_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """See the table of the module."""
        rotated = (weight.double() @ self._columns.primal).square()
        if cost is Cost.OBD:
            return 0.5 * (rotated * (self._rows.primal.square() @ self._spectrum)).sum(dim=1)
        return 0.5 * (rotated / (self._rows.dual.square() @ self._damped_spectrum.reciprocal())).sum(dim=1)

    def column_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """See the table of the module."""
        rotated = (self._rows.primal.T @ weight.double()).square()
        if cost is Cost.OBD:
            return 0.5 * (rotated * (self._spectrum @ self._columns.primal.square().T)).sum(dim=0)
        return 0.5 * (rotated / (self._damped_spectrum.reciprocal() @ self._columns.dual.square().T)).sum(dim=0)

    def group_costs(self, weight: Tensor, owner: Tensor, n_groups: int, cost: Cost) -> Tensor:
        """Of columns Q together: rows of ``B_Gᵀ W`` are independent of each other, each with a curvature of its own.

        OBD: ``½ Σ_k w_kᵀ [B_A diag(S_k) B_Aᵀ]_QQ w_k``; OBS: ``½ Σ_k w_kᵀ ([D_A diag(1/Ŝ_k) D_Aᵀ]_QQ)⁻¹ w_k``.
        """
        members = members_of(owner, n_groups)
        if all(q.numel() <= 1 for q in members):
            return summed_costs(self.column_costs(weight, cost), owner, n_groups)
        rotated = self._rows.primal.T @ weight.double()
        costs = rotated.new_zeros(n_groups)
        for group, q in enumerate(members):
            if cost is Cost.OBD:
                along = rotated[:, q] @ self._columns.primal[q]
                costs[group] = 0.5 * (along.square() * self._spectrum).sum()
            elif q.numel():
                basis = self._columns.dual[q]
                at_a_time = max(1, _BATCH_ENTRIES // basis.numel())
                parts = (torch.split(m, at_a_time) for m in (rotated[:, q], self._damped_spectrum))
                for rows, spectra in zip(*parts, strict=True):
                    inverses = (basis / spectra[:, None, :]) @ basis.T
                    solved = torch.cholesky_solve(rows[:, :, None], torch.linalg.cholesky(inverses))
                    costs[group] += 0.5 * (rows * solved[:, :, 0]).sum()
        return costs

    def weight_scales(self, cost: Cost) -> Tensor:
        """See the table of the module."""
        if cost is Cost.OBD:
            return 0.5 * (self._rows.primal.square() @ self._spectrum @ self._columns.primal.square().T)
        inverse = self._rows.dual.square() @ self._damped_spectrum.reciprocal() @ self._columns.dual.square().T
        return 0.5 / inverse

    @property
    def damping(self) -> tuple[float, float]:
        """Relative damping in force, of inputs and outputs."""
        return self._damping

    @property
    def escalations(self) -> int:
        """How often damping had to be raised."""
        return self._escalations

    def _as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if dtype not in self._cast:
            parts = (self._rows.primal, self._columns.primal, self._damped_spectrum)
            self._cast[dtype] = (parts[0].to(dtype), parts[1].to(dtype), parts[2].to(dtype))
        return self._cast[dtype]


def ekfac_curvature(
    gradients: Tensor, activations: Tensor, moments: EigenMoments, damping: Damping
) -> DiagonalisedCurvature:
    """EKFAC from the factors, which say how much to damp, and the moments in their eigenbases.

    Args:
        gradients: ``G`` over live rows, `[n_out, n_out]`.
        activations: ``A`` over live columns and the bias, `[n_in (+ 1), n_in (+ 1)]`.
        moments: bases and second moments over the same.
        damping: relative, of both factors.
    """
    rows, columns = moments.basis_out.double(), moments.basis_in.double()
    gamma, d_rows = _eigenvalues(gradients.double(), rows, damping.gradients)
    alpha, d_columns = _eigenvalues(activations.double(), columns, damping.activations)
    spectrum = moments.moments.double()
    nearby = (damped(gradients.double(), damping.gradients), damped(activations.double(), damping.activations))
    extra = d_rows * alpha[None, :] + gamma[:, None] * d_columns + d_rows * d_columns
    asked = (damping.activations, damping.gradients)
    return DiagonalisedCurvature(
        _Basis(rows, rows), _Basis(columns, columns), spectrum, spectrum + extra, nearby, asked
    )


def _eigenvalues(matrix: Tensor, basis: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues that belong to eigenvectors, `[n]`, and the absolute damping."""
    values = ((matrix @ basis) * basis).sum(dim=0).clamp_(min=0.0)
    mean = matrix.diagonal().mean() if len(matrix) else matrix.new_zeros(())
    return values, damping * mean


class KroneckerSumCurvature(DiagonalisedCurvature):
    """``Ĝ_1 ⊗ Â_1 + Σ_k G_k ⊗ A_k``: diagonalised by its first two products.

    Attributes:
        first_rows: ``Ĝ_1``, factorised.
        first_columns: ``Â_1``, factorised.
    """

    def __init__(self, terms: KroneckerTerms, damping: Damping, where: str) -> None:
        rows, columns = terms.gradients.double(), terms.activations.double()
        asked = damping
        escalations = 0
        while True:
            self.first_rows = factorise(rows[0], damping.gradients, f"{where}, outputs")
            self.first_columns = factorise(columns[0], damping.activations, f"{where}, inputs")
            row_basis, row_values = _simultaneous(self.first_rows, rows[1:])
            column_basis, column_values = _simultaneous(self.first_columns, columns[1:])
            extra = torch.einsum("kr,kc->rc", row_values, column_values)
            lowest = float(1.0 + extra.min()) if extra.numel() else 1.0
            if lowest > _FLOOR:
                break
            if escalations == MAX_ESCALATIONS:
                raise NumericalError(
                    f"{where}: the sum of {len(rows)} Kronecker products is not positive definite (least eigenvalue "
                    f"{lowest:.3g}, relative to the first product) even after damping was raised {MAX_ESCALATIONS} "
                    f"times from {asked.activations:g} (inputs) and {asked.gradients:g} (outputs). Use a larger "
                    "prune.damping, a smaller prune.rank, or another curvature."
                )
            escalations += 1
            damping = Damping(max(damping.activations, 1e-6) * ESCALATION, max(damping.gradients, 1e-6) * ESCALATION)
        self._terms = [(rows[0], columns[0]), *zip(rows[1:], columns[1:], strict=True)]
        used = (self.first_columns.damping, self.first_rows.damping)
        nearby = (self.first_rows.damped, self.first_columns.damped)
        super().__init__(row_basis, column_basis, 1.0 + extra, 1.0 + extra, nearby, used, escalations)
        self._products: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}

    def apply(self, x: Tensor) -> Tensor:
        """``Ĝ_1 X Â_1 + Σ_k G_k X A_k``."""
        if x.dtype not in self._products:
            first = (self.first_rows.damped, self.first_columns.damped)
            self._products[x.dtype] = [(g.to(x.dtype), a.to(x.dtype)) for g, a in (first, *self._terms[1:])]
        (rows, columns), *others = self._products[x.dtype]
        result = rows @ x @ columns
        for rows, columns in others:
            result.addmm_(rows @ x, columns)
        return result

    def solve(self, x: Tensor) -> Tensor:
        """In closed form for two products."""
        if len(self._terms) > 2:
            raise NotImplementedError("a sum of more than two Kronecker products has no closed inverse")
        return super().solve(x)

    def damped_diagonal(self) -> Tensor:
        """``diag(Ĝ_1) diag(Â_1)ᵀ + Σ_k diag(G_k) diag(A_k)ᵀ``."""
        first = self.first_rows.damped.diagonal()[:, None] * self.first_columns.damped.diagonal()[None, :]
        return first + self._diagonal(self._terms[1:])

    def row_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """OBD: ``½ Σ_k [G_k]_rr w_rᵀ A_k w_r`` without damping."""
        if cost is Cost.OBS:
            return super().row_costs(weight, cost)
        weight = weight.double()
        return sum(
            (0.5 * g.diagonal() * ((weight @ a) * weight).sum(dim=1) for g, a in self._terms),
            start=weight.new_zeros(self.shape[0]),
        )

    def column_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """OBD: ``½ Σ_k [A_k]_cc w_cᵀ G_k w_c`` without damping."""
        if cost is Cost.OBS:
            return super().column_costs(weight, cost)
        weight = weight.double()
        return sum(
            (0.5 * a.diagonal() * ((g @ weight) * weight).sum(dim=0) for g, a in self._terms),
            start=weight.new_zeros(self.shape[1]),
        )

    def group_costs(self, weight: Tensor, owner: Tensor, n_groups: int, cost: Cost) -> Tensor:
        """OBD: ``½ Σ_k tr([A_k]_QQ W_Qᵀ G_k W_Q)`` without damping."""
        if cost is Cost.OBS:
            return super().group_costs(weight, owner, n_groups, cost)
        weight = weight.double()
        owner = with_bias(owner, self.shape[1])
        return sum(
            (plain_costs(weight, g @ weight, a, owner, n_groups) for g, a in self._terms),
            start=weight.new_zeros(n_groups),
        )

    def weight_scales(self, cost: Cost) -> Tensor:
        """OBD: half the diagonal without damping, where it is positive."""
        if cost is Cost.OBS:
            return super().weight_scales(cost)
        return 0.5 * self._diagonal(self._terms).clamp_(min=0.0)

    def _diagonal(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        result = torch.zeros(self.shape, dtype=torch.float64, device=self._spectrum.device)
        for rows, columns in terms:
            result.addr_(rows.diagonal(), columns.diagonal())
        return result


def _simultaneous(first: Factorised, others: Tensor) -> tuple[_Basis, Tensor]:
    """A basis that makes the first matrix the identity and the second diagonal; the others' diagonals in it.

    Args:
        first: `[n, n]`, factorised.
        others: `[k, n, n]` float64, symmetric.

    Returns:
        The basis, and the diagonals `[k, n]`.
    """
    lower = first.cholesky
    unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    whitener = torch.linalg.solve_triangular(lower, unit, upper=False)
    whitened = whitener @ others @ whitener.T
    if not len(others) or not len(lower):
        return _Basis(lower, whitener.T), others.new_zeros(len(others), len(lower))
    rotation = torch.linalg.eigh(whitened[0]).eigenvectors
    diagonals = torch.einsum("ni,knm,mi->ki", rotation, whitened, rotation)
    return _Basis(lower @ rotation, whitener.T @ rotation), diagonals
