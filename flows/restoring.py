"""Fills the store again from the workspace: from the view, the manifest and what stages wrote down.

These three are what DVC tracks; the store is not. After `dvc pull` in a new clone, or `dvc checkout` of an old version
after a clean, this makes everything they name a hit again, without a second copy on disk.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from flows.manifest import read_references
from flows.workspace import Workspace, read_json
from surgeon.errors import CorruptObjectError, InputError, StoreError
from surgeon.store import Presence, Reference, Store, digest_arrays, register, registered, take_in

SAMPLE = "sample"


@dataclass
class Restored:
    """What was done, in numbers of objects.

    Attributes:
        taken: with all their arrays, checked.
        references: of objects whose arrays the view does not have.
        there: before.
        damaged: not taken, because what lies in the view is not what the manifest says; one line each.
    """

    taken: int
    references: int
    there: int
    damaged: list[str]

    def to_json(self) -> dict[str, Any]:
        """As a dict for JSON."""
        return asdict(self)

    def raise_damage(self) -> None:
        """Raises an error if something could not be taken in.

        Raises:
            StoreError: saying how much and what to do.
        """
        if self.damaged:
            raise StoreError(
                f"{len(self.damaged)} results of the view are damaged and were not taken in; the others were. Get them "
                "again (`dvc checkout --force`, `dvc pull`), or run: they are then computed."
            )


def refill(workspace: Workspace, say: Callable[[str], None] = lambda _line: None) -> None:
    """Restores the run of a workspace in which no command ever ran, as in a new clone after `dvc pull`.

    In any other, what a store lacks may be missing on purpose (another store, to compare machines; a store removed, to
    compute all again), and only `surgeon restore` brings it back.
    """
    if not (workspace.manifest.is_file() and workspace.view.is_dir()) or workspace.timing_file("model").parent.exists():
        return
    if workspace.store.root.is_dir() and workspace.home in registered(workspace.store.root):
        return
    say(f"taking in {workspace.view}, which was made elsewhere")
    restored = restore(workspace)
    for line in restored.damaged:
        say(line)
    register(workspace.store.root, workspace.home)


def restore(workspace: Workspace) -> Restored:
    """Takes all results of the workspace's run that the store lacks in from `data/run.zarr`.

    Raises:
        InputError: if there is no manifest or no view.
    """
    references = read_references(workspace)
    if references is None or not workspace.view.is_dir():
        missing = workspace.view if references is not None else workspace.manifest
        raise InputError(f"{missing} is missing, so there is nothing to restore from; get it with `dvc pull`")
    presence = Presence(workspace.store.root, "surgeon restore")
    try:
        return _restore(workspace, references)
    finally:
        presence.leave()


def _restore(workspace: Workspace, references: dict[str, Reference]) -> Restored:
    store = workspace.store.open()
    done = Restored(0, 0, 0, [])
    for name, reference in references.items():
        try:
            is_new = take_in(store, reference, workspace.view_of(name))
        except CorruptObjectError as error:
            done.damaged.append(f"{name}: {error}")
            continue
        if not is_new:
            done.there += 1
        elif store.has_payload(reference.key):
            done.taken += 1
        else:
            done.references += 1
    done.taken += _restore_samples(workspace, store)
    return done


def _restore_samples(workspace: Workspace, store: Store) -> int:
    """Samples are made after the view; they have no arrays, and the report wrote all of them down."""
    report = read_json(workspace.stage_file("report")) or {"references": {}, "facts": {"samples": {}}}
    taken = 0
    for name, (key, digest) in report["references"].items():
        attributes = report["facts"]["samples"].get(name.removesuffix(f"/{SAMPLE}"))
        is_wanted = attributes is not None and store.lookup(key, label="") is None
        if is_wanted and digest_arrays({}, attributes) == digest:
            store.commit(key, SAMPLE, {}, attributes, label=name)
            taken += 1
    return taken
