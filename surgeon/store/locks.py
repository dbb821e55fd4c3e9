"""Locks between processes, one file a lock."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from surgeon.errors import StoreError


@contextmanager
def file_lock(path: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Holds an exclusive lock which the kernel releases when the process ends, however it ends.

    Args:
        path: lock file; created, and removed again where that is safe.
        timeout_s: how long to wait; None waits as long as it takes.

    Raises:
        StoreError: if the lock was not free in time.
    """
    # Released wherever the work ends that it was taken for, be it in another thread.
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
    except Timeout as error:
        raise StoreError(
            f"The lock {path} was not free within {timeout_s} s: another process is working on the same object. "
            "Wait for it, or look for a process that hangs; the lock of an ended process is free."
        ) from error
    try:
        yield
    finally:
        # Removed while held: a process that waits for the removed file sees that it has no name left and starts again.
        path.unlink(missing_ok=True)
        lock.release()
