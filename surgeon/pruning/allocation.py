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

from surgeon.choices import Ranking, Structure
from surgeon.errors import NonFiniteError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


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


def allocate(linears: Sequence[Candidates], target: float, structure: Structure, ranking: Ranking) -> Allocation:
    """Chooses what goes: the shortest prefix of the ranking that removes at least the target fraction.

    Args:
        linears: candidates of all linears, in model order.
        target: fraction of all weights to be gone after this shot, in (0, 1).
        structure: rows, columns or both may go.
        ranking: by cost, or by cost per weight freed (at the live sizes before this shot).

    Returns:
        The live sets. The target is met from above, to within one structure; what was already gone stays gone, so
        the sparsity may exceed the target without anything being removed.

    Raises:
        NonFiniteError: if a cost is NaN or infinite.
    """
    ranked = _rank(linears, structure, ranking)
    n_total = sum(c.n_weights for c in linears)
    n_live = sum(int(c.live_rows.sum()) * int(c.live_columns.sum()) for c in linears)
    freed = _weights_freed(linears, ranked)
    to_free = n_live - (1.0 - target) * n_total
    n_taken = 0 if to_free <= 0 else int(np.searchsorted(np.cumsum(freed), to_free - 1e-6)) + 1
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
    parts: list[tuple[int, bool, NDArray[np.int64], FloatArray, FloatArray]] = []
    for i, c in enumerate(linears):
        n_rows, n_columns = int(c.live_rows.sum()), int(c.live_columns.sum())
        sides = (
            (False, Structure.COLUMNS, c.row_costs, c.live_rows, n_columns),
            (True, Structure.ROWS, c.column_costs, c.live_columns, n_rows),
        )
        for is_column, other, costs, live, n_freed in sides:
            index = np.flatnonzero(live)
            if structure is other or n_freed == 0 or index.size == 0:
                continue
            cost = costs[index]
            if not np.isfinite(cost).all():
                bad = index[~np.isfinite(cost)][0]
                raise NonFiniteError(f"{c.name}: the cost of {'column' if is_column else 'row'} {bad} is not finite")
            parts.append((i, is_column, index, cost / (n_freed if ranking is Ranking.COST_PER_WEIGHT else 1), cost))
    sizes = [part[2].size for part in parts]
    linear = np.repeat(np.array([part[0] for part in parts], dtype=np.int64), sizes)
    is_column = np.repeat(np.array([part[1] for part in parts], dtype=bool), sizes)
    index, key, cost = (
        np.concatenate([part[k] for part in parts]) if parts else np.empty(0, dtype)
        for k, dtype in ((2, np.int64), (3, np.float64), (4, np.float64))
    )
    order = np.argsort(key, kind="stable")
    return _Ranked(linear[order], is_column[order], index[order], key[order], cost[order])


def _weights_freed(linears: Sequence[Candidates], ranked: _Ranked) -> NDArray[np.int64]:
    """Weights freed by each candidate if all before it in the ranking are gone."""
    freed = np.zeros(ranked.key.size, dtype=np.int64)
    for i, c in enumerate(linears):
        mine = np.flatnonzero(ranked.linear == i)
        columns = ranked.is_column[mine]
        columns_gone = np.cumsum(columns) - columns
        rows_gone = np.cumsum(~columns) - ~columns
        freed[mine] = np.where(columns, int(c.live_rows.sum()) - rows_gone, int(c.live_columns.sum()) - columns_gone)
    return freed
