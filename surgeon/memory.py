"""How much memory a curvature pass and what follows it take, and how many blocks fit at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from surgeon.errors import ParameterError

_GIB = 2**30
_FLOAT32 = 4
_HEAD_COPIES = 4
"""Logits of a batch exist about this often in float32: as computed, log-softmax, and the gradients of both."""
_ACTIVATION_COPIES = 1.1
"""What is held until the backward pass, over inputs and outputs of all linears (measured: 0.7 to 1.25 by family)."""
_EVALUATION_HEAD_COPIES = 3
"""Logits of a batch without gradients: as computed, in float32, and their log-softmax."""
_FLOAT64 = 8
_SOLVE_COPIES = 12
"""Matrices of the size of the largest factor, in float64, that costs and updates hold where they need bases or whole
inverses: the factor, damped, its Cholesky factor, inverses, and what is cut out of them (measured)."""
_IN_PLACE_COPIES = 1.25
"""The same where one Kronecker product is solved in place: the matrix, and a quarter while halves are multiplied."""
_WEIGHT_COPIES = 5
"""Matrices of the size of the weight, in float64, that are held then: the weight, transposed, times the factor of
gradients, what is added, and cut to what lives in float32 (measured: benchmarks/solves.py)."""

_WHOLE_SHARE = 0.6
"""Part of the available memory that a model may take which is loaded whole to be looked at."""

_BOUNDARY_ARRAYS = 3
"""Hidden states entering a group, the gradient from above and the gradient it hands down are held for all sequences."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a curvature pass needs at its peak, by what they are for."""

    trunk: int
    weights: int
    factors: int
    activations: int
    head: int
    boundaries: int

    @property
    def total_gib(self) -> float:
        """Sum of all parts, in GiB."""
        return (self.trunk + self.weights + self.factors + self.activations + self.head + self.boundaries) / _GIB

    @property
    def device_gib(self) -> float:
        """What of it is on a GPU, where there is one, in GiB: all but the hidden states that groups hand over."""
        return self.total_gib - self.boundaries / _GIB

    @property
    def host_gib(self) -> float:
        """What the machine holds where passes run on a GPU, in GiB.

        Hidden states of all sequences, weights on their way in, and factors on their way out.
        """
        return (self.boundaries + self.weights + self.factors) / _GIB

    @property
    def evaluation_gib(self) -> float:
        """The same for an evaluation, which forms no factors and keeps nothing for a backward pass, in GiB."""
        head = self.head * _EVALUATION_HEAD_COPIES // _HEAD_COPIES
        return (self.trunk + self.weights + head + self.boundaries) / _GIB

    @classmethod
    def of(
        cls,
        blocks: Sequence[Sequence[tuple[int, int]]],
        width: int,
        n_vocabulary: int,
        batch_tokens: int,
        dtype_bytes: int,
        blocks_per_group: int,
        pass_tokens: int = 0,
        factor_copies: int = 1,
        measured: Sequence[Sequence[tuple[int, int]]] | None = None,
        n_trunk: int | None = None,
    ) -> "MemoryEstimate":
        """Estimates from shapes.

        Args:
            blocks: for each block, `(n_out, n_in)` of its linears.
            width: of the hidden states.
            n_vocabulary: rows of the embedding and of the head.
            batch_tokens: tokens of a batch.
            dtype_bytes: bytes of a weight.
            blocks_per_group: blocks held at a time.
            pass_tokens: tokens of all sequences of a pass, whose hidden states and gradients groups hand to each other.
            factor_copies: matrices of the size of each factor that are held at once.
            measured: as `blocks`, the linears whose factors are formed; None for all.
            n_trunk: parameters outside the blocks; None counts an embedding and a head.
        """
        pairs = zip(blocks, blocks if measured is None else measured, strict=True)
        largest = sorted((_block_bytes(*pair, dtype_bytes, batch_tokens) for pair in pairs), reverse=True)
        held = largest[:blocks_per_group]
        return cls(
            trunk=(2 * n_vocabulary * width if n_trunk is None else n_trunk) * dtype_bytes,
            weights=sum(block[0] for block in held),
            factors=factor_copies * sum(block[1] for block in held),
            activations=sum(block[2] for block in held),
            head=_HEAD_COPIES * batch_tokens * n_vocabulary * _FLOAT32,
            boundaries=0 if blocks_per_group >= len(blocks) else _BOUNDARY_ARRAYS * pass_tokens * width * _FLOAT32,
        )


def _block_bytes(
    block: Sequence[tuple[int, int]], measured: Sequence[tuple[int, int]], dtype_bytes: int, batch_tokens: int
) -> tuple[int, int, int]:
    weights = sum(n_out * n_in for n_out, n_in in block) * dtype_bytes
    factors = sum(n_out * n_out + n_in * n_in for n_out, n_in in measured) * _FLOAT32
    activations = round(_ACTIVATION_COPIES * batch_tokens * sum(n_out + n_in for n_out, n_in in block) * dtype_bytes)
    return weights, factors, activations


def solve_gib(
    block: Sequence[tuple[int, int]],
    measured: Sequence[tuple[int, int]],
    *,
    in_place: bool = False,
    has_bias: bool = False,
) -> float:
    """What costs or updates of one block hold at their peak, GiB: its weights, and one linear being solved.

    Args:
        block: `(n_out, n_in)` of its linears.
        measured: likewise, those that have factors.
        in_place: whether one Kronecker product is solved for rows, columns or units.
        has_bias: whether linears have one, with which the factor of inputs is a row and a column larger: another copy.
    """
    weights = sum(n_out * n_in for n_out, n_in in block) * _FLOAT32
    if not in_place:
        solved = max((_SOLVE_COPIES * max(pair) ** 2 + 4 * pair[0] * pair[1] for pair in measured), default=0)
        return (2 * weights + solved * _FLOAT64) / _GIB
    return (weights + max((_in_place_bytes(*pair, has_bias) for pair in measured), default=0.0)) / _GIB


def _in_place_bytes(n_out: int, n_in: int, has_bias: bool) -> float:
    """Both factors as they are stored, the larger one being solved, the other in float64, and the weight's copies."""
    large, small = max(n_out, n_in), min(n_out, n_in)
    factors = _FLOAT32 * (large**2 + small**2 + has_bias * n_in**2)
    return factors + _FLOAT64 * (_IN_PLACE_COPIES * large**2 + small**2 + _WEIGHT_COPIES * n_out * n_in)


def available_bytes() -> int:
    """Memory that is free or can be freed, with swap."""
    return int(psutil.virtual_memory().available + psutil.swap_memory().free)


def loads_by_block(n_bytes: int) -> bool:
    """Whether a checkpoint of some bytes is loaded a block at a time, as it is large beside the memory there is."""
    return n_bytes > _WHOLE_SHARE * available_bytes()


def blocks_that_fit(
    estimate: Callable[[int], MemoryEstimate], n_blocks: int, budget_gib: float, *, on_gpu: bool = False
) -> int:
    """The largest number of blocks per group whose estimate stays within a budget.

    Args:
        estimate: by the number of blocks per group.
        n_blocks: of the model.
        budget_gib: memory that may be taken: of the machine, or of a GPU.
        on_gpu: whether it is that of a GPU.

    Raises:
        ParameterError: if not even one block fits.
    """

    def needed(blocks_per_group: int) -> float:
        made = estimate(blocks_per_group)
        return made.device_gib if on_gpu else made.total_gib

    for blocks_per_group in range(n_blocks, 0, -1):
        if needed(blocks_per_group) <= budget_gib:
            return blocks_per_group
    raise ParameterError(
        f"run.memory_gib: one block at a time needs about {needed(1):.1f} GiB and the budget is "
        f"{budget_gib:.1f} GiB. Lower run.batch_size or calibrate.length, or give more memory."
    )
