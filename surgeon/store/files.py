"""Durable files and temporary names that tell whose they are."""

import errno
import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def temporary_name(prefix: str) -> str:
    """`<prefix>-<pid>-<random>`; the random part begins with a hash of the host, for a pid means nothing elsewhere."""
    return f"{prefix}-{os.getpid()}-{_host_mark()}{secrets.token_hex(4)}"


def is_stale(name: str) -> bool:
    """Whether a temporary name was made on this host by a process that no longer runs."""
    parts = name.rsplit("-", 2)
    if len(parts) != 3 or not parts[1].isdecimal() or not parts[2].startswith(_host_mark()):
        return False
    return not _is_running(int(parts[1]))


def _host_mark() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no space left, or no more of a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_file(path: Path, text: str) -> None:
    """Writes a new text file and waits until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a directory, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until all files and directories below a directory, and itself, are on disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def walk_files(directory: Path) -> Iterator[Path]:
    """All files below a directory, as paths relative to it, sorted."""
    for folder, subfolders, names in os.walk(directory):
        subfolders.sort()
        for name in sorted(names):
            yield Path(folder, name).relative_to(directory)


def remove_tree(directory: Path) -> None:
    """Removes a directory and all below it, if it is there."""
    shutil.rmtree(directory, ignore_errors=True)
