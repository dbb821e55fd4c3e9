"""The directories of a store, and the file which says that it is one."""

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from surgeon.errors import StoreError
from surgeon.store.files import sync, temporary_name, write_file
from surgeon.store.keys import SCHEMA

FORMAT = "surgeon-store"
GROUP_FILE = "zarr.json"
RECORD_FILE = "record.json"
EVICTED_FILE = "evicted"
PARTIAL_FILE = "partial"

_FORMAT_FILE = "format.json"
_FORMAT_DRAFT = ".format-"
_KEY = re.compile("[0-9a-f]{64}")


def is_key(text: str) -> bool:
    """Whether a text is 64 lower-case hexadecimal digits."""
    return _KEY.fullmatch(text) is not None


@dataclass(frozen=True)
class StorePaths:
    """Where things lie below the root of a store."""

    root: Path

    @property
    def objects(self) -> Path:
        """Directory of the committed objects."""
        return self.root / "objects"

    @property
    def temporary(self) -> Path:
        """Directory of unfinished commits and of payloads being deleted."""
        return self.root / "tmp"

    @property
    def locks(self) -> Path:
        """Directory of the lock files."""
        return self.root / "locks"

    @property
    def corrupt(self) -> Path:
        """Directory of objects which were set aside."""
        return self.root / "corrupt"

    @property
    def users(self) -> Path:
        """Directory of the processes that write to the store now."""
        return self.root / "users"

    @property
    def roots(self) -> Path:
        """Directory of the workspaces whose results are in the store."""
        return self.root / "roots"

    def object(self, key: str) -> Path:
        """Directory of one object.

        Raises:
            StoreError: if the key is none.
        """
        if not is_key(key):
            raise StoreError(
                f"{key!r} is no key of a store: a key is 64 lower-case hexadecimal digits. Make it with stage_key."
            )
        return self.objects / key[:2] / key

    def new_temporary(self, key: str) -> Path:
        """A fresh name below `temporary`; nothing is created."""
        return self.temporary / temporary_name(key)


def open_root(root: Path) -> StorePaths:
    """Creates a store or checks an existing one. Several processes may do so at the same time.

    Raises:
        StoreError: if the directory holds something else, or a store of another schema.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"The store {root} cannot be created: a file is in the way. Choose another path.") from error
    if not (root / _FORMAT_FILE).exists():
        _create_format(root)
    _check_format(root)
    paths = StorePaths(root)
    for directory in (paths.objects, paths.temporary, paths.locks):
        directory.mkdir(exist_ok=True)
    return paths


def _create_format(root: Path) -> None:
    others = sorted(item.name for item in root.iterdir() if not item.name.startswith(_FORMAT_DRAFT))
    # Another process may have created the store since the first look; its directories are then no strangers.
    if others and not (root / _FORMAT_FILE).exists():
        raise StoreError(
            f"{root} is not empty and is no store: it has no {_FORMAT_FILE} but holds {others[:5]}. "
            "Choose an empty or new directory, or move these files aside."
        )
    draft = root / f"{_FORMAT_DRAFT}{secrets.token_hex(8)}"
    write_file(draft, json.dumps({"format": FORMAT, "schema": SCHEMA}) + "\n")
    draft.replace(root / _FORMAT_FILE)
    sync(root)


def _check_format(root: Path) -> None:
    path = root / _FORMAT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} cannot be read as JSON ({error}). Move {root} aside and start again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StoreError(f"{path} says that this is no {FORMAT}: {found!r}. Choose another directory.")
    if found.get("schema") != SCHEMA:
        raise StoreError(
            f"The store {root} has schema {found.get('schema')!r}, but this version of Surgeon reads schema {SCHEMA}. "
            "Move the store aside (a new one is then computed), or use the version of Surgeon that wrote it."
        )
