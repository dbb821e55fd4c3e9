"""Symmetric matrices as one triangle: half the space, and exactly symmetric when read.

The rows of the lower triangle, diagonal included, follow each other: ``M[0,0], M[1,0], M[1,1], M[2,0], ...``. The
vector has ``n (n + 1) / 2`` entries.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STRIP = 16
"""Rows which are mirrored at once: as columns they are 64 bytes wide, a line of the cache."""


def triangle_size(n: int) -> int:
    """Number of entries of the lower triangle of an `[n, n]` matrix, diagonal included."""
    return n * (n + 1) // 2


def triangle_side(size: int) -> int:
    """The `n` for which the lower triangle has `size` entries.

    Raises:
        ValueError: if there is none.
    """
    n = (math.isqrt(8 * size + 1) - 1) // 2
    if triangle_size(n) != size:
        raise ValueError(f"A packed triangle has n (n + 1) / 2 entries, but got {size}; the nearest n is {n}.")
    return n


def pack_symmetric(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Copies the lower triangle of a matrix into a vector; what lies above the diagonal is not read.

    Args:
        matrix: `[n, n]` float32.

    Returns:
        `[n (n + 1) / 2]` float32.

    Raises:
        ValueError: if the matrix is not square.
        TypeError: if it is not float32.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"Only a square matrix can be packed, but the shape is {list(matrix.shape)}.")
    if matrix.dtype != np.float32:
        raise TypeError(f"Only float32 matrices are packed, but the dtype is {matrix.dtype}. Convert it first.")
    n = matrix.shape[0]
    packed = np.empty(triangle_size(n), dtype=np.float32)
    start = 0
    for row in range(n):
        packed[start : start + row + 1] = matrix[row, : row + 1]
        start += row + 1
    return packed


def unpack_symmetric(packed: NDArray[np.float32]) -> NDArray[np.float32]:
    """The full matrix of a packed triangle, mirrored, bit for bit symmetric.

    Args:
        packed: `[n (n + 1) / 2]` float32.

    Returns:
        `[n, n]` float32.

    Raises:
        ValueError: if the length is not that of a triangle.
    """
    n = triangle_side(packed.size)
    matrix = np.empty((n, n), dtype=np.float32)
    lower = np.tri(min(_STRIP, n), dtype=np.bool_)
    start = 0
    for top in range(0, n, _STRIP):
        rows = slice(top, min(top + _STRIP, n))
        for row in range(rows.start, rows.stop):
            matrix[row, : row + 1] = packed[start : start + row + 1]
            start += row + 1
        # Mirrored at once, while the strip is in the cache.
        matrix[:top, rows] = matrix[rows, :top].T
        diagonal = matrix[rows, rows]
        # A sum of triangles would turn -0.0 into 0.0 and spread NaN; a choice keeps the bits.
        side = diagonal.shape[0]
        matrix[rows, rows] = np.where(lower[:side, :side], diagonal, diagonal.T)
    return matrix


@dataclass(frozen=True, eq=False)
class SymmetricMatrix:
    """A symmetric matrix held as its lower triangle, for storing.

    Attributes:
        packed: `[n (n + 1) / 2]` float32, rows of the lower triangle.
    """

    packed: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.packed.ndim != 1 or self.packed.dtype != np.float32:
            raise ValueError(
                f"A packed triangle is a float32 vector, but got {self.packed.dtype}{list(self.packed.shape)}. "
                "Use SymmetricMatrix.from_full for a full matrix."
            )
        triangle_side(self.packed.size)

    @classmethod
    def from_full(cls, matrix: NDArray[np.float32]) -> "SymmetricMatrix":
        """Packs the lower triangle of an `[n, n]` float32 matrix; what lies above the diagonal is not read."""
        return cls(pack_symmetric(matrix))

    @property
    def n(self) -> int:
        """Side of the matrix."""
        return triangle_side(self.packed.size)

    def to_full(self) -> NDArray[np.float32]:
        """The `[n, n]` float32 matrix, exactly symmetric: the bits a reader of the store gets."""
        return unpack_symmetric(self.packed)
