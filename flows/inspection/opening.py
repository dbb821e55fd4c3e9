"""What all views start from, and what is refused before any work."""

import re
from collections.abc import Mapping
from pathlib import Path

from flows.manifest import read_references
from flows.restoring import refill
from flows.workspace import Workspace
from surgeon.errors import InputError
from surgeon.store import Reference, Store

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def open_store(workspace: Workspace) -> Store:
    """The store of a project.

    Raises:
        InputError: there is none yet.
    """
    refill(workspace)
    if not workspace.store.exists():
        raise InputError(f"there is no store at {workspace.store} yet; `surgeon run` makes one")
    return workspace.store.open()


def read_manifest(workspace: Workspace) -> dict[str, Reference]:
    """References of the last run by readable name.

    Raises:
        InputError: no run has finished, or its results are in another store.
    """
    references = read_references(workspace)
    if references is None:
        raise InputError(
            f"{workspace.manifest} is missing: no run has finished here yet. `surgeon prune` makes it; `surgeon "
            "inspect --store` shows what an unfinished run has stored"
        )
    store = open_store(workspace)
    gone = [name for name, reference in references.items() if store.lookup(reference.key, label=name) is None]
    if gone:
        raise InputError(
            f"{len(gone)} of the {len(references)} results of the last run are not in the store {store.root} (the "
            f"first: {gone[0]}): give the store it was made with (run.store, SURGEON_STORE), or run again"
        )
    return references


def choose_shot(references: Mapping[str, Reference], asked: int | None) -> int:
    """The shot asked for, else the last.

    Raises:
        InputError: the run has no such shot.
    """
    last = max((int(found[1]) for name in references if (found := re.match(r"shot-(\d+)/", name))), default=0)
    if asked is not None and not 1 <= asked <= last:
        raise InputError(f"--shot: got {asked}, but the last run has shots 1 to {last}")
    return asked or last


def check_plot(path: Path | None) -> None:
    """Refuses a plot that could not be written, or whose format the name does not say.

    Raises:
        InputError: naming the path.
    """
    if path is None:
        return
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"--plot: {path} must end in {', '.join(PLOT_SUFFIXES[:-1])} or {PLOT_SUFFIXES[-1]}")
    if not path.parent.is_dir():
        raise InputError(f"--plot: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise InputError(f"--plot: {path} is a folder; give a file")
