"""What is removed as one: coupled units, whole rows or columns, groups in an N:M pattern, or single weights."""

import re
from dataclasses import dataclass
from typing import TypeAlias

from surgeon.choices import Structure
from surgeon.errors import ParameterError


@dataclass(frozen=True)
class NMPattern:
    """N of every M consecutive inputs of a row are zero: 2:4 for sparse tensor cores.

    Attributes:
        n: zeros of each group.
        m: weights of each group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ParameterError(
                f"structure {self}: N of every M weights of a group go, so N must be at least 1 and below M; "
                "for example 2:4 or 4:8"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Removed fraction when every group has its zeros."""
        return self.n / self.m


Granularity: TypeAlias = Structure | NMPattern


def parse_granularity(text: str) -> Granularity:
    """Reads "units", "rows", "columns", "rows-and-columns", "weights" or "N:M".

    Raises:
        ParameterError: naming what is allowed.
    """
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        return NMPattern(int(found[1]), int(found[2]))
    try:
        return Structure(text)
    except ValueError as error:
        raise ParameterError(f"structure {text!r}: allowed: {', '.join(Structure)}, or N:M such as 2:4") from error


def is_structured(granularity: Granularity) -> bool:
    """Whether whole rows, columns or units go, rather than weights."""
    return isinstance(granularity, Structure) and granularity is not Structure.WEIGHTS
