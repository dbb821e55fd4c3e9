"""Amounts of work by kind of operation. A multiply-add is two floating-point operations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Operation(StrEnum):
    """What a machine does at a rate of its own, and the unit it is counted in."""

    FORWARD = "forward"
    """Multiply-adds of decoder blocks on a batch, without a graph."""
    BACKWARD = "backward"
    """Multiply-adds of their backward pass to activations; its time includes keeping the graph."""
    HEAD = "head"
    """Multiply-adds of the head on a batch, with the loss."""
    HEAD_BACKWARD = "head-backward"
    """Multiply-adds of the backward pass of head and loss."""
    STEP = "step"
    """Bytes of weights that a pass over one token reads."""
    STEP_TOKENS = "step-tokens"
    """Multiply-adds of further tokens of such a pass."""
    GRAM = "gram"
    """Multiply-adds of sums of outer products, one triangle, float32."""
    PRODUCTS = "products"
    """Multiply-adds of products of large matrices, float32."""
    SOLVES = "solves"
    """Multiply-adds of factorisations, inverses and products, float64."""
    EIGEN = "eigen"
    """n³ of eigendecompositions, float64."""
    COPIES = "copies"
    """Bytes read or written in memory."""
    READS = "reads"
    """Bytes read from the store, with checksums."""
    WRITES = "writes"
    """Bytes written to the store, with digest, checksums and flush."""
    OPENED = "opened"
    """Arrays of stored results opened and checked to be read, whatever their size."""
    ARRAYS = "arrays"
    """Arrays written to the store, whatever their size."""
    FILES = "files"
    """Bytes of a checkpoint written and hashed."""
    LOADS = "loads"
    """Bytes of weights loaded from a checkpoint."""
    OPENINGS = "openings"
    """Models opened: built without weights, embeddings and head loaded, the first block tried."""
    PROCESSES = "processes"
    """Python processes started that import torch and transformers."""
    SECONDS = "seconds"
    """Seconds that depend on no measured rate."""


MULTIPLY_ADDS: Mapping[Operation, float] = {
    **dict.fromkeys(
        (
            Operation.FORWARD,
            Operation.BACKWARD,
            Operation.HEAD,
            Operation.HEAD_BACKWARD,
            Operation.STEP_TOKENS,
            Operation.GRAM,
            Operation.PRODUCTS,
            Operation.SOLVES,
        ),
        1.0,
    ),
    Operation.EIGEN: 4.5,
    Operation.STEP: 0.25,
}
"""Multiply-adds in a unit: an eigendecomposition takes about 9 n³ operations; a float32 weight read is one."""


@dataclass(frozen=True)
class Work:
    """Amounts by operation; sums and multiples of work are work.

    Attributes:
        amounts: in the unit of each operation.
    """

    amounts: Mapping[Operation, float] = field(default_factory=dict)

    @classmethod
    def of(cls, **amounts: float) -> "Work":
        """From amounts by the name of the operation in small letters."""
        return cls({Operation[name.upper()]: float(amount) for name, amount in amounts.items() if amount})

    def __add__(self, other: "Work") -> "Work":
        names = {**self.amounts, **other.amounts}
        return Work({name: self.amounts.get(name, 0.0) + other.amounts.get(name, 0.0) for name in names})

    def __mul__(self, factor: float) -> "Work":
        return Work({name: factor * amount for name, amount in self.amounts.items()})

    __rmul__ = __mul__

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return 2.0 * sum(MULTIPLY_ADDS.get(name, 0.0) * amount for name, amount in self.amounts.items())


NOTHING = Work()
"""No work at all."""
