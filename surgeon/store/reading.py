"""Reads stored objects, trusting nothing.

Zarr reads a chunk that is missing as zeros and says nothing, so chunks are counted before and after.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from surgeon.errors import CorruptObjectError, EvictedError
from surgeon.store.arrays import BFloat16Array, Layout, ReadArray, StorableArray, summary
from surgeon.store.files import walk_files
from surgeon.store.keys import SCHEMA, canonical_json, digest_text
from surgeon.store.reference import Reference
from surgeon.store.root import EVICTED_FILE, GROUP_FILE, RECORD_FILE
from surgeon.store.symmetric import SymmetricMatrix

_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, FileNotFoundError)
"""What Zarr raises for damaged files; a lack of memory or of permission is no damage."""

_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class ArrayInfo:
    """What is known of a stored array without reading it.

    Attributes:
        name: path within the object.
        dtype: such as "float32" or "bfloat16".
        shape: of the array as it is read; `[n, n]` for a symmetric matrix.
        layout: how the entries lie on disk.
        n_chunks: number of chunk files.
        chunk_bytes: size of each chunk file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    n_chunks: int
    chunk_bytes: int


def read_reference(directory: Path, key: str) -> Reference | None:
    """The reference in an object's directory, without label; None if there is no object.

    Raises:
        CorruptObjectError: if it cannot be read, is not what was written, or is that of another key.
    """
    path = directory / GROUP_FILE
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8"))["attributes"]["reference"])
        checksum = stored.pop("checksum")
        is_whole = checksum == digest_text(canonical_json(stored))
        schema = stored.pop("schema")
        stored.pop("parameters")
        reference = Reference.from_json({**stored, "label": ""})
    except FileNotFoundError as error:
        if not directory.exists():
            return None
        raise CorruptObjectError(f"The object {key} has no {GROUP_FILE} in {directory}.", key) from error
    except _DAMAGE as error:
        raise CorruptObjectError(f"The reference of object {key} in {path} cannot be read: {error}.", key) from error
    if (schema, reference.key) != (SCHEMA, key):
        raise CorruptObjectError(
            f"{path} should hold key {key} of schema {SCHEMA}, but holds {reference.key} of schema {schema}.", key
        )
    if not is_whole:
        raise CorruptObjectError(f"The reference of object {key} in {path} is not what was written there.", key)
    return reference


def read_parameters(directory: Path) -> dict[str, Any]:
    """What an object was computed with; empty if that was not said. Its reference has been read, and so checked."""
    stored = json.loads((directory / GROUP_FILE).read_text(encoding="utf-8"))
    return dict(stored["attributes"]["reference"]["parameters"] or {})


def read_record(directory: Path) -> dict[str, Any]:
    """The volatile facts of an object: label at first commit, created, seconds, host, version.

    Nothing that is computed depends on them, so they are never worth an error: empty if they cannot be read.
    """
    try:
        return dict(json.loads((directory / RECORD_FILE).read_text(encoding="utf-8")))
    except _DAMAGE:
        return {}


class StoredObject:
    """A committed object, open for reading. Made by `Store.open`."""

    def __init__(
        self,
        directory: Path,
        reference: Reference,
        damaged: Callable[[CorruptObjectError], CorruptObjectError] = lambda error: error,
    ) -> None:
        """Opens the group and counts the chunks of every array.

        Args:
            directory: of the object.
            reference: what was committed.
            damaged: told of damage that was found; returns the error to raise.

        Raises:
            CorruptObjectError: if metadata cannot be read, differ from the reference, or chunks are missing.
            EvictedError: if the payload was dropped.
        """
        self._directory = directory
        self.reference = reference
        self._damaged = damaged
        self._require_payload()
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._infos: dict[str, ArrayInfo] = {}
        self._identities: dict[str, tuple[int, int]] = {}
        for name in sorted(reference.arrays):
            self._open_array(name)
            self._check_chunks(name)

    @property
    def attributes(self) -> dict[str, Any]:
        """The small results which belong to the content."""
        return self.reference.attributes

    def names(self) -> list[str]:
        """Names of all arrays, sorted."""
        return list(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def array_info(self, name: str) -> ArrayInfo:
        """Dtype, shape and layout of an array.

        Raises:
            KeyError: if there is no such array.
        """
        if name not in self._infos:
            raise KeyError(f"{self.reference.describe()} has no array {name!r}; it has {self.names()}.")
        return self._infos[name]

    def __getitem__(self, name: str) -> ReadArray:
        """Reads an array: a symmetric matrix in full, bfloat16 as `BFloat16Array`, anything else as it was given.

        Raises:
            KeyError: if there is no such array.
            CorruptObjectError: if a checksum does not match or a chunk is missing.
            EvictedError: if the payload was dropped since the object was opened.
        """
        stored = self._read(name)
        return stored.to_full() if isinstance(stored, SymmetricMatrix) else stored

    def array(self, name: str) -> NDArray[Any]:
        """As `self[name]`, for an array which NumPy has a dtype for.

        Raises:
            TypeError: if the array is bfloat16.
        """
        read = self[name]
        if isinstance(read, BFloat16Array):
            raise TypeError(f"{name!r} of {self.reference.describe()} is bfloat16; read it with [{name!r}].bits.")
        return read

    def as_stored(self, name: str) -> StorableArray:
        """Reads an array in the form it was committed in: of a symmetric matrix the triangle.

        Raises:
            KeyError, CorruptObjectError, EvictedError: as `self[name]`.
        """
        return self._read(name)

    def stored_arrays(self) -> Iterator[tuple[str, StorableArray]]:
        """Reads all arrays in the form they were committed in, one at a time, sorted by name."""
        for name in self._infos:
            yield name, self._read(name)

    def _read(self, name: str) -> StorableArray:
        layout = self.array_info(name).layout
        try:
            values = np.asarray(self._arrays[name][...])
        except _DAMAGE as error:
            self._require_payload()
            raise self._corrupt(name, f"cannot be decoded: {error}") from error
        # An eviction meanwhile would have turned chunks into zeros, even if they are back by now.
        self._check_chunks(name)
        if _identity(self._directory / name) != self._identities[name]:
            raise EvictedError(
                f"{self.reference.describe()} was evicted and restored while it was read. Open it again."
            )
        if layout is Layout.LOWER_TRIANGLE:
            return SymmetricMatrix(values)
        return BFloat16Array(values) if layout is Layout.BFLOAT16 else values

    def _open_array(self, name: str) -> None:
        try:
            self._identities[name] = _identity(self._directory / name)
            array = zarr.open_array(self._directory / name, mode="r", zarr_format=3)
            info = _array_info(name, array)
        except _DAMAGE as error:
            self._require_payload()
            raise self._corrupt(name, f"has metadata that cannot be read: {error}") from error
        found, expected = summary(info.dtype, info.shape, info.layout), self.reference.arrays[name]
        if found != expected:
            raise self._corrupt(name, f"should be {expected}, but its metadata say {found}")
        self._arrays[name], self._infos[name] = array, info

    def _check_chunks(self, name: str) -> None:
        info = self._infos[name]
        folder = self._directory / name
        counts = self._arrays[name].cdata_shape
        expected = {"/".join(("c", *map(str, index))) for index in itertools.product(*map(range, counts))}
        found = {path.as_posix() for path in walk_files(folder)} - {GROUP_FILE}
        if found != expected:
            self._require_payload()
            missing, unknown = sorted(expected - found), sorted(found - expected)
            raise self._corrupt(
                name,
                f"should have {info.n_chunks} chunk files, but {len(found)} were found "
                f"(missing: {missing[:3]}, unknown: {unknown[:3]})",
            )
        for chunk in sorted(expected):
            try:
                size = (folder / chunk).stat().st_size
            except FileNotFoundError:
                self._require_payload()
                raise self._corrupt(name, f"lost its chunk file {chunk} while it was being checked") from None
            if size != info.chunk_bytes:
                raise self._corrupt(name, f"has the chunk file {chunk} of {size} bytes instead of {info.chunk_bytes}")

    def _require_payload(self) -> None:
        if (self._directory / EVICTED_FILE).exists():
            raise EvictedError(
                f"The arrays of {self.reference.describe()} were dropped by the retention policy; only the reference "
                "remains. Compute the object again (committing it restores the arrays), or keep more: keep = all."
            )

    def _corrupt(self, name: str, problem: str) -> CorruptObjectError:
        where = f"The array {name!r} of {self.reference.describe()} in {self._directory}"
        return self._damaged(CorruptObjectError(f"{where} {problem}.", self.reference.key))


def _identity(folder: Path) -> tuple[int, int]:
    """Differs between a directory and another one put in its place."""
    status = folder.stat()
    return status.st_ino, status.st_ctime_ns


def _array_info(name: str, array: "zarr.Array[Any]") -> ArrayInfo:
    layout = Layout(str(array.attrs.get("layout", Layout.PLAIN.value)))
    dtype, shape = str(array.dtype.name), array.shape
    if layout is Layout.LOWER_TRIANGLE:
        n = int(str(array.attrs["n"]))
        if shape != (n * (n + 1) // 2,):
            raise ValueError(f"the triangle of a matrix of side {n} cannot have the shape {list(shape)}")
        shape = (n, n)
    elif layout is Layout.BFLOAT16:
        dtype = "bfloat16"
    chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize + _CHECKSUM_BYTES
    return ArrayInfo(name, dtype, shape, layout, math.prod(array.cdata_shape), chunk_bytes)
