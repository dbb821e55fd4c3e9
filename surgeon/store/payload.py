"""Drops and restores the arrays of an object while its reference stays visible.

A marker file says that the arrays are gone. It is there before the first array goes and until the last is back, so at
any moment the object is either whole or evicted. Callers hold `Store.frozen`.
"""

from pathlib import Path

from surgeon.store.files import remove_tree, sync, write_file
from surgeon.store.moves import replace_part
from surgeon.store.root import EVICTED_FILE, GROUP_FILE

_FOREIGN = "taken in\n"


def drop_payload(directory: Path, trash: Path) -> None:
    """Marks an object as evicted and deletes its arrays; finishes an eviction that was interrupted.

    Args:
        directory: the object.
        trash: a new directory on the same file system, where the arrays lie while they are deleted.
    """
    write_file(directory / EVICTED_FILE, "")
    sync(directory)
    _remove_arrays(directory, trash)


def write_foreign_marker(directory: Path) -> None:
    """Marks an object of which only the reference was taken in from elsewhere, as evicted."""
    write_file(directory / EVICTED_FILE, _FOREIGN)


def is_foreign(directory: Path) -> bool:
    """Whether only the reference of an object was taken in from elsewhere, so that no content was ever seen here."""
    marker = directory / EVICTED_FILE
    return marker.is_file() and marker.read_text(encoding="utf-8") == _FOREIGN


def restore_payload(directory: Path, staging: Path, trash: Path) -> None:
    """Moves the arrays and the record of an equal object into an evicted one, then unmarks it.

    Args:
        directory: the evicted object.
        staging: the equal object, on disk in full.
        trash: as for `drop_payload`, for leftovers of an eviction or a restoration that was interrupted.
    """
    _remove_arrays(directory, trash)
    for item in sorted(staging.iterdir()):
        if item.name != GROUP_FILE:
            replace_part(item, directory / item.name)
    sync(directory)
    (directory / EVICTED_FILE).unlink()
    sync(directory)


def _remove_arrays(directory: Path, trash: Path) -> None:
    folders = [item for item in sorted(directory.iterdir()) if item.is_dir()]
    if not folders:
        return
    trash.mkdir(parents=True)
    for folder in folders:
        replace_part(folder, trash / folder.name)
    sync(directory)
    remove_tree(trash)
