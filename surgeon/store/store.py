"""The store: results by key, each committed whole or not at all."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from surgeon.errors import CorruptObjectError, NondeterminismError, StoreError
from surgeon.store.arrays import StorableArray, checked_arrays
from surgeon.store.files import is_stale, remove_tree, sync, walk_files
from surgeon.store.keys import canonical_json, digest_arrays, digest_sorted
from surgeon.store.locks import file_lock
from surgeon.store.payload import drop_payload, restore_payload
from surgeon.store.reading import REMEDY, StoredObject, read_label, read_record, read_reference
from surgeon.store.reference import Reference
from surgeon.store.root import EVICTED_FILE, is_key, open_root
from surgeon.store.writing import write_object


class Store:
    """A directory of objects: Zarr groups of arrays which are named by what they were computed from.

    Processes may share it. An object is either there in full, or there as a reference whose arrays were evicted, or
    not there; a process killed at any moment leaves nothing else behind but files in `tmp`.
    """

    def __init__(self, root: Path) -> None:
        """Opens a store, creating it if the directory is new or empty.

        Raises:
            StoreError: if the directory holds something else, or a store of another schema.
        """
        self.root = Path(root).absolute()
        self._paths = open_root(self.root)

    def lookup(self, key: str, *, label: str | None = None) -> Reference | None:
        """The reference of an object, evicted or not; None if there is no such object.

        Args:
            key: key of the object.
            label: label of the reference to return; None takes the one of the first commit (one more file to read).

        Raises:
            CorruptObjectError: if the reference cannot be read or is that of another key.
        """
        directory = self._paths.object(key)
        reference = read_reference(directory, key)
        if reference is None:
            return None
        return replace(reference, label=read_label(directory) if label is None else label)

    def has_payload(self, key: str) -> bool:
        """Whether an object is there with its arrays, that is, not evicted."""
        directory = self._paths.object(key)
        return directory.exists() and not (directory / EVICTED_FILE).exists()

    def commit(
        self,
        key: str,
        kind: str,
        arrays: Mapping[str, StorableArray],
        attributes: Mapping[str, Any],
        *,
        label: str = "",
        parameters: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        peak_memory_gib: float | None = None,
    ) -> Reference:
        """Stores an object. If there is one already, it must have the same content; if evicted, it is restored.

        Args:
            key: made by `stage_key`.
            kind: the stage.
            arrays: arrays by name; "self_attn.q_proj/A" lies in a subgroup.
            attributes: small results which belong to the content, JSON.
            label: for people.
            parameters: what was given to `stage_key`, to be kept with the object.
            seconds: how long the computation took, to be kept in the record.
            peak_memory_gib: peak resident memory of the process meanwhile, to be kept in the record.

        Raises:
            NondeterminismError: if the same key was committed with another content.
            StoreError: if there is no space.
            TypeError: if an array or an attribute has a type that cannot be stored.
            ValueError: if a name cannot be a path, or an attribute is not finite.
        """
        checked = checked_arrays(arrays)
        draft = Reference(key, kind, "", attributes=_as_json(attributes), label=label)
        plain_parameters = None if parameters is None else _as_json(parameters)
        if (existing := self.lookup(key, label=label)) is not None and self.has_payload(key):
            self._require_equal(existing, digest_arrays(checked, draft.attributes))
            return existing
        staging = self._paths.new_temporary(key)
        try:
            reference = write_object(staging, draft, checked, plain_parameters, seconds, peak_memory_gib)
            self._publish(staging, reference)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreError(
                f"No space left for {draft.describe()} in {self.root} ({error.strerror}). Nothing was committed. "
                "Free some space, evict or clean finished runs, or move the store to a larger disk."
            ) from error
        finally:
            remove_tree(staging)
        return reference

    def open(self, key: str) -> StoredObject:
        """Opens an object for reading, after counting the chunks of every array.

        Raises:
            StoreError: if there is no such object.
            EvictedError: if its arrays were dropped.
            CorruptObjectError: if it does not hold what was committed.
        """
        return StoredObject(self._paths.object(key), self._existing(key))

    def verify(self, key: str) -> None:
        """Reads all of an object and compares the digest.

        Raises:
            StoreError, EvictedError, CorruptObjectError: as `open`.
        """
        stored = self.open(key)
        digest = digest_sorted(stored.stored_arrays(), stored.attributes)
        if digest != stored.reference.digest:
            raise CorruptObjectError(
                f"The content of {stored.reference.describe()} in {self.path(key)} has the digest {digest}, but "
                f"{stored.reference.digest} was committed. {REMEDY}"
            )

    def quarantine(self, key: str) -> Path:
        """Sets an object aside, so that it is computed again. Nothing is deleted.

        Returns:
            Where it lies now, below `corrupt`.

        Raises:
            StoreError: if there is no such object.
        """
        directory = self._paths.object(key)
        with self.frozen(key):
            if not directory.exists():
                raise self._unknown(key)
            self._paths.corrupt.mkdir(exist_ok=True)
            target = self._paths.corrupt / f"{key}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            directory.rename(target)
            sync(self._paths.corrupt)
            sync(directory.parent)
        return target

    def evict(self, key: str) -> None:
        """Drops the arrays of an object and keeps its reference. Killed half-way, it leaves a valid evicted object.

        Raises:
            StoreError: if there is no such object.
        """
        with self.frozen(key):
            self._existing(key)
            drop_payload(self._paths.object(key), self._paths.new_temporary(key))

    def lock(self, key: str, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Held while an object is computed, so that no two processes compute the same one.

        Args:
            key: key of the object; look it up again once the lock is held.
            timeout_s: how long to wait; None waits as long as it takes. After it a `StoreError` is raised.
        """
        return file_lock(self._paths.locks / f"{self._paths.object(key).name}.lock", timeout_s)

    def frozen(self, key: str) -> AbstractContextManager[None]:
        """Held for a moment while no other process may publish, evict, restore or quarantine an object."""
        return file_lock(self._paths.locks / f"{self._paths.object(key).name}.change.lock")

    def entries(self) -> Iterator[Reference]:
        """The references of all objects, evicted ones too, sorted by key."""
        for prefix in sorted(item for item in self._paths.objects.iterdir() if item.is_dir()):
            for name in sorted(item.name for item in prefix.iterdir() if is_key(item.name)):
                if (reference := self.lookup(name)) is not None:
                    yield reference

    def path(self, key: str) -> Path:
        """Directory of an object, whether it is there or not."""
        return self._paths.object(key)

    def record(self, key: str) -> dict[str, Any]:
        """Volatile facts of an object: label at its commit, created, seconds, peak_memory_gib, host, surgeon.

        Records of older releases have fewer.

        Raises:
            StoreError: if there is no such object.
        """
        self._existing(key)
        return read_record(self._paths.object(key))

    def size_bytes(self, key: str) -> int:
        """Size of all files of an object.

        Raises:
            StoreError: if there is no such object.
        """
        self._existing(key)
        directory = self._paths.object(key)
        return sum((directory / path).stat().st_size for path in walk_files(directory))

    def clear_stale_tmp(self) -> list[Path]:
        """Removes what processes of this host that no longer run left in `tmp`, and returns the paths."""
        stale = [path for path in sorted(self._paths.temporary.iterdir()) if is_stale(path.name)]
        for path in stale:
            remove_tree(path)
        return stale

    def _existing(self, key: str) -> Reference:
        reference = self.lookup(key)
        if reference is None:
            raise self._unknown(key)
        return reference

    def _unknown(self, key: str) -> StoreError:
        return StoreError(f"The store {self.root} has no object {key}. Compute it first, or open the right store.")

    def _publish(self, staging: Path, reference: Reference) -> None:
        target = self._paths.object(reference.key)
        target.parent.mkdir(exist_ok=True)
        with self.frozen(reference.key):
            existing = self.lookup(reference.key)
            if existing is None:
                staging.rename(target)
                sync(target.parent)
                sync(self._paths.objects)
                return
            self._require_equal(replace(existing, label=reference.label), reference.digest)
            if not self.has_payload(reference.key):
                restore_payload(target, staging, self._paths.new_temporary(reference.key))

    def _require_equal(self, existing: Reference, digest: str) -> None:
        if existing.digest != digest:
            raise NondeterminismError(
                f"{existing.describe()} was computed twice with different results: the store has the digest "
                f"{existing.digest}, this computation gave {digest}. Use deterministic algorithms and fixed seeds; if "
                "the numerics were changed on purpose, raise the version of the stage; to keep the new result, "
                "call Store.quarantine with this key first."
            )


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What reading the value back from JSON would give, sorted, so that it is the same fresh and stored."""
    plain: dict[str, Any] = json.loads(canonical_json(value))
    return plain
