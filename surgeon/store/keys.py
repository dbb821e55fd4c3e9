"""Keys of stages and digests of contents: SHA-256 of one canonical form.

A *key* names the work: everything a result depends on, before it is computed. A *digest* names the content: what came
out. Digests of inputs enter the keys of the stages above, so equal content gives equal keys whatever produced it.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.store.arrays import StorableArray, describe_array, stored_form

SCHEMA = 2
"""Version of keys and of the layout on disk; part of every key."""

_FILE_BLOCK_BYTES = 1 << 22


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, shortest round-trip floats.

    Args:
        value: None, bool, int, float, str, `StrEnum`, path, and lists, tuples and mappings of these. `1` and `1.0`
            stay different, so parameters should be converted to their declared type first.

    Raises:
        TypeError: for any other type; the message names the path to the value.
        ValueError: for NaN and infinities, which JSON does not have.
    """
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: object, path: str) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, StrEnum):
        return value.value
    if type(value) in (str, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}: canonical JSON has no NaN and no infinity. Leave it out or use None.")
        return float(value)
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {_plain_name(name, path): _plain(item, f"{path}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{path} has the type {type(value).__module__}.{type(value).__qualname__}, which has no canonical JSON. "
        "Allowed are None, bool, int, float, str, StrEnum, Path, and lists, tuples and mappings of these."
    )


def _plain_name(name: object, path: str) -> str:
    if isinstance(name, StrEnum):
        return name.value
    if type(name) is str:
        return name
    raise TypeError(f"{path} has the key {name!r} of type {type(name).__qualname__}; only str and StrEnum are allowed.")


def stage_key(
    kind: str,
    version: int,
    parameters: Mapping[str, object],
    inputs: Mapping[str, str | Sequence[str]],
    device: str,
    dtype: str,
) -> str:
    """The key of one piece of work. Labels, such as the number of the shot, do not belong in it.

    Args:
        kind: name of the stage, such as "costs".
        version: version of the numerics of the stage.
        parameters: those parameters which this stage reads, no others.
        inputs: content digests of the inputs, by role; the order within a sequence counts.
        device: kind of device, such as "cpu" or "cuda", without an index.
        dtype: dtype the stage computes in.

    Returns:
        64 hexadecimal digits.
    """
    return digest_text(
        canonical_json(
            {
                "schema": SCHEMA,
                "kind": kind,
                "version": version,
                "parameters": parameters,
                "inputs": {role: item if isinstance(item, str) else list(item) for role, item in inputs.items()},
                "device": device,
                "dtype": dtype,
            }
        )
    )


def digest_text(text: str) -> str:
    """SHA-256 of the UTF-8 form of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: str | PurePath) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (a pure path has no open)
        while block := file.read(_FILE_BLOCK_BYTES):
            sha.update(block)
    return sha.hexdigest()


def digest_arrays(arrays: Mapping[str, StorableArray], attributes: Mapping[str, object]) -> str:
    """Digest of a content: names, dtypes, shapes and bytes of all arrays, and the attributes.

    Args:
        arrays: arrays by name; their order and their strides do not matter. Of a symmetric matrix the stored triangle
            counts.
        attributes: small results which belong to the content.

    Returns:
        64 hexadecimal digits.
    """
    return digest_sorted(((name, arrays[name]) for name in sorted(arrays)), attributes)


def digest_sorted(arrays: Iterable[tuple[str, StorableArray]], attributes: Mapping[str, object]) -> str:
    """As `digest_arrays`, for arrays which come one at a time (so that only one is in memory), sorted by name.

    Raises:
        ValueError: if the names are not in strictly increasing order.
    """
    sha = hashlib.sha256()
    previous: str | None = None
    for name, array in arrays:
        if previous is not None and name <= previous:
            raise ValueError(f"Arrays must come sorted by name, but {name!r} came after {previous!r}.")
        previous = name
        sha.update(canonical_json([name, describe_array(array)]).encode() + b"\n")
        sha.update(_byte_view(stored_form(array)))
    sha.update(b"\n" + canonical_json(attributes).encode())
    return sha.hexdigest()


def _byte_view(array: NDArray[Any]) -> memoryview:
    """The bytes of an array in C order, copied only if it is not contiguous."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data
