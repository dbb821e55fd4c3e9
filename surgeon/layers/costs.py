"""What the weights of a linear are worth if all of them go.

``W`` `[n_out, n_in (+ 1)]` is the weight, with the bias as its last column where there is one; ``A`` and ``G`` are the
factors of K-FAC and ``g`` the gradient of the mean loss per token (`surgeon/curvature/factors.py`), of the same sizes.
The score of a block is the sum over its linears. Norms are not counted: nothing is measured for them.
"""

import torch
from torch import Tensor

from surgeon.curvature.factors import LinearFactors


def removal_cost(weight: Tensor, bias: Tensor | None, factors: LinearFactors) -> float:
    """Estimated change of the loss without the linear: ``½ tr(Wᵀ G W A) - tr(gᵀ W)``, nats per token.

    This is the second-order model of the loss at ``W - W = 0``. The second term is left out where the factors have no
    gradient of the loss.

    Args:
        weight: `[n_out, n_in]`.
        bias: `[n_out]`, or None.
        factors: with ``A`` and ``G``, and ``g`` or None.

    Reference: ours; the second-order model is that of LeCun et al. 1989 (Optimal Brain Damage).
    """
    assert factors.activations is not None and factors.gradients is not None, "no factors of K-FAC"
    whole = _augmented(weight, bias)
    inputs = factors.activations if bias is None else factors.augmented_activations()
    cost = 0.5 * float(((factors.gradients.double() @ whole) * (whole @ inputs.double())).sum())
    if factors.loss_gradient is not None:
        cost -= float((factors.loss_gradient.double() * whole).sum())
    return cost


def taylor_score(weight: Tensor, bias: Tensor | None, factors: LinearFactors) -> float:
    """First-order score ``Σ |W ∘ g|``: products are summed over tokens before their size is taken.

    Args:
        weight: `[n_out, n_in]`.
        bias: `[n_out]`, or None.
        factors: with ``g``.

    Reference: Kim et al. 2024, *Shortened LLaMA* (there norms are counted too).
    """
    assert factors.loss_gradient is not None, "no gradient of the loss"
    return float((_augmented(weight, bias) * factors.loss_gradient.double()).abs().sum())


def magnitude_score(weight: Tensor, bias: Tensor | None) -> float:
    """``Σ |W|``.

    Args:
        weight: `[n_out, n_in]`.
        bias: `[n_out]`, or None.

    Reference: Kim et al. 2024, *Shortened LLaMA* (Mag+).
    """
    return float(_augmented(weight, bias).abs().sum())


def _augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    whole = weight.double()
    return whole if bias is None else torch.cat([whole, bias.double()[:, None]], dim=1)
