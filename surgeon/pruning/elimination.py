"""In which order groups of columns of one linear go, and what each further one costs.

With ``H = Â⁻¹`` over what is left, removing the columns Q of a weight W and adapting the others costs
``½ tr((H_QQ)⁻¹ W_Qᵀ G W_Q)`` and leaves

    W ← W - W_Q (H_QQ)⁻¹ H_Q:,      H ← H - H_:Q (H_QQ)⁻¹ H_Q:,

which is the weight after the exact update and the inverse of Â over the remaining columns. So costs can be taken again
after every step, and their sum is what removing all of them together costs: of two groups that say the same, the first
is cheap and the second dear. Single columns go several at a time, in a given number of steps: together these cost about
as much as a few factorisations.

Reference: Hassibi & Stork 1992 (OBS); Frantar & Alistarh 2022, *Optimal Brain Compression*, arXiv 2208.11580, section 4
(downdates); with the factor of gradients and for groups it is ours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import Cost
from surgeon.curvature.groups import cholesky_of, joint_costs, with_bias
from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.errors import NonFiniteError
from surgeon.pruning.live import LiveLinear

_CUT_ENTRIES = 1 << 20
"""Numbers that are moved at a time."""


@dataclass(frozen=True)
class Elimination:
    """Groups in the order in which they go.

    Attributes:
        order: index of each group, `[n_groups]` int64.
        costs: what each adds when those before it are gone, `[n_groups]` float64, nats per token.
    """

    order: Tensor
    costs: Tensor


def eliminate(live: LiveLinear, owner: Tensor, n_groups: int, cost: Cost, where: str, steps: int) -> Elimination:
    """Orders groups of live columns by what they cost.

    Args:
        live: the linear with its damped curvature.
        owner: the group of each live column, `[n_live_in]` int64. A group without columns costs nothing.
        n_groups: groups are numbered below it.
        cost: with OBS and one Kronecker product, costs are taken again as groups go; else they are taken once.
        where: block and linear, for error messages.
        steps: how often costs are taken again at most; 0 takes them once.

    Raises:
        NonFiniteError: if a cost is not finite.
        NumericalError: if rounding makes a part of the inverse indefinite.
    """
    if cost is Cost.OBS and isinstance(live.curvature, KroneckerCurvature) and steps:
        result = _one_after_the_other(live, live.curvature, owner, n_groups, where, steps)
    else:
        costs = live.curvature.group_costs(live.weight, owner, n_groups, cost)
        order = torch.argsort(costs, stable=True)
        result = Elimination(order, costs[order])
    if not torch.isfinite(result.costs).all():
        bad = int(result.order[~torch.isfinite(result.costs)][0])
        raise NonFiniteError(f"{where}: the cost of unit {bad} is not finite; raise prune.damping")
    return result


def _one_after_the_other(
    live: LiveLinear, curvature: KroneckerCurvature, owner: Tensor, n_groups: int, where: str, steps: int
) -> Elimination:
    # Columns are rows here, so that cutting some out leaves what stays together in memory.
    weight = live.weight.double().T.clone(memory_format=torch.contiguous_format)
    pulled = curvature.pulled(live.weight).T.clone(
        memory_format=torch.contiguous_format
    )  # costs need Wᵀ G W, and G W changes as W does
    inverse = curvature.inverse_activations().mT  # symmetric; this way it is contiguous
    owner = with_bias(owner, weight.shape[0])
    sizes = torch.bincount(owner[owner >= 0], minlength=n_groups)
    order, costs = [(sizes == 0).nonzero()[:, 0]], [weight.new_zeros(int((sizes == 0).sum()))]
    left = sizes > 0
    at_a_time = -(-int(left.sum()) // steps)
    while left.any():
        alone = joint_costs(weight.T, pulled.T, inverse, owner, n_groups, where).masked_fill_(~left, torch.inf)
        if not torch.isfinite(alone[left]).all():
            return Elimination(left.nonzero()[:, 0], alone[left])
        picked = torch.argsort(alone, stable=True)[: min(at_a_time, int(left.sum()))]
        left[picked] = False
        goes = torch.isin(owner, picked)
        q, k = goes.nonzero()[:, 0], (~goes).nonzero()[:, 0]
        gone = inverse[q]
        cholesky = cholesky_of(gone[:, q], where)
        weight_gone, pulled_gone, across = weight[q], pulled[q], gone[:, k]
        together = 0.5 * (torch.cholesky_solve(weight_gone, cholesky) * pulled_gone).sum()
        order.append(picked)
        costs.append(_divided(together, alone[picked]))
        spread = torch.cholesky_solve(across, cholesky)
        inverse = cut_in_place(inverse, k, k).addmm_(across.T, spread, alpha=-1)
        weight = cut_in_place(weight, k).addmm_(spread.T, weight_gone, alpha=-1)
        pulled = cut_in_place(pulled, k).addmm_(spread.T, pulled_gone, alpha=-1)
        owner = owner[k]
    return Elimination(torch.cat(order), torch.cat(costs))


def cut_in_place(matrix: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Some rows and columns of a matrix, moved to the beginning of its own memory.

    Args:
        matrix: `[n, m]`, contiguous; used up.
        rows: which stay, ascending, int64.
        columns: likewise; None keeps all.

    Returns:
        `[n_rows, n_columns]`, contiguous.
    """
    width = matrix.shape[1] if columns is None else columns.numel()
    kept = matrix.view(-1)[: rows.numel() * width].view(rows.numel(), width)
    at_a_time = max(1, _CUT_ENTRIES // max(1, matrix.shape[1]))
    for start in range(0, rows.numel(), at_a_time):
        # What is read lies behind what is written, since rows ascend; and it is copied before it is written.
        part = matrix[rows[start : start + at_a_time]]
        kept[start : start + at_a_time] = part if columns is None else part[:, columns]
    return kept


def _divided(together: Tensor, alone: Tensor) -> Tensor:
    """What groups cost that go in one step, in proportion to what each would cost alone."""
    total = alone.sum()
    return together * alone / total if float(total) > 0 else torch.full_like(alone, float(together) / alone.numel())
