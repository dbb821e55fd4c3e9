"""Sums of outer products, forming one triangle only.

``X`` is `[n_tokens, n]`. ``XᵀX`` is symmetric, so its lower triangle is enough: panels of rows of the result are
multiplied with the columns up to the end of the panel, ``(p + 1) / 2p`` of the work of the full product for p panels.
(BLAS `syrk` does the same, but PyTorch does not expose it, and this way CPU and GPU share the code.)
"""

import torch
from torch import Tensor

PANEL_WIDTH = 256
"""Rows of one panel: narrower panels save more work but run less efficiently (measured: 0.60-0.73x of full)."""


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds ``xᵀx`` to the lower triangle of ``total``; what lies above the panels' diagonal blocks is left alone.

    Args:
        total: `[n, n]` float32, changed in place.
        x: `[n_tokens, n]`, any float dtype; products are formed in the dtype of ``total``.
    """
    x = x.to(total.dtype)
    n = total.shape[0]
    for start in range(0, n, PANEL_WIDTH):
        stop = min(start + PANEL_WIDTH, n)
        total[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


def add_weighted_gram(total: Tensor, x: Tensor, weights: Tensor) -> None:
    """Adds ``xᵀ diag(weights) x`` to the lower triangle of ``total``, as `add_gram` does.

    Args:
        total: `[n, n]` float32, changed in place.
        x: `[n_tokens, n]` of the same dtype.
        weights: `[n_tokens]`, of any sign.
    """
    n = total.shape[0]
    for start in range(0, n, PANEL_WIDTH):
        stop = min(start + PANEL_WIDTH, n)
        total[start:stop, :stop].addmm_((x[:, start:stop] * weights[:, None]).T, x[:, :stop])


def mirror_lower(matrix: Tensor) -> Tensor:
    """Copies the lower triangle over the upper one, in place, and returns the now exactly symmetric matrix.

    Args:
        matrix: `[n, n]`; entries above the diagonal are ignored and overwritten.
    """
    n = matrix.shape[0]
    for start in range(0, n, PANEL_WIDTH):
        stop = min(start + PANEL_WIDTH, n)
        diagonal = matrix[start:stop, start:stop]
        lower = torch.tril(diagonal)
        diagonal.copy_(lower + torch.tril(lower, -1).T)
        matrix[:start, start:stop] = matrix[start:stop, :start].T
    return matrix
