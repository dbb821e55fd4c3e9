"""One global threshold: which rows and columns of all linears go so that the target is met.

All live rows and columns of all linears are ranked together and the cheapest go, until the removed fraction of all
decoder-linear weights reaches the target. Rows and columns overlap: with ``r`` live rows and ``c`` live columns a
linear has ``r · c`` live weights, so a row frees as many weights as columns are live *at its turn*. One sort and one
cumulative sum find the shortest prefix that reaches the target: O(n log n).

Reference: van der Ouderaa et al. 2024 (LLM Surgeon), section 3.3 (global threshold); the price per weight is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.choices import Allocation as Scope
from surgeon.choices import Ranking, Structure
from surgeon.errors import NonFiniteError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

_ROUNDING_WEIGHTS = 1e-6
"""A target missed by less than this is met: rounding must not cost a structure."""


@dataclass(frozen=True)
class Candidates:
    """The rows and columns of one linear that stand for election.

    Attributes:
        name: block and linear, for messages.
        row_costs: `[n_out]` float64; column_costs: `[n_in]` float64, nats per token.
        live_rows: `[n_out]` bool; live_columns: `[n_in]` bool.
    """

    name: str
    row_costs: FloatArray
    column_costs: FloatArray
    live_rows: BoolArray
    live_columns: BoolArray

    @property
    def n_weights(self) -> int:
        """Weights of the dense linear."""
        return self.live_rows.size * self.live_columns.size


@dataclass(frozen=True)
class Allocation:
    """What stays after this shot.

    Attributes:
        live_rows: for each linear, `[n_out]` bool.
        live_columns: for each linear, `[n_in]` bool.
        sparsity: removed fraction of the weights of all linears.
        threshold: key of the last structure removed (nats per token, or nats per token and weight); 0 if none was.
        predicted_cost: sum of the costs of what was removed, nats per token.
        n_removed: number of rows and columns removed now.
    """

    live_rows: tuple[BoolArray, ...]
    live_columns: tuple[BoolArray, ...]
    sparsity: float
    threshold: float
    predicted_cost: float
    n_removed: int


@dataclass(frozen=True)
class _Ranked:
    """All candidates in one list, cheapest first; ties broken by linear, then rows before columns, then index."""

    linear: NDArray[np.int64]
    is_column: BoolArray
    index: NDArray[np.int64]
    key: FloatArray
    cost: FloatArray


def allocate(
    linears: Sequence[Candidates], target: float, structure: Structure, ranking: Ranking, scope: Scope = Scope.GLOBAL
) -> Allocation:
    """Chooses what goes: the shortest prefix of the ranking that removes at least the target fraction.

    Args:
        linears: candidates of all linears, in model order.
        target: fraction of all weights (or of those of each linear) to be gone after this shot, in (0, 1).
        structure: rows, columns or both may go.
        ranking: by cost, or by cost per weight freed (at the live sizes before this shot).
        scope: one ranking over all linears, or one for each.

    Returns:
        The live sets. The target is met from above, to within one structure; what was already gone stays gone, so
        the sparsity may exceed the target without anything being removed.

    Raises:
        NonFiniteError: if a cost is NaN or infinite.
    """
    if scope is Scope.GLOBAL:
        return _allocate(linears, target, structure, ranking)
    parts = [_allocate([linear], target, structure, ranking) for linear in linears]
    n_total = sum(c.n_weights for c in linears)
    return Allocation(
        live_rows=tuple(rows for part in parts for rows in part.live_rows),
        live_columns=tuple(columns for part in parts for columns in part.live_columns),
        sparsity=sum(part.sparsity * c.n_weights for part, c in zip(parts, linears, strict=True)) / n_total,
        threshold=max(part.threshold for part in parts),
        predicted_cost=sum(part.predicted_cost for part in parts),
        n_removed=sum(part.n_removed for part in parts),
    )


def _allocate(linears: Sequence[Candidates], target: float, structure: Structure, ranking: Ranking) -> Allocation:
    """One ranking over all linears."""
    ranked = _rank(linears, structure, ranking)
    n_total = sum(c.n_weights for c in linears)
    n_live = sum(int(c.live_rows.sum()) * int(c.live_columns.sum()) for c in linears)
    freed = _weights_freed(linears, ranked)
    to_free = n_live - (1.0 - target) * n_total - _ROUNDING_WEIGHTS
    n_taken = 0 if to_free <= 0 else int(np.searchsorted(np.cumsum(freed), to_free)) + 1
    n_taken = min(n_taken, ranked.key.size)
    live_rows = tuple(c.live_rows.copy() for c in linears)
    live_columns = tuple(c.live_columns.copy() for c in linears)
    for i in range(len(linears)):
        mine = ranked.linear[:n_taken] == i
        columns = ranked.is_column[:n_taken]
        live_rows[i][ranked.index[:n_taken][mine & ~columns]] = False
        live_columns[i][ranked.index[:n_taken][mine & columns]] = False
    remaining = sum(int(r.sum()) * int(c.sum()) for r, c in zip(live_rows, live_columns, strict=True))
    return Allocation(
        live_rows=live_rows,
        live_columns=live_columns,
        sparsity=1.0 - remaining / n_total,
        threshold=float(ranked.key[n_taken - 1]) if n_taken else 0.0,
        predicted_cost=float(ranked.cost[:n_taken].sum()),
        n_removed=n_taken,
    )


def _rank(linears: Sequence[Candidates], structure: Structure, ranking: Ranking) -> _Ranked:
    nothing = np.empty(0)
    parts = [_Ranked(nothing.astype(np.int64), nothing.astype(np.bool_), nothing.astype(np.int64), nothing, nothing)]
    for i, c in enumerate(linears):
        n_rows, n_columns = int(c.live_rows.sum()), int(c.live_columns.sum())
        if structure is not Structure.COLUMNS and n_columns:
            parts.append(_side(i, c.name, False, c.row_costs, c.live_rows, n_columns, ranking))
        if structure is not Structure.ROWS and n_rows:
            parts.append(_side(i, c.name, True, c.column_costs, c.live_columns, n_rows, ranking))
    everything = _Ranked(
        np.concatenate([part.linear for part in parts]),
        np.concatenate([part.is_column for part in parts]),
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.key for part in parts]),
        np.concatenate([part.cost for part in parts]),
    )
    order = np.argsort(everything.key, kind="stable")
    return _Ranked(
        everything.linear[order],
        everything.is_column[order],
        everything.index[order],
        everything.key[order],
        everything.cost[order],
    )


def _side(
    linear: int, name: str, is_column: bool, costs: FloatArray, live: BoolArray, n_freed: int, ranking: Ranking
) -> _Ranked:
    """Live rows (or columns) of one linear, by index; each frees ``n_freed`` weights while all others live."""
    index = np.flatnonzero(live)
    cost = costs[index]
    if not np.isfinite(cost).all():
        bad = index[~np.isfinite(cost)][0]
        raise NonFiniteError(f"{name}: the cost of {'column' if is_column else 'row'} {bad} is not finite")
    key = cost / n_freed if ranking is Ranking.COST_PER_WEIGHT else cost
    return _Ranked(np.full(index.size, linear), np.full(index.size, is_column), index, key, cost)


def _weights_freed(linears: Sequence[Candidates], ranked: _Ranked) -> NDArray[np.int64]:
    """Weights freed by each candidate if all before it in the ranking are gone."""
    freed = np.zeros(ranked.key.size, dtype=np.int64)
    for i, c in enumerate(linears):
        mine = np.flatnonzero(ranked.linear == i)
        columns = ranked.is_column[mine]
        columns_gone: NDArray[np.int64] = np.cumsum(columns) - columns
        rows_gone: NDArray[np.int64] = np.cumsum(~columns) - ~columns
        freed[mine] = np.where(columns, int(c.live_rows.sum()) - rows_gone, int(c.live_columns.sum()) - columns_gone)
    return freed
