"""Moves and removes directories of objects: at once where the file system can, else so that no half is ever seen.

A directory that is copied in place has a file `partial` from before its first file until after its last, `zarr.json`.
One with `partial` and no `zarr.json` is not there; so is one with nothing in it.
"""

import shutil
from pathlib import Path

from surgeon.store.abilities import NOT_SUPPORTED, renames_at_once
from surgeon.store.files import remove_tree, sync, sync_tree, walk_files, write_file
from surgeon.store.root import GROUP_FILE, PARTIAL_FILE


def is_partial(directory: Path) -> bool:
    """Whether a directory was left behind by a process that was copying it here, or removing it."""
    if (directory / GROUP_FILE).exists() or not directory.is_dir():
        return False
    names = {item.name for item in directory.iterdir()}
    return GROUP_FILE not in names and (PARTIAL_FILE in names or not names)


def move_tree(source: Path, target: Path) -> None:
    """Moves a directory to a path where there is none, or a partial one."""
    if is_partial(target):
        remove_tree(target)
    if not rename_tree(source, target):
        _copy_in_place(source, target)
        _remove_in_place(source)


def discard_tree(directory: Path, trash: Path) -> None:
    """Removes a directory in one step.

    Args:
        directory: goes.
        trash: a new path on the same file system, where it lies while its files are removed.
    """
    if rename_tree(directory, trash):
        sync(directory.parent)
        remove_tree(trash)
    else:
        _remove_in_place(directory)


def replace_part(source: Path, target: Path) -> None:
    """Moves a file or a directory of an object into another object, whose marker says that it is not whole."""
    if source.is_file():
        source.replace(target)
    elif not rename_tree(source, target):
        remove_tree(target)
        shutil.copytree(source, target)
        sync_tree(target)
        remove_tree(source)


def rename_tree(source: Path, target: Path) -> bool:
    """Renames a directory, where the file system does that at once; whether it does."""
    if not renames_at_once(source.parent):
        return False
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def _copy_in_place(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    write_file(target / PARTIAL_FILE, "")
    for path in walk_files(source):
        if path != Path(GROUP_FILE) and path != Path(PARTIAL_FILE):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
    sync_tree(target)
    if (source / GROUP_FILE).is_file():
        write_file(target / GROUP_FILE, (source / GROUP_FILE).read_text(encoding="utf-8"))
        (target / PARTIAL_FILE).unlink()
    sync(target)
    sync(target.parent)


def _remove_in_place(directory: Path) -> None:
    write_file(directory / PARTIAL_FILE, "")
    (directory / GROUP_FILE).unlink(missing_ok=True)
    sync(directory)
    for item in directory.iterdir():
        if item.name != PARTIAL_FILE:
            remove_tree(item) if item.is_dir() else item.unlink()
    remove_tree(directory)
