"""A run's objects under readable names, as one Zarr hierarchy of hard links.

The view takes no space of its own and can be browsed with `zarr.open_group`. Symmetric matrices appear packed, as
vectors with the attributes `layout` and `n`.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgeon.errors import StoreError
from surgeon.store.arrays import check_name
from surgeon.store.files import is_stale, remove_tree, temporary_name, walk_files
from surgeon.store.keys import SCHEMA, canonical_json, digest_text
from surgeon.store.root import EVICTED_FILE, GROUP_FILE, RECORD_FILE
from surgeon.store.store import Store

VIEW_FORMAT = "surgeon-view"

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)
"""Linking is impossible between file systems, on some file systems, and for files with too many links."""


def build_view(store: Store, entries: Mapping[str, str], destination: Path) -> None:
    """Builds a view beside its destination and swaps it in; an earlier view is replaced, unless it is the same.

    Args:
        store: where the objects are.
        entries: key of the object by its readable name, such as "shot-03/block-07/costs"; the arrays of the object
            appear below it. Evicted objects appear as groups without arrays.
        destination: such as `data/run.zarr`.

    Raises:
        StoreError: if an object is not in the store, two objects claim the same place, or something that is no view
            is at the destination.
        ValueError: if a name cannot be a path of groups.
    """
    for name in entries:
        check_name(name)
    _require_replaceable(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}"
    for leftover in destination.parent.glob(f"{prefix}-*"):
        if is_stale(leftover.name):
            remove_tree(leftover)
    content = _content(store, entries)
    if _read_attributes(destination).get("content") == content and _is_linked(store, entries, destination):
        return
    draft = destination.with_name(temporary_name(prefix))
    try:
        draft.mkdir()
        _write_group(draft, {"format": VIEW_FORMAT, "schema": SCHEMA, "content": content})
        for name in sorted(entries, key=lambda text: text.split("/")):
            _make_parents(draft, name)
            _link_object(store, entries[name], draft, name)
        _swap(draft, destination)
    finally:
        remove_tree(draft)


def _require_replaceable(destination: Path) -> None:
    if destination.exists() and _read_attributes(destination).get("format") != VIEW_FORMAT:
        raise StoreError(f"{destination} exists and is no view, so it is not replaced. Move it aside.")


def _read_attributes(destination: Path) -> dict[str, Any]:
    """Attributes of a view; empty if it is none."""
    try:
        return dict(json.loads((destination / GROUP_FILE).read_text(encoding="utf-8"))["attributes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _content(store: Store, entries: Mapping[str, str]) -> str:
    """Digest of what a view shows: names, keys, and which of the objects have their arrays."""
    return digest_text(canonical_json({name: [key, store.has_payload(key)] for name, key in entries.items()}))


def _is_linked(store: Store, entries: Mapping[str, str], destination: Path) -> bool:
    """Whether a view's objects are those of the store, none made again since (because it was damaged)."""
    pairs = [(store.path(key) / GROUP_FILE, destination / name / GROUP_FILE) for name, key in entries.items()]
    return all(shown.exists() and shown.samefile(stored) for stored, shown in pairs)


def _write_group(directory: Path, attributes: Mapping[str, Any]) -> None:
    content = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    (directory / GROUP_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _make_parents(draft: Path, name: str) -> None:
    """Makes the groups above an object, and refuses to put it into an array."""
    parts = name.split("/")
    for depth in range(1, len(parts)):
        parent = draft.joinpath(*parts[:depth])
        parent.mkdir(exist_ok=True)
        metadata = parent / GROUP_FILE
        if not metadata.exists():
            _write_group(parent, {})
        elif json.loads(metadata.read_text(encoding="utf-8"))["node_type"] != "group":
            raise _conflict(name, parent.relative_to(draft))


def _link_object(store: Store, key: str, draft: Path, name: str) -> None:
    if store.lookup(key, label=name) is None:
        raise StoreError(f"The view's entry {name!r} names the object {key}, which {store.root} does not have.")
    source, has_arrays = store.path(key), store.has_payload(key)
    if has_arrays:
        store.fetch(key)
    with store.frozen(key):
        paths = walk_files(source) if has_arrays else iter([Path(GROUP_FILE)])
        for path in paths:
            if path.as_posix() in (RECORD_FILE, EVICTED_FILE):
                continue
            target = draft / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                link_or_copy(source / path, target)
            except FileExistsError as error:
                raise _conflict(name, target.relative_to(draft)) from error


def _conflict(name: str, place: Path) -> StoreError:
    return StoreError(f"The view's entry {name!r} claims {place}, where another entry lies. Rename one of them.")


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where that is impossible."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)


def _swap(draft: Path, destination: Path) -> None:
    if not destination.exists():
        draft.rename(destination)
        return
    old = destination.with_name(temporary_name(f".{destination.name}"))
    destination.rename(old)
    try:
        draft.rename(destination)
    except OSError:
        old.rename(destination)
        raise
    remove_tree(old)
