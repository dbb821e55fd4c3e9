"""Sums of outer products, forming one triangle only, always accumulated in float32.

``X`` is `[n_tokens, n]`. ``XᵀX`` is symmetric, so its lower triangle is enough: panels of rows of the result are
multiplied with the columns up to the end of the panel, ``(p + 1) / 2p`` of the work of the full product for p panels.
(BLAS `syrk` does the same, but PyTorch does not expose it, and this way CPU and GPU share the code.)

The product of two bfloat16 or float16 numbers is exact in float32. So on a GPU, whose matrix units take such numbers
and add up in float32, they are multiplied as they are: the sum is that of the converted numbers, at many times the
speed. Elsewhere they are converted first.
"""

import torch
from torch import Tensor

PANEL_WIDTH = 256
"""Rows of one panel: narrower panels save more work but run less efficiently (measured: 0.60-0.73x of full)."""
GPU_PANEL_WIDTH = 2048
"""The same on a GPU, which a narrow panel does not fill."""
_SHORT = (torch.bfloat16, torch.float16)


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds ``xᵀx`` to the lower triangle of ``total``; what lies above the panels' diagonal blocks is left alone.

    Args:
        total: `[n, n]` float32, changed in place.
        x: `[n_tokens, n]`, any float dtype; sums are formed in the dtype of ``total``.
    """
    n = total.shape[0]
    width = panel_width(total)
    x = x if stays_short(x) else x.to(total.dtype)
    for start in range(0, n, width):
        stop = min(start + width, n)
        add_product(total[start:stop, :stop], x[:, start:stop], x[:, :stop])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``leftᵀ right`` to ``total``.

    Args:
        total: `[n, m]` float32, changed in place.
        left: `[n_tokens, n]`, any float dtype.
        right: `[n_tokens, m]` of the same dtype.
    """
    if stays_short(left):
        total.add_(torch.mm(left.T, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype).T, right.to(total.dtype))


def stays_short(x: Tensor) -> bool:
    """Whether 16-bit numbers are multiplied as they are, with sums in float32."""
    return x.is_cuda and x.dtype in _SHORT


def panel_width(total: Tensor) -> int:
    """Rows of a panel of a sum."""
    return GPU_PANEL_WIDTH if total.is_cuda else PANEL_WIDTH


def add_weighted_gram(total: Tensor, x: Tensor, weights: Tensor) -> None:
    """Adds ``xᵀ diag(weights) x`` to the lower triangle of ``total``, as `add_gram` does.

    Args:
        total: `[n, n]` float32, changed in place.
        x: `[n_tokens, n]` of the same dtype.
        weights: `[n_tokens]`, of any sign.
    """
    n = total.shape[0]
    width = panel_width(total)
    for start in range(0, n, width):
        stop = min(start + width, n)
        total[start:stop, :stop].addmm_((x[:, start:stop] * weights[:, None]).T, x[:, :stop])


def mirror_lower(matrix: Tensor) -> Tensor:
    """Copies the lower triangle over the upper one, in place, and returns the now exactly symmetric matrix.

    Args:
        matrix: `[n, n]`; entries above the diagonal are ignored and overwritten.
    """
    n = matrix.shape[0]
    width = panel_width(matrix)
    for start in range(0, n, width):
        stop = min(start + width, n)
        diagonal = matrix[start:stop, start:stop]
        lower = torch.tril(diagonal)
        diagonal.copy_(lower + torch.tril(lower, -1).T)
        matrix[:start, start:stop] = matrix[start:stop, :start].T
    return matrix
