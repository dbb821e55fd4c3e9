"""`surgeon clean`: frees the store of what nothing needs. Marks first, then sweeps."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from flows.marks import find_marks
from flows.workspace import Workspace
from surgeon.errors import InputError, StoreError
from surgeon.store import Entry, Size, Store, alone, forget, live_users, registered, size_of, survey, sweep
from surgeon.store.files import is_stale, remove_tree
from surgeon.store.root import StorePaths

GRACE_DAYS = 14.0
"""Younger results stay: a run that was killed, or is between two stages of DVC, has not written down what it needs."""


@dataclass(frozen=True)
class CleanOptions:
    """How to clean.

    Attributes:
        older_than_days: younger objects stay.
        ignore_unknown: whether to go on though what some versions need is not known.
        damaged: whether objects that were set aside go too.
        forgotten: workspaces that are gone, for which nothing is kept any more.
    """

    older_than_days: float = GRACE_DAYS
    ignore_unknown: bool = False
    damaged: bool = False
    forgotten: tuple[Path, ...] = ()


@dataclass
class Count:
    """Some objects, or other things in the store."""

    n: int = 0
    size: Size = field(default_factory=Size)

    def add(self, size: Size) -> None:
        """Counts one more."""
        self.n += 1
        self.size += size

    def to_json(self) -> dict[str, int]:
        """`freed_bytes` are those of files without another name, in a view or in DVC's cache."""
        return {"n": self.n, "bytes": self.size.n_bytes, "freed_bytes": self.size.alone_bytes}


@dataclass
class Plan:
    """What goes and what stays.

    Attributes:
        keys: of the objects that go.
        going: those by kind.
        staying: the others by reason.
        temporary: what ended processes left.
        set_aside: objects in `corrupt`.
        unknown: versions that may need more.
        workspaces: that were asked.
        users: processes that work with the store now.
    """

    keys: list[str] = field(default_factory=list)
    going: dict[str, Count] = field(default_factory=dict)
    staying: dict[str, Count] = field(default_factory=dict)
    temporary: Count = field(default_factory=Count)
    set_aside: Count = field(default_factory=Count)
    unknown: list[str] = field(default_factory=list)
    workspaces: list[Path] = field(default_factory=list)
    users: list[dict[str, Any]] = field(default_factory=list)


def clean(workspace: Workspace, options: CleanOptions, *, remove: bool) -> dict[str, Any]:
    """Says what nothing needs and, if wanted, removes it.

    Args:
        workspace: whose store is cleaned; all other workspaces of the store are asked too.
        options: what counts as needed.
        remove: whether to remove it; otherwise nothing is changed.

    Returns:
        What went or would go, by kind, and why the rest stays (docs/retention.md).

    Raises:
        InputError: if there is no store.
        StoreError: if what is needed cannot be told, or a process works with the store.
    """
    if not workspace.store.root.is_dir():
        raise InputError(f"there is no store at {workspace.store.root}, so there is nothing to clean")
    store = Store(workspace.store.root)
    guard: AbstractContextManager[None] = alone(store.root) if remove else nullcontext()
    with guard:
        plan = _plan(store, workspace, options)
        if remove:
            _require_known(plan, options)
            for gone in options.forgotten:
                forget(store.root, gone)
            sweep(store, plan.keys)
            store.clear_stale_tmp()
            if options.damaged:
                remove_tree(StorePaths(store.root).corrupt)
    return _to_json(store, plan, options, remove)


def _plan(store: Store, workspace: Workspace, options: CleanOptions) -> Plan:
    homes = {workspace.home, *_registered(store.root, options.forgotten)}
    marks = find_marks(sorted(homes))
    plan = Plan(unknown=marks.unknown, workspaces=sorted(homes), users=live_users(store.root))
    border = datetime.now(UTC) - timedelta(days=options.older_than_days)
    for entry in survey(store):
        reason = marks.reasons.get(entry.key) or _too_young(entry, border, options)
        if reason:
            plan.staying.setdefault(reason, Count()).add(entry.size)
        else:
            plan.keys.append(entry.key)
            plan.going.setdefault(entry.kind, Count()).add(entry.size)
    paths = StorePaths(store.root)
    for path in sorted(paths.temporary.iterdir()):
        if is_stale(path.name):
            plan.temporary.add(size_of(path))
    for path in sorted(paths.corrupt.iterdir()) if paths.corrupt.is_dir() else ():
        plan.set_aside.add(size_of(path))
    return plan


def _registered(root: Path, forgotten: Iterable[Path]) -> set[Path]:
    known, gone = set(registered(root)), {path.resolve() for path in forgotten}
    if unknown := gone - known:
        raise InputError(
            f"--forget {min(unknown)}: this is not a workspace of the store {root}; "
            f"those are: {', '.join(map(str, sorted(known))) or 'none'}"
        )
    return known - gone


def _too_young(entry: Entry, border: datetime, options: CleanOptions) -> str:
    return f"younger than {options.older_than_days:g} days" if entry.created > border else ""


def _require_known(plan: Plan, options: CleanOptions) -> None:
    if plan.unknown and not options.ignore_unknown:
        raise StoreError(
            f"Nothing was removed: what {len(plan.unknown)} versions need is not known, because what DVC tracks of "
            f"them is not on this machine ({'; '.join(plan.unknown[:3])}). Get it (`dvc fetch --all-branches "
            "--all-tags`), or remove all the same with --ignore-unknown: what they need is then computed again."
        )


def _to_json(store: Store, plan: Plan, options: CleanOptions, removed: bool) -> dict[str, Any]:
    going, staying = Count(), Count()
    for total, counts in ((going, plan.going), (staying, plan.staying)):
        for count in counts.values():
            total.n += count.n
            total.size += count.size
    return {
        "store": str(store.root),
        "removed": removed,
        "workspaces": [str(path) for path in plan.workspaces],
        "going": going.to_json(),
        "going_by_kind": {kind: count.to_json() for kind, count in sorted(plan.going.items())},
        "staying": staying.to_json(),
        "staying_by_reason": {reason: count.to_json() for reason, count in sorted(plan.staying.items())},
        "temporary": plan.temporary.to_json(),
        "set_aside": {**plan.set_aside.to_json(), "going": options.damaged},
        "unknown": plan.unknown,
        "in_use_by": plan.users,
    }
