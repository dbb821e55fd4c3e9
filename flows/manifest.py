"""Reads the manifests: the results of the last run by readable name."""

from pathlib import Path

from flows.workspace import Workspace, read_json
from surgeon.errors import InputError
from surgeon.store import Reference
from surgeon.store.arrays import check_name


def read_references(workspace: Workspace) -> dict[str, Reference] | None:
    """References by readable name, which lies inside a view, wherever the manifest came from; None if there is none.

    Those of the recovery stage come with those of the prune stage, where it has run.

    Raises:
        InputError: a name or a reference is none.
    """
    pruned = _read(workspace.manifest)
    return None if pruned is None else pruned | (_read(workspace.recovery_manifest) or {})


def _read(path: Path) -> dict[str, Reference] | None:
    found = read_json(path)
    if found is None:
        return None
    references = {}
    for name, value in found.items():
        try:
            check_name(name)
            references[name] = Reference.from_json(value)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}, {name!r}: {error}") from error
    return references
