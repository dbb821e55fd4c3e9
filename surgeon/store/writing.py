"""Writes one object into a directory of its own."""

import json
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

import surgeon
from surgeon.store.arrays import StorableArray, chunk_shape, describe_array, stored_attributes, stored_form
from surgeon.store.files import sync_tree, write_file
from surgeon.store.keys import SCHEMA, canonical_json, digest_arrays, digest_text
from surgeon.store.reference import Reference
from surgeon.store.root import RECORD_FILE


def write_object(
    directory: Path,
    reference: Reference,
    arrays: Mapping[str, StorableArray],
    parameters: Mapping[str, Any] | None,
    seconds: float | None,
    peak_memory_gib: float | None = None,
) -> Reference:
    """Writes arrays, reference and record, and waits until all of it is on disk.

    All files but the record are the same bytes whenever the same content is written.

    Args:
        directory: a new directory.
        reference: all but digest and summaries, which are filled in here.
        arrays: checked arrays, sorted by name.
        parameters: what the object was computed with, JSON.
        seconds: how long the computation took.
        peak_memory_gib: peak resident memory of the process meanwhile.

    Returns:
        The complete reference.
    """
    directory.mkdir(parents=True)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # Hashing releases the interpreter lock, so it costs no time beside the writing.
        digest = pool.submit(digest_arrays, arrays, reference.attributes)
        _write_arrays(directory, arrays)
        complete = Reference(
            key=reference.key,
            kind=reference.kind,
            digest=digest.result(),
            arrays={name: describe_array(array) for name, array in arrays.items()},
            attributes=reference.attributes,
            label=reference.label,
        )
    _write_reference(directory, complete, parameters)
    write_record(directory, complete.label, {"seconds": seconds, "peak_memory_gib": peak_memory_gib})
    sync_tree(directory)
    return complete


class _PrivateDirectory(LocalStore):
    """A directory that one process writes to.

    Zarr makes files that must be new by hard links, which not every file system has; here nobody else makes any.
    """

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Writes a file unless it is there."""
        if not await self.exists(key):
            await self.set(key, value)


def _write_arrays(directory: Path, arrays: Mapping[str, StorableArray]) -> None:
    group = zarr.create_group(_PrivateDirectory(directory), zarr_format=3)
    folders = {"/".join(name.split("/")[:depth]) for name in arrays for depth in range(1, name.count("/") + 1)}
    for folder in sorted(folders):
        group.create_group(folder)
    for name, array in arrays.items():
        values = stored_form(array)
        target = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=chunk_shape(values.shape),
            serializer=BytesCodec(),
            # zstd and blosc may return wrong values for a flipped byte without a word; crc32c never does.
            compressors=[Crc32cCodec()],
            filters=None,
            attributes=dict(stored_attributes(array)),
            config={"write_empty_chunks": True},
        )
        if values.size:
            target[...] = values


def _write_reference(directory: Path, reference: Reference, parameters: Mapping[str, Any] | None) -> None:
    stored = {"schema": SCHEMA, **reference.to_json(), "parameters": parameters}
    # The label says for whom the work was done first, so it belongs to the record.
    del stored["label"]
    stored["checksum"] = digest_text(canonical_json(stored))
    zarr.open_group(directory, mode="r+", zarr_format=3, use_consolidated=False).update_attributes(
        {"reference": stored}
    )


def write_record(directory: Path, label: str, facts: Mapping[str, Any]) -> None:
    """Writes for whom, when, where and by which release an object was made, and what else is known of that."""
    record = {
        "label": label,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "host": platform.node(),
        "surgeon": surgeon.__version__,
    }
    write_file(directory / RECORD_FILE, json.dumps(record, indent=2) + "\n")
