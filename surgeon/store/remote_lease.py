"""Locks between machines: a file in the bucket that its holder writes anew every few seconds.

A waiter takes a lease over when the file has not changed for a while by the waiter's own clock, so clocks of machines
are never compared. Should the holder be alive after all (its machine was asleep), two compute the same object: a lease
only spares work, and what is right is decided by the conditional write that commits.
"""

import json
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from surgeon.errors import BucketError, StoreError
from surgeon.store.files import is_stale, temporary_name
from surgeon.store.remote_bucket import Bucket


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds.

    Attributes:
        renewed_s: between two signs of life of the holder.
        lost_s: without one after which a waiter takes over.
        asked_s: between two looks of a waiter.
    """

    renewed_s: float = 5.0
    lost_s: float = 40.0
    asked_s: float = 1.0


TIMES = LeaseTimes()


@contextmanager
def lease(bucket: Bucket, path: str, timeout_s: float | None = None, times: LeaseTimes = TIMES) -> Iterator[None]:
    """Holds a lease, and renews it from a thread of its own.

    Args:
        bucket: where the file lies.
        path: of the file.
        timeout_s: how long to wait; None waits as long as it takes.
        times: how often things happen.

    Raises:
        LeaseTakenError: it was not free in time.
        BucketError: the bucket does not answer.
    """
    held = _Held(bucket, path, times)
    held.acquire(timeout_s)
    thread = threading.Thread(target=held.renew, name=f"lease {path}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        held.stop.set()
        thread.join()
        held.release()


class LeaseTakenError(StoreError):
    """Another process holds a lease, and it was not waited for any longer."""


class _Held:
    """The lease of this process."""

    def __init__(self, bucket: Bucket, path: str, times: LeaseTimes) -> None:
        self._bucket, self._path, self._times = bucket, path, times
        self._holder = temporary_name("lease")
        self._beat = 0
        self._tag: str | None = None
        self.stop = threading.Event()

    def acquire(self, timeout_s: float | None) -> None:
        """Waits until the file is this process's."""
        begun = time.monotonic()
        seen: str | None = None
        since = begun
        while True:
            self._tag = self._bucket.create(self._path, self._content())
            if self._tag is not None:
                return
            found = self._bucket.get_tagged(self._path)
            now = time.monotonic()
            if found is not None:
                content, tag = found
                if tag != seen:
                    seen, since = tag, now
                if now - since >= self._times.lost_s or is_stale(_holder_of(content)):
                    self._tag = self._bucket.replace(self._path, self._content(), tag)
                    if self._tag is not None:
                        return
            if timeout_s is not None and now - begun >= timeout_s:
                raise LeaseTakenError(
                    f"The lease {self._path} in {self._bucket.url} was not free within {timeout_s} s: another process "
                    "is working on the same object. Wait for it; the lease of an ended process is free after "
                    f"{self._times.lost_s:g} s."
                )
            time.sleep(self._times.asked_s)

    def renew(self) -> None:
        """Shows that the holder is alive, until told to stop or until another has taken over."""
        while self._tag is not None and not self.stop.wait(self._times.renewed_s):
            self._beat += 1
            try:
                self._tag = self._bucket.replace(self._path, self._content(), self._tag)
            except BucketError:
                continue  # the next sign of life may come through; without any, another takes over

    def release(self) -> None:
        """Removes the file, if it is still this process's."""
        try:
            if self._tag is not None and self._bucket.tag(self._path) == self._tag:
                self._bucket.delete([self._path])
        except BucketError:
            return  # what was done under the lease is done; others see it as lost

    def _content(self) -> bytes:
        facts = {"holder": self._holder, "host": platform.node(), "beat": self._beat}
        return (json.dumps(facts) + "\n").encode()


def _holder_of(content: bytes) -> str:
    try:
        facts: Any = json.loads(content)
        return str(facts["holder"])
    except (ValueError, KeyError, TypeError):
        return ""
