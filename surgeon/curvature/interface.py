"""What costs and updates need of the curvature of one linear, whatever its approximation.

A curvature ``F`` acts on matrices of the shape of the weight, ``X`` `[n_out, n_in]`, or `[n_out, n_in + 1]` with the
bias last: ``F X`` stands for ``F vec(X)``. ``F̂`` is ``F`` with its damping, and positive definite.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from surgeon.choices import Cost


class LinearCurvature(ABC):
    """The damped curvature of the live part of one linear.

    Attributes:
        shape: of the matrices it acts on.
    """

    shape: tuple[int, int]

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``F̂ X`` in the dtype of x, `[n_out, n_in (+ 1)]`."""

    @abstractmethod
    def damped_diagonal(self) -> Tensor:
        """Diagonal of ``F̂`` as a matrix, `[n_out, n_in (+ 1)]` float64; may be a broadcast view."""

    @abstractmethod
    def solve(self, x: Tensor) -> Tensor:
        """``F̂⁻¹ X`` `[n_out, n_in (+ 1)]` float64.

        Raises:
            NotImplementedError: where only `apply` is exact.
        """

    @abstractmethod
    def row_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """Costs of removing each row of a weight `[n_out, n_in (+ 1)]`: `[n_out]` float64."""

    @abstractmethod
    def column_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """Costs of removing each column of a weight `[n_out, n_in (+ 1)]`: `[n_in (+ 1)]` float64."""

    @abstractmethod
    def group_costs(self, weight: Tensor, owner: Tensor, n_groups: int, cost: Cost) -> Tensor:
        """Costs of removing each group of columns from a weight `[n_out, n_in (+ 1)]`: `[n_groups]` float64.

        Args:
            weight: the bias last, if there is one.
            owner: `[n_in]` int64, the group each column belongs to, or -1 for none.
            n_groups: groups are numbered below it; one without columns costs nothing.
            cost: with all other weights adapted, or left as they are.
        """

    @abstractmethod
    def weight_scales(self, cost: Cost) -> Tensor:
        """What the square of each weight is multiplied with to give its cost, `[n_out, n_in (+ 1)]` float64.

        OBD: half the diagonal of ``F``; OBS: half of one over the diagonal of ``F̂⁻¹``.
        """

    def weight_costs(self, weight: Tensor, cost: Cost) -> Tensor:
        """Costs of removing each single weight, in the dtype of the weight `[n_out, n_in (+ 1)]`."""
        # The root first: a product of small inverses can leave the range of float32, its root does not.
        return (weight * self.weight_scales(cost).sqrt().to(weight.dtype)).square_()

    def energy(self, x: Tensor) -> float:
        """``½ vec(X)ᵀ F̂ vec(X)``."""
        return 0.5 * float(torch.sum(self.apply(x) * x, dtype=torch.float64))

    @property
    @abstractmethod
    def damping(self) -> tuple[float, float]:
        """Relative damping in force, of inputs and outputs."""

    @property
    @abstractmethod
    def escalations(self) -> int:
        """How often damping had to be raised."""
