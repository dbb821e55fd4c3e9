"""Which units a sub-model lacks: draws among the candidates, in complementary pairs.

Of the n units of a sub-layer that live, the ``floor(n (1 - 2p))`` with the highest prior s are *frozen*: always kept,
not part of the regression. The rest are *candidates*. The first sub-model of a pair drops some of the candidates, drawn
without replacement with weights ``max_k s_k - s_j``; the second drops the others. So each candidate is dropped by
exactly one sub-model of each pair, and differences within pairs are free of all effects that are even in the masks.

Departures from the published code: there the first of a pair drops ``floor(p n) + 1`` candidates, always half of them.
Then the masks of a sub-layer always sum to the same, so no regression can tell what the sub-layer as a whole is worth,
and costs do not compare between sub-layers. Here it is a number between a quarter and three quarters of the candidates,
uniform, rounded up or down by chance; half on average. And if fewer candidates have a weight than are to be dropped, or
all scores are equal, the draw is uniform.

Reference: Dery et al. 2024, section 3.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.bonsai.parts import BoolArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ROUNDING = 1e-9
_LEAST_PART = 0.25
"""Of the candidates of a sub-layer, what each sub-model drops and keeps at least, up to rounding."""
_DRAW = 0
"""Keeps the draws of the masks apart from those of a random prior."""


@dataclass(frozen=True)
class Candidates:
    """What may go from one sub-layer in this round.

    Attributes:
        scores: prior of all units that live, `[n_live]` float64.
        units: positions of the candidates among them, ascending, `[n_candidates]` int64.
        weights: how likely each is dropped first, relative to the others, `[n_candidates]` float64.
    """

    scores: FloatArray
    units: IntArray
    weights: FloatArray

    @property
    def n_live(self) -> int:
        """Units that live."""
        return int(self.scores.size)

    @property
    def n_frozen(self) -> int:
        """Units that stay whatever the regression says."""
        return self.n_live - int(self.units.size)


def candidates_of(scores: FloatArray, fraction: float, at_least: int = 0) -> Candidates:
    """Freezes the most important units of a sub-layer; the rest may go.

    Args:
        scores: prior of the units that live, `[n_live]` float64.
        fraction: of them to be removed in this round; twice that stands for election.
        at_least: number of candidates that there must be, so that permitted widths can be reached.
    """
    n_live = scores.size
    n_frozen = max(math.floor(n_live * (1.0 - 2.0 * fraction) + _ROUNDING), 0)
    n_candidates = min(max(n_live - n_frozen, at_least), n_live)
    units = np.sort(np.argsort(scores, kind="stable")[:n_candidates])
    return Candidates(scores, units, _weights(scores, units))


def _weights(scores: FloatArray, units: IntArray) -> FloatArray:
    if not units.size:
        return np.zeros(0)
    weights: FloatArray = scores.max() - scores[units]
    if np.count_nonzero(weights) < (1.0 - _LEAST_PART) * units.size:
        return np.full(units.size, 1.0 / units.size)
    weights /= weights.sum()
    return weights


def draw_keeps(parts: Sequence[Candidates], seed: int, number: int, index: int) -> list[BoolArray]:
    """Which units one sub-model keeps.

    Args:
        parts: candidates of every sub-layer.
        seed: of the run.
        number: of the round, from 1.
        index: of the sub-model, from 0; 2k and 2k + 1 are a pair, drawn by a generator keyed by (seed, round, k).

    Returns:
        For each sub-layer, `[n_live]` bool.
    """
    pair, second = divmod(index, 2)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number, _DRAW, pair])))
    keeps = []
    for part in parts:
        n_candidates = part.units.size
        part_dropped, rounding = generator.random(2)
        n_dropped = math.floor(n_candidates * (_LEAST_PART + (1.0 - 2.0 * _LEAST_PART) * part_dropped) + rounding)
        # The largest of log w + Gumbel noise are draws without replacement with weights w (Efraimidis & Spirakis 2006).
        with np.errstate(divide="ignore"):
            keys = np.log(part.weights) - np.log(-np.log(generator.random(n_candidates)))
        dropped = np.zeros(n_candidates, dtype=bool)
        dropped[np.argsort(-keys, kind="stable")[:n_dropped]] = True
        keep = np.ones(part.n_live, dtype=bool)
        keep[part.units] = dropped if second else ~dropped
        keeps.append(keep)
    return keeps


def design_matrix(parts: Sequence[Candidates], seed: int, number: int, n_sub_models: int) -> BoolArray:
    """Whether each sub-model keeps each candidate, `[n_sub_models, n_candidates]` bool, sub-layers side by side."""
    rows = []
    for index in range(n_sub_models):
        keeps = draw_keeps(parts, seed, number, index)
        rows.append(np.concatenate([keep[part.units] for part, keep in zip(parts, keeps, strict=True)]))
    return np.stack(rows)
