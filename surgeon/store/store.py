"""The store: results by key, each committed whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from surgeon.errors import CorruptObjectError, NondeterminismError, StoreError
from surgeon.store.arrays import StorableArray, checked_arrays
from surgeon.store.files import is_full_disk, is_stale, remove_tree, sync, walk_files
from surgeon.store.keys import canonical_json, digest_arrays, digest_sorted
from surgeon.store.locks import file_lock
from surgeon.store.payload import drop_payload, is_foreign, restore_payload
from surgeon.store.reading import StoredObject, read_parameters, read_record, read_reference
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
        self.name = str(self.root)
        self._paths = open_root(self.root)

    def lookup(self, key: str, *, label: str | None = None) -> Reference | None:
        """The reference of an object, evicted or not; None if there is no such object.

        Args:
            key: key of the object.
            label: label of the reference to return; None takes the one of the first commit (one more file to read).

        Raises:
            CorruptObjectError: if the reference is damaged. The object has then been moved aside.
        """
        try:
            return self._read(key, label)
        except CorruptObjectError as error:
            raise self._moved_aside(error) from error

    def has_payload(self, key: str) -> bool:
        """Whether an object is there with its arrays, that is, not evicted."""
        return self._is_whole(key)

    def fetch(self, key: str) -> None:
        """Makes sure that what the store has of an object lies in its directory; here it always does."""

    def quiet(self) -> "Store":
        """The same store for those who only look; it changes nothing in a bucket behind it."""
        return self

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
            self.publish(staging, reference)
        except OSError as error:
            if not is_full_disk(error):
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
            CorruptObjectError: if it does not hold what was committed. It has then been moved aside; so it is whenever
                reading an array finds damage.
        """
        reference, directory = self._existing(key), self._paths.object(key)
        opened = _inode(directory)
        return StoredObject(directory, reference, lambda error: self._moved_aside(error, opened))

    def verify(self, key: str) -> None:
        """Reads all of an object and compares the digest.

        Raises:
            StoreError, EvictedError, CorruptObjectError: as `open`.
        """
        stored, opened = self.open(key), _inode(self._paths.object(key))
        digest = digest_sorted(stored.stored_arrays(), stored.attributes)
        if digest != stored.reference.digest:
            error = CorruptObjectError(
                f"The content of {stored.reference.describe()} in {self.path(key)} has the digest {digest}, but "
                f"{stored.reference.digest} was committed.",
                key,
            )
            raise self._moved_aside(error, opened)

    def quarantine(self, key: str) -> Path:
        """Sets an object aside, so that it is computed again. Nothing is deleted.

        Returns:
            Where it lies now, below `corrupt`.

        Raises:
            StoreError: if there is no such object.
        """
        with self.frozen(key):
            if not self._paths.object(key).exists():
                raise self._unknown(key)
            return self._set_aside(key)

    def staging(self, key: str) -> Path:
        """A fresh path for the files of an object before it is published; nothing is created."""
        return self._paths.new_temporary(key)

    def publish(self, staging: Path, reference: Reference) -> None:
        """Makes a complete object visible. If there is one already, it must be equal; if evicted, it is restored.

        Args:
            staging: the object, on disk in full; what is left of it is the caller's to remove.
            reference: its reference.

        Raises:
            NondeterminismError: if the same key was committed with another content.
        """
        target = self._paths.object(reference.key)
        target.parent.mkdir(exist_ok=True)
        with self.frozen(reference.key):
            try:
                existing = self._read(reference.key, "")
            except CorruptObjectError:
                self._set_aside(reference.key)
                existing = None
            if existing is not None and existing.digest != reference.digest and is_foreign(target):
                # Only its reference came, from a machine that may round in another way; its arrays were never here.
                trash = self.staging(reference.key)
                target.rename(trash)
                remove_tree(trash)
                existing = None
            if existing is None:
                staging.rename(target)
                sync(target.parent)
                sync(self._paths.objects)
                return
            self._require_equal(replace(existing, label=reference.label), reference.digest)
            if not self._is_whole(reference.key) and not (staging / EVICTED_FILE).exists():
                restore_payload(target, staging, self._paths.new_temporary(reference.key))

    def evict(self, key: str) -> None:
        """Drops the arrays of an object and keeps its reference. Killed half-way, it leaves a valid evicted object.

        Raises:
            StoreError: if there is no such object.
        """
        self._existing(key)
        with self.frozen(key):
            drop_payload(self._paths.object(key), self._paths.new_temporary(key))

    def delete(self, key: str) -> None:
        """Removes an object, reference and all. Killed half-way, it leaves the object whole or not there.

        Raises:
            StoreError: if there is no such object.
        """
        directory, trash = self._paths.object(key), self._paths.new_temporary(key)
        with self.frozen(key):
            if not directory.exists():
                raise self._unknown(key)
            directory.rename(trash)
            sync(directory.parent)
        remove_tree(trash)

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

    def all_keys(self) -> Iterator[str]:
        """The keys of all objects, evicted ones too, sorted; nothing is read."""
        for prefix in sorted(item for item in self._paths.objects.iterdir() if item.is_dir()):
            yield from sorted(item.name for item in prefix.iterdir() if is_key(item.name))

    def entries(self) -> Iterator[Reference]:
        """The references of all objects, evicted ones too, sorted by key."""
        for key in self.all_keys():
            if (reference := self.lookup(key)) is not None:
                yield reference

    def path(self, key: str) -> Path:
        """Directory of an object, whether it is there or not."""
        return self._paths.object(key)

    def record(self, key: str) -> dict[str, Any]:
        """Volatile facts of an object: label at its commit, created, seconds, peak_memory_gib, host, surgeon.

        Records of older releases have fewer; one that cannot be read is empty.

        Raises:
            StoreError: if there is no such object.
        """
        self._existing(key)
        return read_record(self._paths.object(key))

    def parameters(self, key: str) -> dict[str, Any]:
        """What was given to `commit` as the parameters of an object; empty if nothing was.

        Raises:
            StoreError: if there is no such object.
        """
        self._existing(key)
        return read_parameters(self._paths.object(key))

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

    def _is_whole(self, key: str) -> bool:
        """Whether an object's directory is there with its arrays."""
        directory = self._paths.object(key)
        return directory.exists() and not (directory / EVICTED_FILE).exists()

    def _existing(self, key: str) -> Reference:
        reference = self.lookup(key)
        if reference is None:
            raise self._unknown(key)
        return reference

    def _unknown(self, key: str) -> StoreError:
        return StoreError(f"The store {self.name} has no object {key}. Compute it first, or open the right store.")

    def _read(self, key: str, label: str | None) -> Reference | None:
        directory = self._paths.object(key)
        reference = read_reference(directory, key)
        if reference is None:
            return None
        return replace(reference, label=str(read_record(directory).get("label", "")) if label is None else label)

    def _moved_aside(self, error: CorruptObjectError, opened: int | None = None) -> CorruptObjectError:
        """Moves a damaged object aside, unless another process has done so, and returns the error to raise.

        Args:
            error: says what is damaged.
            opened: inode of the directory that was read; None looks whether its reference still is damaged.
        """
        directory = self._paths.object(error.key)
        try:
            with self.frozen(error.key):
                if not self._is_still_damaged(error.key, opened):
                    return error
                target = self._set_aside(error.key)
        except OSError as failed:
            return CorruptObjectError(
                f"{error} It cannot be moved aside ({failed}); move {directory} away and run again.", error.key
            )
        return CorruptObjectError(f"{error} It was moved to {target}.", error.key)

    def _is_still_damaged(self, key: str, opened: int | None) -> bool:
        if opened is not None:
            return _inode(self._paths.object(key)) == opened
        try:
            self._read(key, "")
        except CorruptObjectError:
            return True
        return False

    def _set_aside(self, key: str) -> Path:
        """Moves an object below `corrupt`; its lock is held."""
        directory = self._paths.object(key)
        self._paths.corrupt.mkdir(exist_ok=True)
        target = self._paths.corrupt / f"{key}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        directory.rename(target)
        sync(self._paths.corrupt)
        sync(directory.parent)
        return target

    def _require_equal(self, existing: Reference, digest: str) -> None:
        if existing.digest != digest:
            raise NondeterminismError(
                f"{existing.describe()} was computed twice with different results: the store has the digest "
                f"{existing.digest}, this computation gave {digest}. Use deterministic algorithms and fixed seeds; if "
                "the numerics were changed on purpose, raise the version of the stage; to keep the new result, "
                "call Store.quarantine with this key first."
            )


def _inode(directory: Path) -> int | None:
    """Tells a directory from another that takes its place; None if there is none."""
    try:
        return directory.stat().st_ino
    except FileNotFoundError:
        return None


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What reading the value back from JSON would give, sorted, so that it is the same fresh and stored."""
    plain: dict[str, Any] = json.loads(canonical_json(value))
    return plain
