"""One Kronecker product: ``F = G ⊗ A``, so that ``F X = G X A``.

K-FAC and the nearest Kronecker product have both factors, `activations` has ``G = I``, `identity` has neither. A factor
is damped and factorised when something is first asked that needs it; applying needs no factorisation.

=========  =======================  ================================
structure  OBD (others fixed)       OBS (others re-optimised)
=========  =======================  ================================
row r      ``½ G_rr  w_rᵀ A w_r``   ``½ w_rᵀ A w_r / [Ĝ⁻¹]_rr``
column c   ``½ A_cc  w_cᵀ G w_c``   ``½ w_cᵀ G w_c / [Â⁻¹]_cc``
weight rc  ``½ W_rc² G_rr A_cc``    ``½ W_rc² / ([Ĝ⁻¹]_rr [Â⁻¹]_cc)``
=========  =======================  ================================

Reference: Martens & Grosse 2015 (K-FAC); LeCun et al. 1989 (OBD); Hassibi & Stork 1992 (OBS); van der Ouderaa et al.
2024 (LLM Surgeon), section 3.2.
"""

from dataclasses import replace

import torch
from torch import Tensor

from surgeon.choices import Cost
from surgeon.curvature.damping import Factorised, damped, factorise
from surgeon.curvature.groups import joint_costs, plain_costs, with_bias
from surgeon.curvature.interface import LinearCurvature
from surgeon.recipe import Damping


class _Side:
    """One factor of the product, or the identity, with what has been derived from it so far.

    Args:
        matrix: `[n, n]` any float dtype, or None for the identity.
        n: its size.
        damping: relative.
        where: block, linear and side, for error messages.
        device: of the weight.
    """

    def __init__(self, matrix: Tensor | None, n: int, damping: float, where: str, device: torch.device) -> None:
        self.matrix = matrix
        self.device = device
        self.n = n
        self._asked = damping
        self._where = where
        self._damped: dict[torch.dtype, Tensor] = {}
        self._factorised: Factorised | None = None
        self._in_force = (damping, 0)

    @property
    def factorised(self) -> Factorised:
        """Damped and factorised in float64, and kept."""
        if self._factorised is None:
            self._factorised = self.factorise()
        return self._factorised

    def inverse(self) -> Tensor:
        """``M̂⁻¹`` `[n, n]` float64, a new matrix: the only one of its size that is held."""
        return self._to_use_up().inverted()

    def _to_use_up(self) -> Factorised:
        """A factorisation that nothing else needs."""
        kept = self._factorised
        return self.factorise() if kept is None else replace(kept, cholesky=kept.cholesky.clone())

    def factorise(self, order: Tensor | None = None) -> Factorised:
        """The same with rows and columns in some order, `[n]` int64, and not kept."""
        matrix = torch.eye(self.n, device=self.device) if self.matrix is None else self.matrix
        result = factorise(matrix, self._asked, self._where, order)
        self._in_force = (result.damping, result.escalations)
        self._damped.clear()  # the damping may have been raised
        return result

    @property
    def damping(self) -> float:
        """Relative damping in force."""
        return self._in_force[0]

    @property
    def escalations(self) -> int:
        """How often it had to be raised."""
        return self._in_force[1]

    def damped(self, dtype: torch.dtype) -> Tensor:
        """With damping, in some dtype."""
        assert self.matrix is not None, "the identity is not multiplied with"
        if dtype not in self._damped:
            self._damped[dtype] = damped(self.matrix, self.damping).to(dtype)
        return self._damped[dtype]

    def diagonal(self) -> Tensor:
        """Diagonal without damping, `[n]` float64; of ones for the identity."""
        if self.matrix is None:
            return torch.ones(self.n, dtype=torch.float64, device=self.device)
        return self.matrix.diagonal().double()

    def damped_diagonal(self) -> Tensor:
        """Diagonal with damping, `[n]` float64."""
        diagonal = self.diagonal()
        return diagonal if self.matrix is None or not self.n else diagonal + self.damping * diagonal.mean()

    def scales(self, cost: Cost) -> Tensor:
        """For OBD the diagonal; for OBS one over that of the inverse of the damped factor, `[n]` float64."""
        if cost is Cost.OBD or self.matrix is None:
            return self.diagonal()
        return 1.0 / self._to_use_up().inverted_diagonal()


class KroneckerCurvature(LinearCurvature):
    """``Ĝ ⊗ Â`` with either factor possibly the identity, which is not damped.

    Args:
        gradients: ``G`` `[n_out, n_out]`, or None for the identity.
        activations: ``A`` `[n_in (+ 1), n_in (+ 1)]`, or None for the identity.
        shape: of the live weight, with the bias.
        damping: relative, of both factors.
        where: block and linear, for error messages.
        device: of the weight; counts where both are the identity.
    """

    def __init__(
        self,
        gradients: Tensor | None,
        activations: Tensor | None,
        shape: tuple[int, int],
        damping: Damping,
        where: str,
        device: torch.device | None = None,
    ) -> None:
        self.shape = shape
        self._where = where
        known = next((factor.device for factor in (gradients, activations) if factor is not None), None)
        on = device or known or torch.device("cpu")
        self._rows = _Side(gradients, shape[0], damping.gradients, f"{where}, outputs", on)
        self._columns = _Side(activations, shape[1], damping.activations, f"{where}, inputs", on)

    @property
    def has_gradients(self) -> bool:
        """Whether ``G`` is not the identity."""
        return self._rows.matrix is not None

    @property
    def has_activations(self) -> bool:
        """Whether ``A`` is not the identity."""
        return self._columns.matrix is not None

    @property
    def gradients(self) -> Factorised:
        """``Ĝ``, factorised."""
        return self._rows.factorised

    @property
    def activations(self) -> Factorised:
        """``Â``, factorised."""
        return self._columns.factorised

    def apply(self, x: Tensor) -> Tensor:
        """``Ĝ X Â``."""
        if self._rows.matrix is not None:
            x = self._rows.damped(x.dtype) @ x
        if self._columns.matrix is not None:
            x = x @ self._columns.damped(x.dtype)
        return x

    def solve(self, x: Tensor) -> Tensor:
        """``Ĝ⁻¹ X Â⁻¹``."""
        x = x.double()
        if self._rows.matrix is not None:
            x = self.gradients.solve(x)
        if self._columns.matrix is not None:
            x = self.activations.solve(x.T).T
        return x

    def damped_diagonal(self) -> Tensor:
        """``diag(Ĝ) diag(Â)ᵀ``."""
        return self._rows.damped_diagonal()[:, None] * self._columns.damped_diagonal()[None, :]

    def row_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """See the table of the module."""
        weight = weight.double()
        matrix = self._columns.matrix
        energy = ((weight if matrix is None else weight @ matrix.double()) * weight).sum(dim=1)
        return 0.5 * energy * self._rows.scales(cost)

    def column_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """See the table of the module."""
        weight = weight.double()
        matrix = self._rows.matrix
        energy = ((weight if matrix is None else matrix.double() @ weight) * weight).sum(dim=0)
        return 0.5 * energy * self._columns.scales(cost)

    def group_costs(self, weight: Tensor, owner: Tensor, n_groups: int, cost: Cost) -> Tensor:
        """See the table of the module; for columns Q together ``½ tr(A_QQ W_Qᵀ G W_Q)``, for OBS ``([Â⁻¹]_QQ)⁻¹``."""
        weight = weight.double()
        pulled = self.pulled(weight)
        owner = with_bias(owner, weight.shape[1])
        if cost is Cost.OBS:
            return joint_costs(weight, pulled, self.inverse_activations(), owner, n_groups, self._where)
        matrix = self._columns.matrix
        return plain_costs(weight, pulled, None if matrix is None else matrix.double(), owner, n_groups)

    def pulled(self, weight: Tensor) -> Tensor:
        """``G W`` without damping, float64; ``W`` itself where ``G`` is the identity."""
        matrix = self._rows.matrix
        return weight.double() if matrix is None else matrix.double() @ weight.double()

    def damped_pulled(self, weight: Tensor) -> Tensor:
        """``Ĝ W``, in the dtype of the weight; ``W`` where ``G`` is the identity."""
        return weight if self._rows.matrix is None else self._rows.damped(weight.dtype) @ weight

    def inverse_activations(self) -> Tensor:
        """``Â⁻¹``, `[n_in (+ 1), n_in (+ 1)]` float64."""
        if self._columns.matrix is None:
            return torch.eye(self.shape[1], dtype=torch.float64, device=self._columns.device)
        return self._columns.inverse()

    def ordered_gradients(self, order: Tensor) -> Factorised:
        """``Ĝ`` factorised with its rows and columns in some order, `[n_out]` int64; not kept here."""
        return self._rows.factorise(order)

    def ordered_activations(self, order: Tensor) -> Factorised:
        """``Â`` likewise, `[n_in (+ 1)]` int64."""
        return self._columns.factorise(order)

    def weight_scales(self, cost: Cost) -> Tensor:
        """See the table of the module."""
        return 0.5 * self._rows.scales(cost)[:, None] * self._columns.scales(cost)[None, :]

    @property
    def damping(self) -> tuple[float, float]:
        """Relative damping in force, of inputs and outputs."""
        return self._columns.damping, self._rows.damping

    @property
    def escalations(self) -> int:
        """How often damping had to be raised, of what has been factorised."""
        return self._columns.escalations + self._rows.escalations
