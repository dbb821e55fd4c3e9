"""What the file system of a store can do: rename directories at once, give files second names, lock files.

Where something is missing, a slower way is taken: directories are copied in place with their `zarr.json` last, files of
a view are copied, locks are files that their holders renew.
"""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil

from surgeon.store.files import remove_tree, temporary_name

NOT_SUPPORTED = frozenset(
    {errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EMLINK}
)
"""What file systems answer that cannot do a thing, rather than not now or not there."""

_COPYING = ("s3fs", "goofys", "geesefs", "gcsfuse", "rclone", "blobfuse", "mountpoint-s3")
"""File systems that rename a directory file by file and say nothing; their names are part of what mounts say."""


def explain(directory: Path) -> list[str]:
    """Tries what a store needs, and gives a line for each thing that does not work, and what is done instead.

    Args:
        directory: on the file system in question, such as `tmp` of a store. In one that cannot be written to nothing
            is found wrong.
    """
    probe = directory / temporary_name("probe")
    try:
        (probe / "old").mkdir(parents=True)
        (probe / "file").write_text("")
    except OSError:
        return []
    try:
        lines = {
            "cannot rename directories at once, so results are copied in place, which takes longer": (
                _works(lambda: (probe / "old").rename(probe / "new")) and renames_at_once(directory)
            ),
            "has no hard links, so views are copies and take space of their own": _works(
                lambda: os.link(probe / "file", probe / "link")
            ),
            "has no file locks, so files that are renewed every few seconds stand for them; `surgeon clean` does not "
            "work there": locks_work(directory),
        }
    finally:
        remove_tree(probe)
    return [f"the file system of {directory} {line}" for line, works in lines.items() if not works]


@cache
def locks_work(directory: Path) -> bool:
    """Whether the kernel locks files in a directory, and frees them when a process ends."""
    with tempfile.TemporaryFile(dir=directory) as file:
        return _works(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))


def renames_at_once(directory: Path) -> bool:
    """Whether a directory in this one can be renamed in one step, as far as the kind of file system says."""
    return _mount_renames(directory.stat().st_dev, directory.anchor) or not _is_copying(directory)


@cache
def _mount_renames(_device: int, _anchor: str) -> bool:
    """Whether no mounted file system is of those that copy, which spares a look for each directory."""
    return not any(_copies(part.fstype, part.device) for part in psutil.disk_partitions(all=True))


def _is_copying(directory: Path) -> bool:
    inside = [part for part in psutil.disk_partitions(all=True) if directory.is_relative_to(part.mountpoint)]
    mount = max(inside, key=lambda part: len(part.mountpoint), default=None)
    return mount is not None and _copies(mount.fstype, mount.device)


def _copies(kind: str, device: str) -> bool:
    return any(name in f"{kind} {device}".lower() for name in _COPYING)


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True
