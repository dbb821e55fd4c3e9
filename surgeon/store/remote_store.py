"""A store in a bucket: a local store does the work, and the bucket has what every machine sees.

What is committed goes up before it appears in the local store, so the local store has nothing that the bucket has
never had. What is only in the bucket is fetched when it is opened, and its digest is checked on the way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgeon.errors import CorruptObjectError, EvictedError, NondeterminismError
from surgeon.store.files import remove_tree, sync_tree, write_file
from surgeon.store.keys import digest_sorted
from surgeon.store.payload import is_foreign, write_foreign_marker
from surgeon.store.reading import StoredObject, read_reference
from surgeon.store.reference import Reference
from surgeon.store.remote_bucket import Bucket
from surgeon.store.remote_lease import LeaseTakenError, lease
from surgeon.store.remote_objects import BucketObjects, Marker, lock_path, write_reference
from surgeon.store.root import EVICTED_FILE
from surgeon.store.store import Store


class RemoteStore(Store):
    """A local store with a bucket behind it.

    Args:
        root: of the local store; several buckets may share it.
        bucket: what all machines see.
        is_quiet: whether nothing may change in the bucket.
    """

    def __init__(self, root: Path, bucket: Bucket, *, is_quiet: bool = False) -> None:
        super().__init__(root)
        self.name = bucket.url
        self._bucket = bucket
        self._remote = BucketObjects(bucket)
        self._is_quiet = is_quiet

    def quiet(self) -> "RemoteStore":
        """The same store for those who only look."""
        return RemoteStore(self.root, self._bucket, is_quiet=True)

    def lookup(self, key: str, *, label: str | None = None) -> Reference | None:
        """The reference of an object, from here or from the bucket.

        What lies here and never was in this bucket goes up on the way: other machines are told of it by key.
        """
        found = super().lookup(key, label=label)
        if found is None:
            return super().lookup(key, label=label) if self._adopt(key) else None
        if not self._is_quiet and not self._shared(key).exists():
            self._share(found, has_arrays=self._is_whole(key))
        return found

    def has_payload(self, key: str) -> bool:
        """Whether an object is there with its arrays, for other machines too."""
        reference = self.lookup(key, label="")
        if reference is None:
            return False
        is_here = self._is_whole(key)
        if is_here and (self._is_quiet or not reference.arrays):
            return True
        if self._remote.has_arrays(key, reference.digest):
            return True
        if is_here:
            # Another machine dropped them; whoever is given the reference will want them.
            self._share(reference, has_arrays=True)
        return is_here

    def open(self, key: str) -> StoredObject:
        """Opens an object for reading, after fetching it if need be."""
        self.fetch(key)
        return super().open(key)

    def fetch(self, key: str) -> None:
        """Gets the arrays of an object from the bucket, checked, if they are not here.

        Raises:
            CorruptObjectError: what the bucket holds is not what was committed. It has then been set aside there.
        """
        reference = self.lookup(key)
        if reference is None or self._is_whole(key):
            return
        with suppress(EvictedError), self._downloaded(reference) as staging:
            super().publish(staging, reference)

    def verify(self, key: str) -> None:
        """Reads all of an object, here and in the bucket, and compares the digest."""
        if self._is_whole(key):
            super().verify(key)
        reference = self._existing(key)
        with self._downloaded(reference):
            pass

    def publish(self, staging: Path, reference: Reference) -> None:
        """Puts a complete object into the bucket, then makes it visible here."""
        if not (staging / EVICTED_FILE).exists():
            self._share(reference, has_arrays=True, directory=staging)
        super().publish(staging, reference)

    def evict(self, key: str) -> None:
        """Drops the arrays of an object, here and in the bucket.

        While another process has the object locked, for it computes it again, those in the bucket stay.
        """
        reference = self._existing(key)
        super().evict(key)
        with suppress(LeaseTakenError), lease(self._bucket, lock_path(key), timeout_s=0):
            self._remote.evict(key, reference.digest)

    def delete(self, key: str) -> None:
        """Removes an object, here and in the bucket."""
        self._existing(key)
        super().delete(key)
        self._remote.delete(key)
        self._shared(key).unlink(missing_ok=True)

    def quarantine(self, key: str) -> Path:
        """Sets an object aside, here and in the bucket."""
        self._existing(key)
        place = super().quarantine(key)
        self._remote.set_aside(key)
        self._shared(key).unlink(missing_ok=True)
        return place

    @contextmanager
    def lock(self, key: str, timeout_s: float | None = None) -> Iterator[None]:
        """Held while an object is computed, among the processes of this machine and then among machines."""
        with super().lock(key, timeout_s), lease(self._bucket, lock_path(key), timeout_s):
            yield

    def all_keys(self) -> Iterator[str]:
        """The keys of all objects, here and in the bucket."""
        yield from sorted({*super().all_keys(), *self._remote.all_keys()})

    def size_bytes(self, key: str) -> int:
        """Size of all files of an object, wherever they lie."""
        here = super().size_bytes(key)
        if self._is_whole(key) or not self.has_payload(key) or (marker := self._remote.marker(key)) is None:
            return here
        return here + sum(marker.files.values())

    def _adopt(self, key: str) -> bool:
        """Takes the reference of an object of the bucket over, without its arrays; whether there was one."""
        marker = self._remote.marker(key)
        if marker is None:
            return False
        staging = self.staging(key)
        try:
            write_reference(marker, staging)
            reference = self._checked(key, marker, lambda: read_reference(staging, key))
            if reference.arrays:
                write_foreign_marker(staging)
            sync_tree(staging)
            super().publish(staging, reference)
        finally:
            remove_tree(staging)
        self._note(key)
        return True

    def _checked(self, key: str, marker: Marker, read: Callable[[], Reference | None]) -> Reference:
        """What is read of an object of the bucket, which is set aside if it is damaged."""
        try:
            reference = read()
            if reference is None or reference.digest != marker.digest:
                raise CorruptObjectError(f"The marker of object {key} in {self.name} names another digest.", key)
            if not reference.arrays and digest_sorted(iter(()), reference.attributes) != reference.digest:
                raise CorruptObjectError(
                    f"The content of {reference.describe()} in {self.name} has another digest.", key
                )
        except CorruptObjectError as error:
            raise self._set_aside_there(error, marker) from error
        return reference

    def _set_aside_there(self, error: CorruptObjectError, marker: Marker) -> CorruptObjectError:
        place = self._remote.set_aside(error.key, marker.upload)
        self._shared(error.key).unlink(missing_ok=True)
        return error if place is None else CorruptObjectError(f"{error} It was moved to {place}.", error.key)

    @contextmanager
    def _downloaded(self, reference: Reference) -> Iterator[Path]:
        """The object as the bucket has it, in a directory that goes afterwards; its digest has been compared."""
        key, staging = reference.key, self.staging(reference.key)
        marker = self._remote.marker(key)
        if marker is None:
            raise self._unknown(key)
        try:
            try:
                self._remote.download(reference, marker, staging)
                stored = StoredObject(staging, reference)
                digest = digest_sorted(stored.stored_arrays(), stored.attributes)
                if digest != reference.digest:
                    raise CorruptObjectError(
                        f"The content of {reference.describe()} in {self.name} has the digest {digest}, but "
                        f"{reference.digest} was committed.",
                        key,
                    )
            except CorruptObjectError as error:
                raise self._set_aside_there(error, marker) from error
            sync_tree(staging)
            yield staging
        finally:
            remove_tree(staging)

    def _share(self, reference: Reference, *, has_arrays: bool, directory: Path | None = None) -> None:
        """Puts an object into the bucket; one that is there must be equal.

        Args:
            reference: of the object.
            has_arrays: whether its arrays are here.
            directory: where it lies; None for its place in the local store.
        """
        key = reference.key
        place = self.path(key)
        if directory is None and not has_arrays and is_foreign(place):
            return  # from a machine that may round in another way, and its arrays were never seen
        marker = self._remote.upload(directory or place, reference, has_arrays=has_arrays)
        if marker.digest != reference.digest:
            raise NondeterminismError(
                f"{reference.describe()} was computed twice with different results: {self.name} has the digest "
                f"{marker.digest}, this machine has {reference.digest}. Use deterministic algorithms, fixed seeds and "
                f"machines that round alike; to keep what the bucket has, move {place} away."
            )
        self._note(key)

    def _note(self, key: str) -> None:
        """Notes here that the bucket knows an object, so that it is not asked each time."""
        note = self._shared(key)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, "")

    def _shared(self, key: str) -> Path:
        return self.root / "shared" / self._bucket.identity / key[:2] / key
