"""Which single weights go: one threshold over all linears, one for each linear, or a number for each row.

A *candidate* is a weight, or with N:M a group of M consecutive inputs of a row, whose cost is that of its N cheapest
weights. The cheapest candidates go until the target is reached. Ties break by linear, then by index, so a mask is a
function of the costs.

A global threshold is found exactly without holding all costs: float32 numbers that are not negative are in the order
of their bits, so one pass counts them by their upper 16 bits, a second one by the lower 16 bits within the value found,
and a third one counts ties. Costs are read one linear at a time.

Reference: van der Ouderaa et al. 2024 (LLM Surgeon), section 3.3; Sun et al. 2024 (Wanda), section 3 (per row).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgeon.choices import Allocation
from surgeon.errors import ParameterError
from surgeon.pruning.costs import GONE
from surgeon.pruning.granularity import Granularity, NMPattern

FloatArray = NDArray[np.float32]
_BITS = 16
_ROUNDING_WEIGHTS = 1e-6
"""A target missed by less than this is met: rounding must not cost a weight."""


@dataclass(frozen=True)
class Cut:
    """Where the ranking of the candidates of one linear is cut.

    Attributes:
        threshold: candidates below it go.
        n_ties: of those equal to it, so many go, by index.
        per_row: if not negative, the threshold does not count, and each row loses so many candidates in all.
    """

    threshold: float
    n_ties: int
    per_row: int = -1


@dataclass(frozen=True)
class Selection:
    """What goes in this shot.

    Attributes:
        cuts: for each linear.
        sparsity: fraction of all weights that are gone after it.
        threshold: the largest of the linears' thresholds, 0 if there is none.
        predicted_cost: sum of the costs of what goes now.
        n_removed: number of weights that go now.
    """

    cuts: tuple[Cut, ...]
    sparsity: float
    threshold: float
    predicted_cost: float
    n_removed: int


Costs = Callable[[], Iterable[FloatArray]]
"""Gives the costs of all linears, `[n_out, n_in]` float32 each, in model order; called once a pass."""


def check_divides(n_in: int, granularity: Granularity, where: str) -> None:
    """Refuses a linear whose inputs are not a multiple of M.

    Raises:
        ParameterError: naming the linear.
    """
    if isinstance(granularity, NMPattern) and n_in % granularity.m:
        raise ParameterError(
            f"structure {granularity}: {where} has {n_in} inputs, which do not divide into groups of {granularity.m}; "
            "choose an M that divides the width of every linear"
        )


def select_weights(costs: Costs, target: float, granularity: Granularity, allocation: Allocation) -> Selection:
    """Chooses what goes so that at least the target fraction of all weights (within each linear or row) is gone.

    Args:
        costs: of all linears.
        target: fraction of all weights to be gone after this shot, in (0, 1).
        granularity: weights, or N:M.
        allocation: what shares one threshold.

    Returns:
        The cuts. The target is met from above, to within one candidate; what was gone stays gone.
    """
    size = granularity.n if isinstance(granularity, NMPattern) else 1
    if allocation is Allocation.GLOBAL:
        cuts = _global_cuts(costs, target, granularity, size)
    elif allocation is Allocation.PER_LAYER:
        cuts = [
            _global_cuts(lambda one=one: [one], target, granularity, size)[0]  # type: ignore[misc]
            for one in costs()
        ]
    else:
        cuts = [Cut(0.0, 0, _n_candidates(target, one.shape[1], size)) for one in costs()]
    n_total = n_gone = n_removed = 0
    predicted = 0.0
    for one, cut in zip(costs(), cuts, strict=True):
        values = torch.from_numpy(one)
        goes = ~weights_that_stay(values, granularity, cut)
        now = goes & (values != GONE)
        n_total += one.size
        n_gone += int(goes.sum())
        n_removed += int(now.sum())
        predicted += float(values[now].sum(dtype=torch.float64))
    finite = [cut.threshold for cut in cuts if math.isfinite(cut.threshold)]
    return Selection(tuple(cuts), n_gone / n_total, max(0.0, *finite) if finite else 0.0, predicted, n_removed)


def weights_that_stay(costs: Tensor, granularity: Granularity, cut: Cut) -> Tensor:
    """Which weights of one linear stay, `[n_out, n_in]` bool.

    Args:
        costs: `[n_out, n_in]` float32; `GONE` where a weight is gone already.
        granularity: weights, or N:M.
        cut: of this linear.
    """
    if isinstance(granularity, NMPattern):
        members = _members(costs, granularity)
        cheapest = _cheapest(members, granularity.n)
        chosen = _chosen(_group_costs(members, cheapest, granularity.n), cut)
        goes = (cheapest & chosen) | (members == GONE)
        return ~goes.movedim(0, 2).reshape(costs.shape)
    return ~(_chosen(costs, cut) | (costs == GONE))


def candidate_costs(costs: Tensor, granularity: Granularity) -> Tensor:
    """Costs of the candidates of one linear: the weights themselves, or groups `[n_out, n_in / M]`."""
    if isinstance(granularity, NMPattern):
        members = _members(costs, granularity)
        return _group_costs(members, _cheapest(members, granularity.n), granularity.n)
    return costs


def _members(costs: Tensor, pattern: NMPattern) -> Tensor:
    """Costs by place in the group, `[M, n_out, n_in / M]`: whole matrices compare fast, groups of a few do not."""
    return costs.reshape(costs.shape[0], -1, pattern.m).movedim(2, 0).contiguous()


def _cheapest(members: Tensor, n: int) -> Tensor:
    """Which N of each group cost least, `[M, n_out, n_in / M]` bool; of equal ones the first."""
    n_before = torch.zeros(members.shape, dtype=torch.int16, device=members.device)
    for one in range(len(members)):
        for other in range(one + 1, len(members)):
            later_is_cheaper = members[other] < members[one]
            n_before[one] += later_is_cheaper
            n_before[other] += ~later_is_cheaper
    return n_before < n


def _group_costs(members: Tensor, cheapest: Tensor, n: int) -> Tensor:
    """Sum of the N cheapest of each group, `[n_out, n_in / M]`; `GONE` where N or more are gone already."""
    total = torch.where(cheapest, members.clamp(min=0.0), 0.0).sum(dim=0)
    return torch.where((members == GONE).sum(dim=0) >= n, GONE, total)


def _chosen(candidates: Tensor, cut: Cut) -> Tensor:
    """Candidates that go, gone ones included."""
    if cut.per_row >= 0:
        order = candidates.argsort(dim=1, stable=True)[:, : cut.per_row]
        return torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, order, True)
    goes = candidates < cut.threshold
    if cut.n_ties:
        ties = (candidates == cut.threshold).flatten().nonzero()[: cut.n_ties, 0]
        goes.view(-1)[ties] = True
    return goes


def _n_candidates(target: float, n_weights: int, size: int) -> int:
    """Candidates of ``size`` weights each that have to go for the target."""
    return max(0, math.ceil((target * n_weights - _ROUNDING_WEIGHTS) / size))


def _global_cuts(costs: Costs, target: float, granularity: Granularity, size: int) -> list[Cut]:
    """One threshold for all, with ties given to the first linears."""
    upper = np.zeros(1 << _BITS, dtype=np.int64)
    n_total = n_gone = n_linears = n_candidates = 0
    for candidates, n_weights in _candidates(costs, granularity):
        bits = _live_bits(candidates)
        upper += np.bincount(bits >> _BITS, minlength=upper.size)
        n_gone += candidates.size - bits.size
        n_total += n_weights
        n_candidates += candidates.size
        n_linears += 1
    n_take = min(_n_candidates(target, n_total, size), n_candidates) - n_gone
    if n_take <= 0:
        return [Cut(0.0, 0)] * n_linears
    high, n_below = _bin_of(upper, n_take)
    lower = np.zeros(1 << _BITS, dtype=np.int64)
    for candidates, _ in _candidates(costs, granularity):
        bits = _live_bits(candidates)
        lower += np.bincount(bits[bits >> _BITS == high] & ((1 << _BITS) - 1), minlength=lower.size)
    low, n_below_within = _bin_of(lower, n_take - n_below)
    n_ties = n_take - n_below - n_below_within
    found = np.uint32((high << _BITS) | low)
    threshold = float(found.view(np.float32))
    cuts = []
    for candidates, _ in _candidates(costs, granularity):
        mine = min(n_ties, int(np.count_nonzero(_live_bits(candidates) == found)))
        cuts.append(Cut(threshold, mine))
        n_ties -= mine
    return cuts


def _candidates(costs: Costs, granularity: Granularity) -> Iterable[tuple[FloatArray, int]]:
    """For each linear the costs of its candidates, as a vector, and its number of weights."""
    for one in costs():
        yield candidate_costs(torch.from_numpy(one), granularity).numpy().ravel(), one.size


def _live_bits(candidates: FloatArray) -> NDArray[np.uint32]:
    """Bits of the costs of candidates that are not gone; adding zero turns -0.0 into 0.0."""
    bits: NDArray[np.uint32] = (candidates[candidates != np.float32(GONE)] + np.float32(0.0)).view(np.uint32)
    return bits


def _bin_of(counts: Sequence[int] | NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the element of a rank (from 1), and how many elements lie in the bins before it."""
    cumulated = np.cumsum(counts)
    found = int(np.searchsorted(cumulated, rank))
    return found, int(cumulated[found - 1]) if found else 0
