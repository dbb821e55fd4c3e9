"""Takes objects of a view back into a store: after `dvc pull`, or when a store was cleaned or lost.

Nothing is believed: an object is taken in only if what lies in the view gives the digest that is expected of it.
"""

from pathlib import Path

from surgeon.errors import CorruptObjectError
from surgeon.store.files import remove_tree, sync_tree, walk_files
from surgeon.store.keys import digest_sorted
from surgeon.store.payload import write_foreign_marker
from surgeon.store.reading import StoredObject, read_reference
from surgeon.store.reference import Reference
from surgeon.store.root import GROUP_FILE
from surgeon.store.store import Store
from surgeon.store.view import link_or_copy
from surgeon.store.writing import write_record


def take_in(store: Store, reference: Reference, source: Path) -> bool:
    """Takes one object of a view into a store as hard links (copies where links are impossible).

    Args:
        store: takes the object.
        reference: what the object should be.
        source: the object's group in the view. If its arrays are not there, it was evicted, and only its reference is
            taken in; should it be computed here, its content may then be another.

    Returns:
        Whether anything was taken in: not if the object is there already.

    Raises:
        CorruptObjectError: if what lies in the view is not that object.
    """
    has_arrays = not reference.arrays or all((source / name).is_dir() for name in reference.arrays)
    if store.lookup(reference.key, label="") is not None and (store.has_payload(reference.key) or not has_arrays):
        return False
    staging = store.staging(reference.key)
    try:
        _link_files(source, staging, reference, has_arrays)
        _check_reference(staging, reference)
        if has_arrays:
            _check_content(staging, reference)
        else:
            write_foreign_marker(staging)
        # How long the computation took is not known here.
        write_record(staging, reference.label, {"seconds": None, "taken_in": True})
        sync_tree(staging)
        store.publish(staging, reference)
    finally:
        remove_tree(staging)
    return True


def _link_files(source: Path, staging: Path, reference: Reference, has_arrays: bool) -> None:
    """Links the files of an object, and nothing of other objects that lie below it in the view."""
    staging.mkdir(parents=True)
    names = list(reference.arrays) if has_arrays else []
    groups = {Path(*parts[:depth]) for parts in (Path(n).parts for n in names) for depth in range(len(parts))}
    files = [group / GROUP_FILE for group in sorted({Path(), *groups})]
    files += [name / path for name in map(Path, names) for path in walk_files(source / name)]
    for file in files:
        # DVC's cache may be on another disk, and the view then is symbolic links into it.
        origin, target = (source / file).resolve(), staging / file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            link_or_copy(origin, target)
        except FileNotFoundError as error:
            raise CorruptObjectError(f"{source / file} is missing in the view.", reference.key) from error


def _check_reference(staging: Path, reference: Reference) -> None:
    found = read_reference(staging, reference.key)
    if found is None or {**found.to_json(), "label": reference.label} != reference.to_json():
        raise CorruptObjectError(f"{reference.describe()} in the view is not what the manifest says.", reference.key)


def _check_content(staging: Path, reference: Reference) -> None:
    stored = StoredObject(staging, reference)
    digest = digest_sorted(stored.stored_arrays(), stored.attributes)
    if digest != reference.digest:
        raise CorruptObjectError(
            f"{reference.describe()} in the view has the digest {digest}, but {reference.digest} was committed.",
            reference.key,
        )
