"""SparseGPT: columns in order, each removal made up for by the columns to its right, the mask chosen on the way.

The output error of a row w is ``½ Δw Â Δwᵀ``, the same ``Â`` for all rows. When column c is reached, the columns to its
left are final. With the upper Cholesky factor ``U`` of the inverse, ``Â⁻¹ = Uᵀ U``, the row ``U_c,c:`` holds what OBS
needs over the columns that are left: removing w_c costs ``½ w_c² / U_cc²`` and changes the rest by
``-(w_c / U_cc) U_c,c:``.

The mask of the next ``width`` columns (or of the next M, for N:M) is chosen when the first of them is reached, from the
weights as they are then. Changes reach the columns right of the current block in one matrix product per block.

Reference: Frantar & Alistarh 2023, *SparseGPT*, arXiv 2301.00774, sections 3.2 and 3.3.
"""

import math

import torch
from torch import Tensor

from surgeon.curvature.kronecker import KroneckerCurvature
from surgeon.pruning.granularity import Granularity, NMPattern
from surgeon.pruning.live import LiveLinear
from surgeon.pruning.weight_update import UpdateResult, finished

_ROUNDING_WEIGHTS = 1e-6


def update_sequentially(
    live: LiveLinear, target: float, granularity: Granularity, width: int, where: str
) -> UpdateResult:
    """Removes a fraction of the weights of a linear and updates the rest, column after column.

    Args:
        live: the linear before the shot, with the curvature `activations`.
        target: fraction of the linear's weights to be gone afterwards, dead ones included.
        granularity: weights, or N:M.
        width: columns whose mask is chosen together; for N:M the mask is chosen for each group.
        where: block and linear, for error messages.
    """
    curvature = live.curvature
    assert isinstance(curvature, KroneckerCurvature), f"{where}: SparseGPT needs a Kronecker product"
    inverse = torch.cholesky_inverse(curvature.activations.cholesky)
    upper = torch.linalg.cholesky(inverse, upper=True).to(live.weight.dtype)
    original = live.weight.shape[1]
    n_columns = live.n_live_columns
    weight = live.weight.clone()
    alive = live.within(live.linear.alive())
    masks = _Masks(live, alive, target, granularity)
    stays = torch.ones_like(alive)
    for start in range(0, n_columns, width):
        stop = min(start + width, n_columns)
        errors = torch.zeros(len(weight), stop - start, dtype=weight.dtype, device=weight.device)
        for column in range(start, stop):
            if masks.begins(column, start):
                first, last = masks.span(column, stop)
                stays[:, first:last] = masks.choose(weight, upper.diagonal(), first, last)
            error = torch.where(stays[:, column], 0.0, weight[:, column]) / upper[column, column]
            weight[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        if stop < original:
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
    weight[:, :n_columns] = torch.where(stays, weight[:, :n_columns], 0.0)
    keep = live.placed(stays, fill=False)
    return finished(live, keep, weight, curvature.energy(weight - live.weight), None, where)


class _Masks:
    """Chooses what stays of a range of columns, so that the whole linear meets the target.

    Weights of dead rows and columns are gone already and count.
    """

    def __init__(self, live: LiveLinear, alive: Tensor, target: float, granularity: Granularity) -> None:
        self._alive = alive
        self._target = target
        self._pattern = granularity if isinstance(granularity, NMPattern) else None
        self._columns = live.linear.live_columns.nonzero()[:, 0].tolist()
        n_out, n_in = live.linear.weight.shape
        self._n_weights = n_out * n_in
        self._n_alive = alive.numel()
        self._taken = 0

    def begins(self, column: int, start: int) -> bool:
        """Whether a mask has to be chosen at this column of a block."""
        if self._pattern is None:
            return column == start
        return column == 0 or self._group(column) != self._group(column - 1)

    def span(self, column: int, stop: int) -> tuple[int, int]:
        """The columns whose mask is chosen together."""
        if self._pattern is None:
            return column, stop
        last = column
        while last < len(self._columns) and self._group(last) == self._group(column):
            last += 1
        return column, last

    def choose(self, weight: Tensor, diagonal: Tensor, first: int, last: int) -> Tensor:
        """What stays of some columns, `[n_out, last - first]` bool."""
        alive = self._alive[:, first:last]
        costs = (weight[:, first:last] / diagonal[first:last]).square_()
        costs.masked_fill_(~alive, -1.0)
        if self._pattern is not None:
            return self._choose_groups(costs, alive)
        # Dead columns are gone in whole; the live ones share what is left of the target evenly.
        share = max(0.0, self._target * self._n_weights - (self._n_weights - self._n_alive))
        upto = math.ceil(share * last / len(self._columns) - _ROUNDING_WEIGHTS)
        n_now = max(0, min(upto - self._taken, costs.numel()))
        self._taken += n_now
        goes = torch.zeros(costs.numel(), dtype=torch.bool, device=costs.device)
        goes[costs.flatten().argsort(stable=True)[:n_now]] = True
        return ~goes.view(costs.shape) & alive

    def _choose_groups(self, costs: Tensor, alive: Tensor) -> Tensor:
        """The N cheapest of a group go, in all rows or, below N/M, in the rows where that is cheapest."""
        assert self._pattern is not None
        n, m = self._pattern.n, self._pattern.m
        n_go = max(0, n - (m - costs.shape[1]))  # dead columns of the group are zeros already
        order = costs.argsort(dim=1, stable=True)[:, :n_go]
        goes = torch.zeros_like(alive).scatter_(1, order, True)
        n_rows = math.ceil(len(costs) * min(1.0, self._target / self._pattern.sparsity) - _ROUNDING_WEIGHTS)
        total = costs.clamp(min=0.0).gather(1, order).sum(dim=1)
        total.masked_fill_((~alive).sum(dim=1) >= n_go, -1.0)  # rows whose group is done come first
        rows = torch.zeros(len(costs), dtype=torch.bool, device=costs.device)
        rows[total.argsort(stable=True)[:n_rows]] = True
        return ~(goes & rows[:, None]) & alive

    def _group(self, column: int) -> int:
        assert self._pattern is not None
        return int(self._columns[column]) // self._pattern.m
