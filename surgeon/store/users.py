"""Who uses a store: any number of processes that write to it, or one that cleans it.

A process that writes holds a lock file of its own in `users`; the kernel frees it when the process ends, however it
ends. A process that cleans holds the gate, so that nobody new comes in, and looks whether all these locks are free.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from surgeon.errors import StoreError
from surgeon.store.abilities import locks_work
from surgeon.store.files import temporary_name, write_file
from surgeon.store.locks import file_lock
from surgeon.store.root import StorePaths, open_root

_GATE = "clean.lock"
_PATIENCE_S = 1.0
_CLEAN_PATIENCE_S = 10.0


class Presence:
    """Says that this process works with a store, until `leave` or the end of the process."""

    def __init__(self, root: Path, command: str, on_wait: Callable[[str], None] = lambda _line: None) -> None:
        """Waits until nobody cleans the store, then enters.

        Args:
            root: of the store; created if it is new or empty.
            command: what the process does, for the message of a `clean` that it keeps out.
            on_wait: is told when there is somebody to wait for.

        Raises:
            StoreError: if the directory is no store.
        """
        paths = open_root(Path(root).absolute())
        self._facts = paths.users / f"{temporary_name('user')}.json"
        # Released wherever the last owner lets go of it, be it another thread.
        self._lock = FileLock(self._facts.with_suffix(".lock"), thread_local=False)
        with _gate(paths, on_wait):
            paths.users.mkdir(exist_ok=True)
            if locks_work(paths.users):
                self._lock.acquire()
            facts = {"pid": os.getpid(), "host": platform.node(), "command": command, "since": _now()}
            write_file(self._facts, json.dumps(facts) + "\n")

    def leave(self) -> None:
        """Gives the store free; a second call does nothing."""
        self._facts.unlink(missing_ok=True)
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.leave()


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Keeps all other processes from working with a store; those that begin meanwhile wait.

    Raises:
        StoreError: if one works with it already; the message says which.
    """
    paths = open_root(Path(root).absolute())
    if not locks_work(paths.locks):
        raise StoreError(
            f"The file system of the store {root} has no file locks, so it cannot be told whether a process works with "
            "it. Nothing was removed; clean it from a machine that has it on a file system with locks."
        )
    with file_lock(paths.locks / _GATE, _CLEAN_PATIENCE_S):
        if users := live_users(root):
            names = "; ".join(
                f"process {user.get('pid', '?')} on {user.get('host', '?')} ({user.get('command', '?')}), "
                f"since {user.get('since', '?')}"
                for user in users
            )
            raise StoreError(
                f"The store {root} is in use by {names}. Nothing was removed; clean it when that has ended."
            )
        yield


def live_users(root: Path) -> list[dict[str, Any]]:
    """Who works with a store now: pid, host, command and since when. What ended processes left is removed."""
    users = []
    for path in sorted((Path(root) / "users").glob("*.lock")):
        facts = path.with_suffix(".json")
        try:
            with FileLock(path, timeout=0):
                facts.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except Timeout:
            users.append(_read(facts))
    return users


@contextmanager
def _gate(paths: StorePaths, on_wait: Callable[[str], None]) -> Iterator[None]:
    lock = paths.locks / _GATE
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(lock, _PATIENCE_S))
        except StoreError:
            on_wait(f"waiting for a process that cleans {paths.root}")
            held.enter_context(file_lock(lock))
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
