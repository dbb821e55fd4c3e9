"""The workspaces whose results are in a store, so that a store that several share is never cleaned for one alone."""

import hashlib
import json
import os
from pathlib import Path

from surgeon.errors import StoreError
from surgeon.store.files import temporary_name, write_file
from surgeon.store.root import open_root


def register(root: Path, workspace: Path) -> None:
    """Writes down that a workspace has results in a store; a second call does nothing.

    A workspace that holds the store is noted relative to it, so that it may be moved as a whole.

    Raises:
        StoreError: if the directory is no store.
    """
    paths = open_root(Path(root).absolute())
    store, place = paths.root.resolve(), Path(workspace).resolve()
    text = os.path.relpath(place, store) if store.is_relative_to(place) else str(place)
    file = paths.roots / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if file.exists():
        return
    paths.roots.mkdir(exist_ok=True)
    draft = paths.temporary / temporary_name(file.stem)
    write_file(draft, json.dumps({"path": text}) + "\n")
    draft.replace(file)


def registered(root: Path) -> dict[Path, Path]:
    """The workspaces of a store: where each is, and the file that says so.

    Raises:
        StoreError: if such a file cannot be read.
    """
    store = Path(root).resolve()
    found = {}
    for file in sorted((store / "roots").glob("*.json")):
        try:
            found[(store / str(json.loads(file.read_text(encoding="utf-8"))["path"])).resolve()] = file
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{file} should name a workspace of this store, but cannot be read: {error}. Remove that file; the "
                "workspace is registered again when it runs."
            ) from error
    return found


def forget(root: Path, workspace: Path) -> None:
    """Takes a workspace out, so that nothing is kept for it any more.

    Raises:
        StoreError: if it is not registered.
    """
    known = registered(root)
    file = known.get(Path(workspace).resolve())
    if file is None:
        names = ", ".join(map(str, known)) or "none"
        raise StoreError(f"{workspace} is not a workspace of the store {root}; those are: {names}.")
    file.unlink()
