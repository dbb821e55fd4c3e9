"""A store seen through a plan: what a run would commit, drop and restore is noted in memory, and nothing is written."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from surgeon.store.arrays import StorableArray
from surgeon.store.reading import StoredObject
from surgeon.store.reference import Reference
from surgeon.store.store import Store

_PROMISED = "planned-"


def promised_digest(name: str) -> str:
    """A digest that no content has, for what is not there yet."""
    return f"{_PROMISED}{name}"


def is_promised(digest: str) -> bool:
    """Whether a digest is one of `promised_digest`."""
    return digest.startswith(_PROMISED)


@dataclass(frozen=True)
class Change:
    """What a run will do to an object: write its arrays, or drop them."""

    key: str
    kind: str
    label: str
    is_written: bool


class PlannedStore(Store):
    """Answers as the store would at that point of the run.

    A promised object has a made-up digest, which no stored object has: what is made from it counts as missing.

    Args:
        real: the store it stands for, which is only read.

    Attributes:
        changes: what was promised and dropped so far, in order.
    """

    def __init__(self, real: Store) -> None:
        super().__init__(real.root)
        self._real = real.quiet()
        self._promised: dict[str, Reference] = {}
        self._has_arrays: dict[str, bool] = {}
        self.changes: list[Change] = []

    def lookup(self, key: str, *, label: str | None = None) -> Reference | None:
        """The reference of an object that is there, or will be."""
        return self._promised.get(key) or self._real.lookup(key, label=label)

    def has_payload(self, key: str) -> bool:
        """Whether the arrays of an object are there, or will be."""
        found = self._has_arrays.get(key)
        return self._real.has_payload(key) if found is None else found

    def open(self, key: str) -> StoredObject:
        """Opens an object that is there."""
        return self._real.open(key)

    def promise(self, key: str, kind: str, attributes: Mapping[str, Any], label: str = "") -> Reference:
        """Counts an object as there from now on, with its arrays.

        Returns:
            Its reference: that of the store, if only its arrays are missing, or one with a made-up digest.
        """
        self._has_arrays[key] = True
        self.changes.append(Change(key, kind, label, is_written=True))
        known = self.lookup(key)
        if known is None:
            known = self._promised[key] = Reference(key, kind, promised_digest(key), {}, dict(attributes), label)
        return known

    def commit(
        self,
        key: str,
        kind: str,
        arrays: Mapping[str, StorableArray],  # noqa: ARG002 (as Store)
        attributes: Mapping[str, Any],
        *,
        label: str = "",
        parameters: Mapping[str, Any] | None = None,  # noqa: ARG002
        seconds: float | None = None,  # noqa: ARG002
        peak_memory_gib: float | None = None,  # noqa: ARG002
    ) -> Reference:
        """Promises the object."""
        return self.promise(key, kind, attributes, label)

    def evict(self, key: str) -> None:
        """Counts the arrays of an object as dropped."""
        found = self.lookup(key)
        assert found is not None, f"{key} is not there to be dropped"
        self._has_arrays[key] = False
        self.changes.append(Change(key, found.kind, found.label, is_written=False))

    def lock(self, key: str, timeout_s: float | None = None) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing is computed, so nothing is locked."""
        return nullcontext()
