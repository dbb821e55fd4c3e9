"""From scores to the blocks that go: which may go, how many, the lowest, and the closest span."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import NonFiniteError, ParameterError

_ROUNDING = 1e-9
"""What a fraction of the weights may be off by, so that exactly half of the blocks is half of the weights."""


@dataclass(frozen=True)
class Choice:
    """How many blocks go, and which may.

    Attributes:
        n_blocks: of the model.
        n_remove: how many of them go, at least one.
        protect_first: blocks at the beginning that stay.
        protect_last: blocks at the end that stay.

    Raises:
        ParameterError: nothing or everything would go, or fewer blocks may go than shall.
    """

    n_blocks: int
    n_remove: int
    protect_first: int = 0
    protect_last: int = 0

    def __post_init__(self) -> None:
        _ = self.allowed
        if self.n_remove < 1:
            raise ParameterError(f"layerchop.blocks: got {self.n_remove}, allowed: 1 or more")
        if self.n_remove >= self.n_blocks:
            raise ParameterError(
                f"layerchop.blocks: {self.n_remove} of {self.n_blocks} blocks would go, and nothing is left of the "
                f"model; remove at most {self.n_blocks - 1}, or lower the target"
            )
        if self.n_remove > len(self.allowed):
            raise ParameterError(
                f"layerchop.blocks: {self.n_remove} blocks shall go, but of {self.n_blocks} the first "
                f"{self.protect_first} and the last {self.protect_last} are protected, so {len(self.allowed)} may; "
                "remove fewer (prune.sparsity or prune.layerchop.blocks), or lower protect_first or protect_last"
            )

    @property
    def allowed(self) -> range:
        """Indices of the blocks that may go."""
        return allowed_blocks(self.n_blocks, self.protect_first, self.protect_last)


def allowed_blocks(n_blocks: int, protect_first: int, protect_last: int) -> range:
    """Indices of the blocks that may go.

    Raises:
        ParameterError: a negative number of blocks is protected.
    """
    if min(protect_first, protect_last) < 0:
        raise ParameterError(
            f"layerchop.protect_first, protect_last: got {protect_first} and {protect_last}, allowed: 0 or more"
        )
    return range(protect_first, max(protect_first, n_blocks - protect_last))


def blocks_for_fraction(fraction: float, weights: Sequence[int]) -> int:
    """The fewest blocks with at least a fraction of all weights, whichever they are.

    Args:
        fraction: of all weights, above 0.
        weights: of each block; where blocks differ, the smallest are counted.
    """
    wanted = (fraction - _ROUNDING) * sum(weights)
    reached = 0
    for n, smallest in enumerate(sorted(weights), start=1):
        reached += smallest
        if reached >= wanted:
            return n
    return len(weights)


def lowest_blocks(scores: Sequence[float], choice: Choice) -> tuple[int, ...]:
    """The blocks with the lowest scores, lowest first; of equal ones the earlier first.

    Args:
        scores: of each block; those of protected blocks are not looked at.
        choice: how many of how many blocks.

    Raises:
        NonFiniteError: a score is not finite; names the block.
    """
    _require_finite({index: scores[index] for index in choice.allowed})
    return tuple(sorted(choice.allowed, key=lambda index: (scores[index], index))[: choice.n_remove])


def greedy_blocks(losses: NDArray[np.float64], choice: Choice) -> tuple[int, ...]:
    """The blocks that greedy removal takes: at each step the one without which the loss is lowest.

    Args:
        losses: `[n_steps, n_blocks]`; ``[k, i]`` is the loss without block i and the blocks of the steps before k. Of
            blocks that are gone or protected it is not looked at.
        choice: which may go.

    Returns:
        A block for each step, in the order of removal; of equal ones the earlier.

    Raises:
        NonFiniteError: a loss is not finite; names the block.

    Reference: Song et al. 2024, *SLEB*.
    """
    gone: list[int] = []
    for step in losses:
        left = {index: float(step[index]) for index in choice.allowed if index not in gone}
        _require_finite(left)
        gone.append(min(left, key=lambda index: (left[index], index)))
    return tuple(gone)


def closest_span(distances: NDArray[np.float64], choice: Choice) -> tuple[int, ...]:
    """The adjoining blocks over which the hidden states change least, ascending; of equal ones the earlier.

    Args:
        distances: `[n_blocks + 1, n_blocks + 1]`; ``[i, j]`` is between what enters block i and what enters block j
            (the last one: what leaves the last block).
        choice: how many of how many blocks.

    Raises:
        NonFiniteError: a distance is not finite; names the block.

    Reference: Gromov et al. 2024, *The Unreasonable Ineffectiveness of the Deeper Layers*.
    """
    n = choice.n_remove
    starts = choice.allowed[: len(choice.allowed) - n + 1]
    spans = {start: float(distances[start, start + n]) for start in starts}
    _require_finite(spans)
    first = min(spans, key=lambda start: (spans[start], start))
    return tuple(range(first, first + n))


def _require_finite(scores: dict[int, float]) -> None:
    for index, score in scores.items():
        if not math.isfinite(score):
            raise NonFiniteError(
                f"the score of block {index} is {score}, so blocks cannot be compared. Try model.dtype float32, or a "
                "selector that reads no data."
            )
