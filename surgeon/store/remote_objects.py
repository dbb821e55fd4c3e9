"""Objects in a bucket: a browsable Zarr hierarchy each, and one file that says that it is there.

    refs/<2>/<key>.json                     the marker: reference, record, and the list of files with their sizes
    objects/<2>/<key>/<digest>/...          the files of the object as in a local store, of Zarr alone
    objects/<2>/<key>/<digest>/zarr.json    written last: arrays without it are not there
    locks/<key>.json                        leases
    corrupt/<key>-<time>/...                what was set aside

A commit writes the files, then the marker if there is none (of two writers one wins, and the other compares digests),
then the group's `zarr.json`. Since the digest is in the path, files of results that differ never mix. An eviction
removes `zarr.json` first. So whoever sees `zarr.json` sees a reference and all arrays, whenever a process was killed.
"""

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from surgeon.errors import CorruptObjectError, EvictedError
from surgeon.store.files import walk_files
from surgeon.store.keys import SCHEMA
from surgeon.store.reading import read_record
from surgeon.store.reference import Reference
from surgeon.store.remote_bucket import Bucket, at_once
from surgeon.store.root import EVICTED_FILE, GROUP_FILE, RECORD_FILE, is_key

_REFS = "refs"
_DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Marker:
    """What says that an object is in the bucket.

    Attributes:
        digest: of its content.
        group: text of its `zarr.json`, which holds the reference.
        record: volatile facts.
        files: bytes of every other file by path; empty if only the reference was ever there.
        upload: differs between two uploads of the same object.
    """

    digest: str
    group: str
    record: dict[str, Any]
    files: dict[str, int]
    upload: str

    def to_bytes(self) -> bytes:
        """As JSON."""
        return (json.dumps({"schema": SCHEMA, **asdict(self)}) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Marker":
        """The marker that `to_bytes` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        found = json.loads(content)
        if found.pop("schema") != SCHEMA:
            raise ValueError(f"schema is not {SCHEMA}")
        files = {str(path): int(size) for path, size in found.pop("files").items()}
        if any(path.startswith("/") or ".." in path.split("/") for path in files):
            raise ValueError("a path leads out of the object")
        return cls(str(found["digest"]), str(found["group"]), dict(found["record"]), files, str(found["upload"]))


class BucketObjects:
    """The objects of one bucket.

    Args:
        bucket: where they are.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def marker(self, key: str) -> Marker | None:
        """The marker of an object; None if there is no such object.

        Raises:
            CorruptObjectError: it cannot be read; it has then been set aside.
        """
        found = self._bucket.get_tagged(_ref(key))
        if found is None:
            return None
        try:
            return Marker.from_bytes(found[0])
        except (ValueError, TypeError, KeyError) as error:
            place = self.set_aside(key)
            raise CorruptObjectError(
                f"The reference of object {key} in {self._bucket.url} cannot be read: {error}. It was moved "
                f"to {place}.",
                key,
            ) from error

    def has_arrays(self, key: str, digest: str) -> bool:
        """Whether an object is there with all its arrays."""
        return self._bucket.tag(f"{_place(key, digest)}/{GROUP_FILE}") is not None

    def upload(self, directory: Path, reference: Reference, *, has_arrays: bool) -> Marker:
        """Puts an object of this machine into the bucket.

        Args:
            directory: of the object, complete.
            reference: its reference.
            has_arrays: whether its arrays are there; otherwise the reference alone goes up.

        Returns:
            The marker that is there now: that of another writer, if it was faster. If its digest is another, nothing of
            this object is left in the bucket.
        """
        place = _place(reference.key, reference.digest)
        paths = [path for path in walk_files(directory) if path.name not in (RECORD_FILE, EVICTED_FILE)]
        files = {path.as_posix(): directory / path for path in paths if path.as_posix() != GROUP_FILE and has_arrays}
        group = (directory / GROUP_FILE).read_text(encoding="utf-8")
        sizes = {path: source.stat().st_size for path, source in files.items()}
        marker = Marker(reference.digest, group, read_record(directory), sizes, secrets.token_hex(8))
        self._bucket.upload({f"{place}/{path}": source for path, source in files.items()})
        marker = self._claim(reference.key, marker)
        if marker.digest != reference.digest:
            self._bucket.delete([f"{place}/{path}" for path in files])
        elif has_arrays:
            self._bucket.put(f"{place}/{GROUP_FILE}", group.encode())
        return marker

    def _claim(self, key: str, mine: Marker) -> Marker:
        """Writes the marker, unless there is one; the one that counts."""
        while self._bucket.create(_ref(key), mine.to_bytes()) is None:
            found = self._bucket.get_tagged(_ref(key))
            if found is None:
                continue  # it was set aside in between
            theirs = self.marker(key)
            if theirs is None or theirs.digest != mine.digest or theirs.files == mine.files or not mine.files:
                return theirs or mine
            # Only the reference was there, or another release of Zarr wrote the files.
            self._bucket.replace(_ref(key), mine.to_bytes(), found[1])
        return mine

    def download(self, reference: Reference, marker: Marker, target: Path) -> None:
        """Gets all files of an object into a new directory, in the form of a local store. Nothing is checked but sizes.

        Raises:
            EvictedError: the arrays are not there.
            CorruptObjectError: a file is missing or has another size than it was written with.
        """
        place = _place(reference.key, marker.digest)
        if not self.has_arrays(reference.key, marker.digest):
            raise EvictedError(
                f"The arrays of {reference.describe()} were dropped from {self._bucket.url}; only the reference "
                "remains. Compute the object again (committing it restores the arrays), or keep more: keep = all."
            )
        write_reference(marker, target)
        at_once(
            [partial(self._download_one, reference, place, path, size, target) for path, size in marker.files.items()]
        )

    def _download_one(self, reference: Reference, place: str, path: str, size: int, target: Path) -> None:
        content = self._bucket.get(f"{place}/{path}")
        if content is None and not self.has_arrays(reference.key, place.rpartition("/")[2]):
            raise EvictedError(f"{reference.describe()} was evicted while it was fetched from {self._bucket.url}.")
        if content is None or len(content) != size:
            got = "is missing" if content is None else f"has {len(content)} bytes instead of {size}"
            raise CorruptObjectError(
                f"The file {path} of {reference.describe()} in {self._bucket.url}/{place} {got}.", reference.key
            )
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)

    def evict(self, key: str, digest: str) -> None:
        """Drops the arrays of an object."""
        place = _place(key, digest)
        self._bucket.delete([f"{place}/{GROUP_FILE}"])
        self._bucket.delete(list(self._bucket.sizes(place)))

    def delete(self, key: str) -> None:
        """Removes an object, reference and all."""
        groups, others = self._files_of(key)
        self._bucket.delete(groups)
        self._bucket.delete([_ref(key)])
        self._bucket.delete(others)

    def set_aside(self, key: str, upload: str | None = None) -> str | None:
        """Moves an object away, so that it is computed again.

        Args:
            key: of the object.
            upload: which one is meant; another that took its place stays. None means whatever is there.

        Returns:
            Where it lies now; None if there was nothing to move.
        """
        content = self._bucket.get(_ref(key))
        if content is None or (upload is not None and upload.encode() not in content):
            return None
        target = f"corrupt/{key}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        groups, others = self._files_of(key)
        for path in groups:  # first: from here on the arrays are not there
            self._bucket.move(path, target + path.removeprefix(_places(key)))
        self._bucket.move(_ref(key), f"{target}/{Path(_ref(key)).name}")
        at_once([partial(self._bucket.move, path, target + path.removeprefix(_places(key))) for path in others])
        return f"{self._bucket.url}/{target}"

    def _files_of(self, key: str) -> tuple[list[str], list[str]]:
        """The paths that say that arrays are there, and all others."""
        files = list(self._bucket.sizes(_places(key)))
        groups = [path for path in files if path.endswith(f"/{GROUP_FILE}") and path.count("/") == _DEPTH]
        return groups, [path for path in files if path not in groups]

    def all_keys(self) -> Iterator[str]:
        """The keys of all objects, sorted; nothing is read."""
        for path in self._bucket.sizes(_REFS):
            if is_key(key := Path(path).stem):
                yield key


def write_reference(marker: Marker, target: Path) -> None:
    """Makes the directory of an object without arrays, in the form of a local store."""
    target.mkdir(parents=True)
    (target / GROUP_FILE).write_text(marker.group, encoding="utf-8")
    (target / RECORD_FILE).write_text(json.dumps(marker.record, indent=2) + "\n", encoding="utf-8")


_DEPTH = 4
"""Slashes in the path of a group's own `zarr.json`."""


def lock_path(key: str) -> str:
    """Where the lease of an object lies."""
    return f"locks/{key}.json"


def _ref(key: str) -> str:
    return f"{_REFS}/{key[:2]}/{key}.json"


def _places(key: str) -> str:
    return f"objects/{key[:2]}/{key}"


def _place(key: str, digest: str) -> str:
    return f"{_places(key)}/{digest[:_DIGEST_LENGTH]}"
