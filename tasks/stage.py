"""The one way a task makes a result: key → look up → compute → commit → small reference."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from surgeon.peak import peak_gib, reset_peak
from surgeon.store import Reference, Store, stage_key

T = TypeVar("T")
P = TypeVar("P")


class Site(Protocol):
    """Where a result goes, and what every key holds; a `Context` is one."""

    @property
    def store(self) -> Path:
        """Directory of the store."""

    @property
    def device(self) -> str:
        """Kind of device the numbers come from."""

    @property
    def arithmetic(self) -> str:
        """The same with all else of the machine that they depend on."""

    @property
    def dtype(self) -> str:
        """Number format they are computed in."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a task returns.

    Attributes:
        value: a reference, or several.
        cached: whether everything was there already.
        seconds: time spent computing and committing in this call; 0 if cached.
    """

    value: T
    cached: bool
    seconds: float


@dataclass(frozen=True)
class Product:
    """A result before it is committed: arrays by name, and small facts that belong to its content."""

    arrays: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A kind of result. Raise `version` when its numerics change: results of other versions are never reused.

    Attributes:
        kind: name, as in the store and in the timings.
        version: of the numerics.
        sources: modules the numbers depend on, as dotted names (a test watches them).
    """

    kind: str
    version: int
    sources: tuple[str, ...]

    def key(self, context: Site, parameters: Mapping[str, Any], inputs: Mapping[str, str | Sequence[str]]) -> str:
        """Key of the result made from these parameters and inputs (content digests) on this kind of device."""
        return stage_key(self.kind, self.version, parameters, inputs, context.arithmetic, context.dtype)


@dataclass(frozen=True)
class Request:
    """One result asked for.

    Attributes:
        stage: kind and version.
        parameters: only those the stage reads.
        inputs: content digests of what it reads.
        label: readable name, for example "shot-01/block-07/costs"; not part of the key.
    """

    stage: Stage
    parameters: Mapping[str, Any]
    inputs: Mapping[str, str | Sequence[str]]
    label: str

    def key(self, context: Site) -> str:
        """The key under which the result is or will be stored."""
        return self.stage.key(context, self.parameters, self.inputs)


def readable(store: Store, key: str) -> Reference | None:
    """The reference of a result whose arrays are there too; None if it is missing or was evicted."""
    return store.lookup(key) if store.has_payload(key) else None


def produce(
    context: Site, request: Request, compute: Callable[[], Product], store: Store | None = None
) -> Outcome[Reference]:
    """Returns the stored result, or computes and commits it.

    Two processes that want the same result do not both compute it: the second waits for the first.
    """
    outcome = produce_all(context, {None: request}, request.key(context), lambda _missing: {None: compute}, store)
    (reference,) = outcome.value
    return Outcome(reference, outcome.cached, outcome.seconds)


class WorkLeftError(Exception):
    """Something would have to be computed, which was not allowed."""


_ONLY_LOOKING: ContextVar[bool] = ContextVar("only_looking", default=False)


@contextmanager
def only_looking() -> Iterator[None]:
    """Tasks find their results or raise `WorkLeftError`; none computes anything."""
    token = _ONLY_LOOKING.set(True)
    try:
        yield
    finally:
        _ONLY_LOOKING.reset(token)


def begin() -> float:
    """Begins a computation, of every task, and its measurement; returns what `commit` wants as ``start``.

    Raises:
        WorkLeftError: see `only_looking`.
    """
    if _ONLY_LOOKING.get():
        raise WorkLeftError
    reset_peak()
    return time.perf_counter()


def produce_all(
    context: Site,
    requests: Mapping[P, Request],
    lock_key: str,
    compute: Callable[[Collection[P]], dict[P, Callable[[], Product]]],
    store: Store | None = None,
) -> Outcome[list[Reference]]:
    """Several results of one computation: looks up those that are there, computes and commits the others.

    Args:
        context: where.
        requests: what is wanted, by any name.
        lock_key: processes that want any of this together do it one after the other.
        compute: given the names of all that is missing, returns how to make each product, which is then done for one
            after the other, so that not all are in memory twice.
        store: where to; None opens that of the context.

    Returns:
        References in the order of the requests.
    """
    store = store or Store(context.store)
    keys = {name: request.key(context) for name, request in requests.items()}
    found = {name: readable(store, key) for name, key in keys.items()}
    start = time.perf_counter()
    cached = True
    if None in found.values():
        with store.lock(lock_key):
            found = {name: readable(store, key) for name, key in keys.items()}
            missing = [name for name, reference in found.items() if reference is None]
            if missing:
                cached, start = False, begin()
                makers = compute(missing)
                share = (time.perf_counter() - start) / len(missing)
                for name in missing:
                    begun = time.perf_counter() - share
                    found[name] = commit(context, requests[name], makers.pop(name)(), begun, store).value
    references = [reference for reference in found.values() if reference is not None]
    return Outcome(references, cached, 0.0 if cached else time.perf_counter() - start)


def commit(
    context: Site, request: Request, product: Product, start: float, store: Store | None = None
) -> Outcome[Reference]:
    """Commits a computed result; ``start`` is what `begin` returned before it was computed."""
    reference = (store or Store(context.store)).commit(
        request.key(context),
        request.stage.kind,
        product.arrays,
        dict(product.attributes),
        label=request.label,
        parameters=dict(request.parameters),
        seconds=time.perf_counter() - start,
        peak_memory_gib=peak_gib(),
    )
    return Outcome(reference, cached=False, seconds=time.perf_counter() - start)


def read_arrays(context: Site, key: str) -> dict[str, "np.ndarray[Any, Any]"]:
    """All arrays of a stored object, checked."""
    stored = Store(context.store).open(key)
    return {name: stored.array(name) for name in stored.names()}
