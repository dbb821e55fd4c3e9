"""Locks between processes, one file a lock."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from surgeon.errors import StoreError
from surgeon.store.abilities import locks_work
from surgeon.store.lease_folder import LeaseFolder
from surgeon.store.leases import LeaseTimes, lease


@contextmanager
def file_lock(path: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Holds an exclusive lock which the kernel releases when the process ends, however it ends.

    Where the file system has no locks, a lease stands for it.

    Args:
        path: lock file; created, and removed again where that is safe.
        timeout_s: how long to wait; None waits as long as it takes.

    Raises:
        StoreError: if the lock was not free in time.
    """
    if not locks_work(path.parent):
        with lease(LeaseFolder(path.parent), f"{path.name}.lease", timeout_s, LeaseTimes(asked_s=0.1)):
            yield
        return
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
