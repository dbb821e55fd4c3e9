"""What it costs to remove groups of columns from a weight under one Kronecker product."""

import torch
from torch import Tensor

from surgeon.errors import NumericalError
from surgeon.repeatable import repeatable

_COLUMNS = 256
"""Columns that are multiplied at a time."""


def members_of(owner: Tensor, n_groups: int) -> list[Tensor]:
    """Columns of each group, ascending.

    Args:
        owner: `[n_columns]` int64, the group each column belongs to, or -1 for none.
        n_groups: groups are numbered below it.
    """
    order = torch.argsort(owner, stable=True)
    order = order[int((owner < 0).sum()) :]
    sizes = torch.bincount(owner[owner >= 0], minlength=n_groups)
    return list(torch.split(order, sizes.tolist()))


def summed_costs(columns: Tensor, owner: Tensor, n_groups: int) -> Tensor:
    """Costs of groups whose columns have nothing to do with each other: `[n_groups]` from those of columns, `[n]`."""
    mine = owner >= 0
    with repeatable(columns.device):
        return columns.new_zeros(n_groups).index_add_(0, owner[mine], columns[: owner.numel()][mine])


def plain_costs(weight: Tensor, pulled: Tensor, activations: Tensor | None, owner: Tensor, n_groups: int) -> Tensor:
    """``½ tr(A_QQ W_Qᵀ G W_Q)`` of every group Q, the others left as they are: `[n_groups]` float64.

    Args:
        weight: ``W`` `[n_out, n]` float64.
        pulled: ``G W``, likewise.
        activations: ``A`` `[n, n]` float64, or None for the identity.
        owner: `[n]` int64, see `members_of`.
        n_groups: number of groups.
    """
    costs = weight.new_zeros(n_groups)
    for group, q in enumerate(members_of(owner, n_groups)):
        product = weight[:, q].T @ pulled[:, q]
        costs[group] = 0.5 * (product.trace() if activations is None else (activations[q][:, q] * product).sum())
    return costs


def with_bias(owner: Tensor, n_columns: int) -> Tensor:
    """The group of each column once the bias has been added as one of no group, `[n_columns]` int64."""
    return torch.cat([owner, owner.new_full((n_columns - owner.numel(),), -1)])


def joint_costs(weight: Tensor, pulled: Tensor, inverse: Tensor, owner: Tensor, n_groups: int, where: str) -> Tensor:
    """``½ tr((H_QQ)⁻¹ W_Qᵀ G W_Q)`` of every group Q, the others adapted: `[n_groups]` float64.

    Args:
        weight: ``W`` `[n_out, n]` float64.
        pulled: ``G W``, likewise.
        inverse: ``H = Â⁻¹`` `[n, n]`.
        owner: `[n]` int64, see `members_of`.
        n_groups: number of groups.
        where: for the error message.
    """
    costs = weight.new_zeros(n_groups)
    sizes = torch.bincount(owner[owner >= 0], minlength=n_groups)
    if not n_groups or int(sizes.max()) <= 1:
        columns = (owner >= 0).nonzero()[:, 0]
        costs[owner[columns]] = (0.5 * _energies(weight, pulled) / inverse.diagonal())[columns]
        return costs
    for group, columns in enumerate(members_of(owner, n_groups)):
        if columns.numel():
            solved = torch.cholesky_solve(weight[:, columns].T, cholesky_of(inverse[columns][:, columns], where))
            costs[group] = 0.5 * (solved * pulled[:, columns].T).sum()
    return costs


def _energies(weight: Tensor, pulled: Tensor) -> Tensor:
    """``w_cᵀ (G W)_c`` of every column, `[n]`; some at a time, so that no third matrix of that size is held."""
    parts = zip(torch.split(weight, _COLUMNS, dim=1), torch.split(pulled, _COLUMNS, dim=1), strict=True)
    return torch.cat([(w * p).sum(dim=0) for w, p in parts])


def cholesky_of(matrix: Tensor, where: str) -> Tensor:
    """Cholesky factor of a part of an inverse, which rounding can make indefinite.

    Raises:
        NumericalError: if it did.
    """
    cholesky, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise NumericalError(
            f"{where}: a {matrix.shape[0]}x{matrix.shape[0]} part of the inverse of a factor is not positive definite; "
            "raise prune.damping"
        )
    result: Tensor = cholesky
    return result
