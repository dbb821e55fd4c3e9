"""Reads `data/manifest.json`: the results of the last run by readable name."""

from flows.workspace import Workspace, read_json
from surgeon.errors import InputError
from surgeon.store import Reference
from surgeon.store.arrays import check_name


def read_references(workspace: Workspace) -> dict[str, Reference] | None:
    """References by readable name, which lies inside the view, wherever the manifest came from; None if there is none.

    Raises:
        InputError: a name or a reference is none.
    """
    found = read_json(workspace.manifest)
    if found is None:
        return None
    references = {}
    for name, value in found.items():
        try:
            check_name(name)
            references[name] = Reference.from_json(value)
        except (ValueError, TypeError) as error:
            raise InputError(f"{workspace.manifest}, {name!r}: {error}") from error
    return references
