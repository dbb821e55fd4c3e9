"""Where a store is: a directory, or a bucket with a directory of this machine before it."""

import os
from dataclasses import dataclass
from pathlib import Path

from surgeon.store.remote_bucket import connected
from surgeon.store.remote_store import RemoteStore
from surgeon.store.store import Store

CACHE_VARIABLE = "SURGEON_CACHE"


@dataclass(frozen=True)
class StorePlace:
    """Names a store without opening it. Small and picklable: it is sent to processes on other machines.

    Attributes:
        directory: the store itself; for a bucket the local store before it, unless this machine has set
            `SURGEON_CACHE`.
        url: of the bucket and the prefix in it, such as "s3://bucket/prefix"; None for a directory.
    """

    directory: Path
    url: str | None = None

    @property
    def root(self) -> Path:
        """The directory on this machine where files of the store lie."""
        chosen = os.environ.get(CACHE_VARIABLE) if self.url is not None else None
        return Path(chosen).expanduser().resolve() if chosen else self.directory

    def exists(self) -> bool:
        """Whether there may be a store: for a bucket, opening it tells."""
        return self.url is not None or self.directory.is_dir()

    def open(self) -> Store:
        """Opens the store; creates it if the directory or the prefix is new or empty.

        Raises:
            StoreError: if something else is there, or a store of another schema.
            BucketError: if the bucket cannot be used.
        """
        return Store(self.root) if self.url is None else RemoteStore(self.root, connected(self.url))

    def __str__(self) -> str:
        return self.url or str(self.directory)


def is_url(text: str) -> bool:
    """Whether a text means a bucket rather than a directory."""
    return "://" in text
