"""What can be stored as an array, and how it is laid out on disk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from surgeon.store.symmetric import SymmetricMatrix

CHUNK_SIDE = 2048
CHUNK_ELEMENTS = CHUNK_SIDE * CHUNK_SIDE

DTYPES = frozenset(np.dtype(letter).name for letter in "?bhilqBHILQefdFD")
"""The dtypes which the Zarr v3 specification has; others could not be read by other programs."""

RESERVED_NAMES = frozenset({"zarr.json", "record.json", "evicted", "partial"})


class Layout(StrEnum):
    """How the entries of an array lie in its Zarr array."""

    PLAIN = "plain"
    LOWER_TRIANGLE = "lower-triangle"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, eq=False)
class BFloat16Array:
    """bfloat16 numbers as their bits, for NumPy has no bfloat16.

    Attributes:
        bits: uint16, any shape; a number's sign, exponent and upper seven bits of the mantissa.
    """

    bits: NDArray[np.uint16]

    def __post_init__(self) -> None:
        if self.bits.dtype != np.uint16:
            raise TypeError(
                f"bfloat16 numbers are given as uint16 bits, but the dtype is {self.bits.dtype}. "
                "With PyTorch: tensor.view(torch.uint16).numpy()."
            )


StorableArray: TypeAlias = NDArray[Any] | SymmetricMatrix | BFloat16Array
"""What can be committed."""

ReadArray: TypeAlias = NDArray[Any] | BFloat16Array
"""What is read back: a symmetric matrix comes back in full."""


def checked_arrays(arrays: Mapping[str, StorableArray]) -> dict[str, StorableArray]:
    """Arrays sorted by name, after checking names and dtypes, in native byte order.

    Raises:
        TypeError: for what is no array or has a dtype that cannot be stored.
        ValueError: for a name that cannot be a path within a group.
    """
    for name in arrays:
        check_name(name)
    for name in arrays:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            if (outer := "/".join(parts[:depth])) in arrays:
                raise ValueError(f"The array {name!r} would lie within the array {outer!r}; rename one of them.")
    return {name: _checked_array(name, arrays[name]) for name in sorted(arrays)}


def check_name(name: str) -> None:
    """Checks that a name can be a path of Zarr nodes, such as "self_attn.q_proj/A".

    Raises:
        ValueError: if it cannot.
    """
    parts = name.split("/")
    wrong = [
        part for part in parts if not part or not part.strip(".") or part.startswith("__") or part in RESERVED_NAMES
    ]
    if wrong or "\\" in name or not name.isprintable():
        raise ValueError(
            f"{name!r} cannot name an array or a group: parts between slashes must not be empty, '.' or '..', must not "
            f"start with '__', contain a backslash or a control character, or be one of {sorted(RESERVED_NAMES)}."
        )


def _checked_array(name: str, array: StorableArray) -> StorableArray:
    if isinstance(array, SymmetricMatrix | BFloat16Array):
        return array
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{name!r} is a {type(array).__qualname__}; only numpy arrays, SymmetricMatrix and BFloat16Array fit."
        )
    if array.dtype.name not in DTYPES:
        raise TypeError(f"{name!r} has the dtype {array.dtype}, which cannot be stored; allowed: {sorted(DTYPES)}.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def stored_form(array: StorableArray) -> NDArray[Any]:
    """The array as it lies in Zarr: a packed triangle, the bits of bfloat16, or the array itself."""
    if isinstance(array, SymmetricMatrix):
        return array.packed
    if isinstance(array, BFloat16Array):
        return array.bits
    return array


def stored_attributes(array: StorableArray) -> dict[str, str | int]:
    """The attributes of the Zarr array which say how to read it; none for a plain array."""
    if isinstance(array, SymmetricMatrix):
        return {"layout": Layout.LOWER_TRIANGLE.value, "n": array.n}
    if isinstance(array, BFloat16Array):
        return {"layout": Layout.BFLOAT16.value}
    return {}


def describe_array(array: StorableArray) -> str:
    """Summary of dtype, shape and layout, such as "float32[576,576] symmetric"."""
    if isinstance(array, SymmetricMatrix):
        return summary("float32", (array.n, array.n), Layout.LOWER_TRIANGLE)
    if isinstance(array, BFloat16Array):
        return summary("bfloat16", array.bits.shape, Layout.BFLOAT16)
    return summary(array.dtype.name, array.shape, Layout.PLAIN)


def summary(dtype: str, shape: tuple[int, ...], layout: Layout) -> str:
    """Summary of an array from its parts; `shape` is that of the full matrix."""
    sides = ",".join(str(side) for side in shape)
    return f"{dtype}[{sides}]" + (" symmetric" if layout is Layout.LOWER_TRIANGLE else "")


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the chunks of an array: nearly equal chunks of at most `CHUNK_ELEMENTS`, last axes first.

    A vector may use all elements of a chunk along its one axis; otherwise a side is at most `CHUNK_SIDE`. Equal chunks
    matter because Zarr stores those at the edge in full: 2304 = 2 x 1152 wastes nothing, 2048 + 256 would.
    """
    limit = CHUNK_ELEMENTS if len(shape) == 1 else CHUNK_SIDE
    budget = CHUNK_ELEMENTS
    sides: list[int] = []
    for side in reversed(shape):
        largest = max(1, min(limit, budget))
        n_chunks = max(1, math.ceil(side / largest))
        sides.append(max(1, math.ceil(side / n_chunks)))
        budget //= sides[-1]
    return tuple(reversed(sides))
