"""What is in a store and how old it is, and the removal of what nobody needs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from surgeon.errors import CorruptObjectError
from surgeon.store.files import walk_files
from surgeon.store.reading import read_record, read_reference
from surgeon.store.store import Store

DAMAGED = "damaged"


@dataclass(frozen=True)
class Size:
    """Sizes of files in bytes: all of them, and those with no other name, which a removal frees."""

    n_bytes: int = 0
    alone_bytes: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.n_bytes + other.n_bytes, self.alone_bytes + other.alone_bytes)


@dataclass(frozen=True)
class Entry:
    """One object as the sweep sees it.

    Attributes:
        key: of the object.
        kind: of the object; `DAMAGED` if its reference cannot be read.
        created: when it was committed.
        size: of its files.
    """

    key: str
    kind: str
    created: datetime
    size: Size


def survey(store: Store) -> Iterator[Entry]:
    """All objects of a store, sorted by key; one that goes meanwhile is left out."""
    for key in store.all_keys():
        try:
            reference = read_reference(store.path(key), key)
            kind = reference.kind if reference else None
        except CorruptObjectError:
            kind = DAMAGED
        if kind is not None:
            yield Entry(key, kind, _created(store.path(key)), size_of(store.path(key)))


def sweep(store: Store, keys: Iterable[str]) -> None:
    """Removes objects, one after the other. Killed at any moment, it leaves a valid store. Hold `users.alone`."""
    for key in keys:
        store.delete(key)


def size_of(directory: Path) -> Size:
    """Sizes of all files below a directory; nothing if it is not there."""
    total = Size()
    for path in walk_files(directory):
        try:
            status = (directory / path).lstat()
        except FileNotFoundError:
            continue
        total += Size(status.st_size, status.st_size if status.st_nlink == 1 else 0)
    return total


def _created(directory: Path) -> datetime:
    """When an object was committed; if it does not say, when its directory was changed."""
    try:
        created = datetime.fromisoformat(str(read_record(directory)["created"]))
    except (KeyError, ValueError):
        try:
            return datetime.fromtimestamp(directory.stat().st_mtime, UTC)
        except FileNotFoundError:
            return datetime.now(UTC)
    return created if created.tzinfo else created.replace(tzinfo=UTC)
