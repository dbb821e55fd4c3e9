"""Writing results while the next ones are made: what a GPU computes in a second takes the store as long.

`write_all` commits the products of one computation in threads, a few at a time, while the next is copied from the
device. Within `writing_behind` what nothing waits for is still being written when the next computation begins. Commits
are whole or not there, as ever, so a process that is killed meanwhile leaves the rest to be computed again.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from surgeon.choices import Device
from surgeon.store import Reference

P = TypeVar("P")
Commit = Callable[[], Reference]
"""Writes a product and returns its reference."""
GPU_WRITERS = 3
"""Products written at a time where a GPU makes them: their hashes and the disk keep up with it (measured)."""


def writers_for(device: str) -> int:
    """Products written beside the one that is made; none where the same processor makes them and is busy."""
    return 0 if device == Device.CPU else GPU_WRITERS


def write_all(makers: list[tuple[P, Callable[[], Commit]]], n_writers: int) -> dict[P, Reference]:
    """Makes products one after the other and commits each in another thread meanwhile.

    Args:
        makers: for each product, what makes it and returns how to commit it; emptied as they are made, so that nothing
            is held longer than needed.
        n_writers: threads, and products that are made and not committed yet at any time; 0 commits at once, here.

    Returns:
        References by name.

    Raises:
        BaseException: the first error of making or committing, after all commits that had begun have ended.
    """
    if n_writers == 0 or len(makers) <= 1:
        found = {}
        while makers:
            name, make = makers.pop(0)
            found[name] = make()()
            del make
        return found
    futures: dict[P, Future[Reference]] = {}
    in_flight: deque[Future[Reference]] = deque()
    with ThreadPoolExecutor(n_writers, thread_name_prefix="store") as pool:
        while makers:
            while len(in_flight) >= n_writers:
                in_flight.popleft().result()
            name, make = makers.pop(0)
            futures[name] = pool.submit(make())
            del make
            in_flight.append(futures[name])
    return {name: future.result() for name, future in futures.items()}


@dataclass
class Backlog:
    """What is being written behind the work that goes on: the results of one computation at most.

    Attributes:
        n_writers: threads.
    """

    n_writers: int
    _pool: ThreadPoolExecutor | None = None
    _futures: list[Future[Reference]] = field(default_factory=list)
    _release: Callable[[], None] = lambda: None

    def add(self, makers: list[tuple[P, Callable[[], Commit]]], release: Callable[[], None]) -> None:
        """Makes products here and has them committed behind, after those before are done.

        Args:
            makers: as of `write_all`.
            release: called when all of them are committed, or cannot be.
        """
        try:
            self.drain()
        except BaseException:
            release()
            raise
        self._release = release
        self._pool = self._pool or ThreadPoolExecutor(self.n_writers, thread_name_prefix="store")
        while makers:
            _, make = makers.pop(0)
            self._futures.append(self._pool.submit(make()))
            del make

    def drain(self) -> None:
        """Waits until everything is written.

        Raises:
            BaseException: the first error of writing.
        """
        futures, self._futures = self._futures, []
        release, self._release = self._release, lambda: None
        try:
            errors = [error for future in futures if (error := future.exception()) is not None]
        finally:
            release()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()


_BACKLOG: ContextVar[Backlog | None] = ContextVar("backlog", default=None)


def current_backlog() -> Backlog | None:
    """Where results go that nothing waits for; None outside `writing_behind`."""
    return _BACKLOG.get()


@contextmanager
def writing_behind(device: str, *, wanted: bool = True) -> Iterator[None]:
    """Computations inside do not wait for the results of the one before to be written, unless they need them.

    At the end everything is written.

    Args:
        device: kind of device that computes; on a CPU nothing changes.
        wanted: without, nothing changes either.

    Raises:
        BaseException: the first error of writing, unless the work inside has raised another.
    """
    n_writers = writers_for(device)
    if not wanted or not n_writers or _BACKLOG.get() is not None:
        yield
        return
    backlog = Backlog(n_writers)
    token = _BACKLOG.set(backlog)
    try:
        yield
    except BaseException:
        with suppress(Exception):
            backlog.drain()
        raise
    else:
        backlog.drain()
    finally:
        _BACKLOG.reset(token)
        backlog.close()
