"""A curvature without correlations: ``F X = D ∘ X`` with ``D = mean_t (g∘g)(a∘a)ᵀ``.

Removing weights costs the sum of their own costs, and nothing can make up for it, so OBS and OBD are the same.

Reference: LeCun et al. 1989, *Optimal Brain Damage*.
"""

from torch import Tensor

from surgeon.choices import Cost
from surgeon.curvature.groups import summed_costs
from surgeon.curvature.interface import LinearCurvature


class DiagonalCurvature(LinearCurvature):
    """The diagonal alone.

    Args:
        second_moments: ``D`` `[n_out, n_in (+ 1)]`, not negative.
    """

    def __init__(self, second_moments: Tensor) -> None:
        self._d = second_moments.double()
        self.shape = (second_moments.shape[0], second_moments.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        """``D ∘ X``."""
        return self._d.to(x.dtype) * x

    def solve(self, x: Tensor) -> Tensor:
        """``X / D``; what has no curvature is not moved."""
        return (x.double() / self._d).where(self._d > 0, 0.0)

    def damped_diagonal(self) -> Tensor:
        """``D``."""
        return self._d

    def row_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """``½ Σ_c W_rc² D_rc``."""
        return self.weight_costs(weight.double(), cost).sum(dim=1)

    def column_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """``½ Σ_r W_rc² D_rc``."""
        return self.weight_costs(weight.double(), cost).sum(dim=0)

    def group_costs(self, weight: Tensor, owner: Tensor, n_groups: int, cost: Cost) -> Tensor:
        """The sum over the columns of a group."""
        return summed_costs(self.column_costs(weight, cost), owner, n_groups)

    def weight_scales(self, cost: Cost) -> Tensor:  # noqa: ARG002
        """``½ D``."""
        return 0.5 * self._d

    @property
    def damping(self) -> tuple[float, float]:
        """None is needed."""
        return 0.0, 0.0

    @property
    def escalations(self) -> int:
        """None."""
        return 0
