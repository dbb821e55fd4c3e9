"""Observers of moments of the gradient of every single weight, ``g_i a_j``, without forming it for any token.

Both are one product `[n_out, n_tokens] x [n_tokens, n_in]` a batch; with a bias the input is `[a, 1]`, so the bias is
the last column.
"""

from abc import abstractmethod

from torch import Tensor

from surgeon.curvature.gram import add_product
from surgeon.curvature.observer import GRADIENT, LinearObserver, ObservedBlock, augmented, short_tokens_of


class _WeightObserver(LinearObserver):
    """Accumulates one `[n_out, n_in (+ 1)]` matrix for every linear."""

    def __init__(self, block: ObservedBlock) -> None:
        super().__init__(block)
        self._totals = {
            name: self._zeros(linear.out_features, block.augmented_features(name))
            for name, linear in block.linears.items()
        }

    def _on_gradient(self, name: str, kept: Tensor, gradient: Tensor) -> None:
        x = augmented(short_tokens_of(kept), self.block.linears[name].bias is not None)
        self._add(self._totals[name], short_tokens_of(gradient), x)
        self._require_finite(self._totals[name].sum(), gradient, name, GRADIENT)

    @staticmethod
    @abstractmethod
    def _add(total: Tensor, g: Tensor, x: Tensor) -> None:
        """Adds the contribution of a batch, given `[n_tokens, n_out]` and `[n_tokens, n_in (+ 1)]`."""

    def result(self) -> dict[str, Tensor]:
        """The means by linear, float32; the observer's sums are used up by this call."""
        return {name: total.div_(self.n_gradients) for name, total in self._totals.items()}


class DiagonalObserver(_WeightObserver):
    """Accumulates ``mean_t (g∘g)(a∘a)ᵀ``, the diagonal of the Fisher matrix.

    Reference: LeCun et al. 1989 (Optimal Brain Damage), with squared gradients in place of second derivatives.
    """

    @staticmethod
    def _add(total: Tensor, g: Tensor, x: Tensor) -> None:
        # The square of a short number is not one.
        total.addmm_(g.float().square().T, x.float().square())


class LossGradientObserver(_WeightObserver):
    """Accumulates ``mean_t g aᵀ``, the gradient of the loss by weight and token."""

    @staticmethod
    def _add(total: Tensor, g: Tensor, x: Tensor) -> None:
        add_product(total, g, x)
