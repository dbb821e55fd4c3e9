"""Builds a directory next to its place and renames it there, so that it exists completely or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def build_directory(target: Path, build: Callable[[Path], None]) -> Path:
    """Returns `target`, building it first if it does not exist.

    Processes that want the same directory wait for each other. What a killed process left behind is removed by the
    next one that builds the same directory; it is never taken for a result.

    Args:
        target: The directory wanted. If it exists it is trusted, because it only appears by a rename.
        build: Fills the empty directory it is given.

    Returns:
        `target`.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        staging_prefix = f".{target.name}.tmp-"
        for stale in target.parent.iterdir():
            if stale.name.startswith(staging_prefix):
                shutil.rmtree(stale, ignore_errors=True)
        staging = target.parent / f"{staging_prefix}{os.getpid()}"
        staging.mkdir()
        try:
            build(staging)
            for path in staging.iterdir():
                _flush(path)
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return target


def _flush(path: Path) -> None:
    """Waits until the contents of a file are on the disk, so that a rename never gets ahead of them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
