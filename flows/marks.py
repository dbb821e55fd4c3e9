"""What is needed: the keys that the files of a workspace name, now and in every version that DVC knows."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.revisions import Revision, experiment_folders, revisions
from flows.workspace import Workspace
from surgeon.errors import StoreError
from surgeon.store.root import is_key


@dataclass
class Marks:
    """Needed keys.

    Attributes:
        reasons: why a key is needed, the first reason found.
        unknown: versions whose results cannot be told, because what they name is not on this machine.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, keys: Iterable[str], reason: str) -> None:
        """Marks keys, unless there is a reason already."""
        for key in keys:
            self.reasons.setdefault(key, reason)


def keys_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value that could be a key.

    Digests look the same and are taken too: they name no object, so they protect nothing, and nothing that is needed
    can be overlooked because it stands in another field.
    """
    if isinstance(value, str):
        if is_key(value):
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from keys_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_in(item)


def find_marks(homes: Iterable[Path]) -> Marks:
    """Marks of workspaces: of their files, of running and finished DVC experiments, of tags and branches.

    Args:
        homes: directories of the workspaces.

    Raises:
        StoreError: if a workspace is gone or a file of it cannot be read.
    """
    marks = Marks()
    for home in homes:
        if not home.is_dir():
            raise StoreError(
                f"The workspace {home} has results in this store, but is not there, so nothing can be said about what "
                f"it needs. Bring it back or, if it is gone for good, give --forget {home} too."
            )
        marks.add(_workspace_keys(home), f"workspace {home}")
        for folder in experiment_folders(home):
            marks.add(_workspace_keys(folder), f"experiment at work in {home}")
        for revision in revisions(home):
            _add_revision(marks, home, revision)
    return marks


def _add_revision(marks: Marks, home: Path, revision: Revision) -> None:
    for name, text in revision.files.items():
        try:
            marks.add(keys_in(json.loads(text)), f"{revision.name} of {home}")
        except ValueError:
            marks.unknown.append(f"{revision.name} of {home}: {name} is no JSON")
    if revision.missing:
        marks.unknown.append(f"{revision.name} of {home}: {revision.missing}")


def _workspace_keys(home: Path) -> Iterator[str]:
    data = Workspace(home).data
    made = [*sorted(data.glob("stages/*.json")), *sorted(data.glob("compare/*.json"))]
    for path in (data / "manifest.json", data / "recovery.json", *made):
        if path.is_file():
            try:
                yield from keys_in(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise StoreError(
                    f"{path} cannot be read ({error}), so what it needs is not known. Repair or remove that file."
                ) from error
