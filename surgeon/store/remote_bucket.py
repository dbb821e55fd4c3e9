"""What a store needs of a bucket: files by path, conditional writes, and errors that say where and why."""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from surgeon.errors import BucketError, StoreError
from surgeon.store.keys import SCHEMA
from surgeon.store.remote_address import AT_WORK, FIRST_CONTACT, BucketAddress, surroundings

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

T = TypeVar("T")
FORMAT = "surgeon-bucket"
FORMAT_FILE = "format.json"
_AT_ONCE = 16
"""Requests under way at a time; more do not fill the line of one machine any better."""


class Bucket:
    """A prefix of a bucket. Safe to use from several threads.

    Attributes:
        url: for messages.
        identity: differs between two buckets, also between one and its successor under the same URL.
    """

    def __init__(self, client: "ObjectStore", url: str) -> None:
        """Checks that the prefix holds a store; makes one if there is nothing.

        Raises:
            StoreError: something else is there, or a store of another schema.
        """
        self.url = url
        self._client = client
        self.identity = self._open_format()

    def get(self, path: str) -> bytes | None:
        """Content of a file; None if there is none."""
        found = self.get_tagged(path)
        return None if found is None else found[0]

    def get_tagged(self, path: str) -> tuple[bytes, str] | None:
        """Content of a file and its tag, which differs between contents; None if there is none."""
        import obstore

        with self._asking("reading", path):
            try:
                result = obstore.get(self._client, path)
                return result.bytes().to_bytes(), str(result.meta["e_tag"])
            except FileNotFoundError:
                return None

    def tag(self, path: str) -> str | None:
        """Tag of a file; None if there is none."""
        import obstore

        with self._asking("looking for", path):
            try:
                return str(obstore.head(self._client, path)["e_tag"])
            except FileNotFoundError:
                return None

    def put(self, path: str, content: bytes) -> None:
        """Writes a file, over another if there is one."""
        import obstore

        with self._asking("writing", path):
            obstore.put(self._client, path, content, use_multipart=False)

    def create(self, path: str, content: bytes) -> str | None:
        """Writes a file that is not there yet; of several writers one wins.

        Returns:
            Its tag; None if there is a file already, unless it has this very content.
        """
        return self._put_if(path, content, None)

    def replace(self, path: str, content: bytes, tag: str) -> str | None:
        """Writes a file over one with this tag.

        Returns:
            The new tag; None if there is no such file any more, unless there is one with this very content.
        """
        return self._put_if(path, content, tag)

    def delete(self, paths: Sequence[str]) -> None:
        """Removes files, those that are there."""
        import obstore

        if paths:
            with self._asking("removing", paths[0]):
                try:
                    obstore.delete(self._client, list(paths))
                except FileNotFoundError:
                    return

    def sizes(self, prefix: str, limit: int | None = None) -> dict[str, int]:
        """Bytes of the files below a path (of the first `limit`, if given), by path, sorted."""
        import obstore

        with self._asking("listing", prefix):
            pages = obstore.list(self._client, prefix or None, chunk_size=limit or 1000)
            found: dict[str, int] = {}
            for page in pages:
                found.update({str(item["path"]): int(item["size"]) for item in page})
                if limit is not None:
                    break
        return dict(sorted(found.items()))

    def move(self, old: str, new: str) -> None:
        """Gives a file another path, if it is there."""
        import obstore

        with self._asking("moving", old):
            try:
                obstore.rename(self._client, old, new)
            except FileNotFoundError:
                return

    def upload(self, files: Mapping[str, Path]) -> None:
        """Writes files of this machine, several at a time."""
        at_once([partial(self._upload_one, path, source) for path, source in files.items()])

    def _upload_one(self, path: str, source: Path) -> None:
        self.put(path, source.read_bytes())

    def _put_if(self, path: str, content: bytes, tag: str | None) -> str | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        version: UpdateVersion = {"e_tag": tag}
        with self._asking("writing", path):
            try:
                done = obstore.put(
                    self._client, path, content, mode="create" if tag is None else version, use_multipart=False
                )
                return str(done["e_tag"])
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                if tag is None and isinstance(error, FileNotFoundError):
                    raise  # there is no bucket
        # A request that was sent twice, as its first answer was lost, meets its own file.
        found = self.get_tagged(path)
        return found[1] if found is not None and found[0] == content else None

    def _open_format(self) -> str:
        text = self.get(FORMAT_FILE)
        if text is None:
            if others := list(self.sizes("", limit=5)):
                raise StoreError(
                    f"run.store: {self.url} is not empty and is no store: it has no {FORMAT_FILE} but holds {others}. "
                    "Choose another prefix."
                )
            self.create(FORMAT_FILE, _json({"format": FORMAT, "schema": SCHEMA, "identity": secrets.token_hex(8)}))
            text = self.get(FORMAT_FILE) or b""
        try:
            found: Any = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("identity"), str):
            raise StoreError(
                f"run.store: {FORMAT_FILE} of {self.url} says that this is no store. Choose another prefix."
            )
        if found.get("schema") != SCHEMA:
            raise StoreError(
                f"run.store: {self.url} has schema {found.get('schema')!r}, but this version of Surgeon reads schema "
                f"{SCHEMA}. Choose another prefix, or use the version of Surgeon that wrote it."
            )
        return str(found["identity"])

    @contextmanager
    def _asking(self, action: str, path: str) -> Iterator[None]:
        import obstore

        try:
            yield
        except (obstore.exceptions.BaseError, FileNotFoundError, PermissionError) as error:
            raise BucketError(
                f"run.store: {action} {path or 'anything'} in {self.url} failed: {cause_of(error)}"
            ) from None


def open_bucket(url: str) -> Bucket:
    """Connects to a bucket and makes sure, within seconds, that it can be used.

    Raises:
        BucketError: it cannot be reached or used; the message says what was tried, and which variables matter.
        StoreError: the URL, the credentials or what the prefix holds are not right.
    """
    address = BucketAddress.parse(url)
    first = address.connect(FIRST_CONTACT)
    try:
        Bucket(first, str(address))
        return Bucket(address.connect(AT_WORK), str(address))
    except BucketError as error:
        raise BucketError(f"{error}. Is there this bucket, and may you use it? {surroundings()}.") from None


def connected(url: str) -> Bucket:
    """As `open_bucket`, once in a process: what was checked is not checked again."""
    return _connected(url, os.getpid())


@cache
def _connected(url: str, process: int) -> Bucket:  # noqa: ARG001 (a forked process needs a connection of its own)
    return open_bucket(url)


def cause_of(error: BaseException) -> str:
    """Why a request failed, in one line: the library adds pages for its own developers."""
    text = str(error)
    code, message = (re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message"))
    if code is not None:
        return f"{code[1]}" + (f" ({message[1].rstrip('.')})" if message is not None else "")
    return text.partition("\n")[0].rpartition(" - ")[2].rstrip(". ")


def at_once(actions: Sequence[Callable[[], T]]) -> list[T]:
    """Does several things that wait for the network, some at a time; the first error ends it."""
    if len(actions) < 2:
        return [action() for action in actions]
    with ThreadPoolExecutor(min(_AT_ONCE, len(actions))) as pool:
        return [task.result() for task in [pool.submit(action) for action in actions]]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()
