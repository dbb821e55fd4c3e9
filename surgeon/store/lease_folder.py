"""Leases as files of a directory, for file systems without locks."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from surgeon.store.files import temporary_name


class LeaseFolder:
    """Files of one directory, each written whole.

    Only a new file is written on a condition that nothing slips past: between looking at a file and writing over it
    another process may do so, which costs double work and no more.

    Args:
        directory: where they are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def url(self) -> str:
        """The directory, for messages."""
        return str(self._directory)

    def get_tagged(self, path: str) -> tuple[bytes, str] | None:
        """Content of a file and its digest; None if there is none."""
        try:
            content = (self._directory / path).read_bytes()
        except FileNotFoundError:
            return None
        return content, hashlib.sha256(content).hexdigest()

    def tag(self, path: str) -> str | None:
        """Digest of a file; None if there is none."""
        found = self.get_tagged(path)
        return None if found is None else found[1]

    def create(self, path: str, content: bytes) -> str | None:
        """Writes a file that is not there yet; its tag, or None if there is one."""
        try:
            with (self._directory / path).open("xb") as file:
                file.write(content)
        except FileExistsError:
            return None
        return self.tag(path)

    def replace(self, path: str, content: bytes, tag: str) -> str | None:
        """Writes a file over one with this tag; the new tag, or None if there is no such file any more."""
        if self.tag(path) != tag:
            return None
        draft = self._directory / temporary_name(path)
        draft.write_bytes(content)
        draft.replace(self._directory / path)
        return hashlib.sha256(content).hexdigest()

    def delete(self, paths: Sequence[str]) -> None:
        """Removes files, those that are there."""
        for path in paths:
            (self._directory / path).unlink(missing_ok=True)
