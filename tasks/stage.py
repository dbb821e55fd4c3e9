"""The one way a task makes a result: key → look up → compute → commit → small reference."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from traceback import clear_frames
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from surgeon.choices import Precision
from surgeon.errors import BatchMemoryError, MemoryShortageError
from surgeon.peak import peak_gib, reset_peak
from surgeon.precision import only_tf32_here
from surgeon.store import Reference, Store, StorePlace, stage_key
from tasks.writing import current_backlog, write_all, writers_for

T = TypeVar("T")
P = TypeVar("P")


class Site(Protocol):
    """Where a result goes, and what every key holds; a `Context` is one."""

    @property
    def store(self) -> StorePlace:
        """Where the store is."""

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
    *,
    urgent: Collection[P] | None = None,
) -> Outcome[list[Reference]]:
    """Several results of one computation: looks up those that are there, computes and commits the others.

    Args:
        context: where.
        requests: what is wanted, by any name.
        lock_key: processes that want any of this together do it one after the other.
        compute: given the names of all that is missing, returns how to make each product, which is then done for one
            after the other, so that not all are in memory twice.
        store: where to; None opens that of the context.
        urgent: those that the work after this waits for; the others may still be written behind it where that is
            allowed (`tasks.writing.writing_behind`), and their references are then not returned. None: all.

    Returns:
        References in the order of the requests.

    Raises:
        BatchMemoryError: a GPU had not enough memory for what fewer sequences at a time take less of.
        MemoryShortageError: a GPU had not enough memory for something else.
    """
    store = store or context.store.open()
    keys = {name: request.key(context) for name, request in requests.items()}
    found = {name: readable(store, key) for name, key in keys.items()}
    start = time.perf_counter()
    cached = True
    if None in found.values():
        with ExitStack() as held:
            held.enter_context(store.lock(lock_key))
            found = {name: readable(store, key) for name, key in keys.items()}
            missing = [name for name, reference in found.items() if reference is None]
            if missing:
                cached, start = False, begin()
                with _within_memory(requests), only_tf32_here(context.dtype == Precision.TF32):
                    makers = compute(missing)
                    share = (time.perf_counter() - start) / len(missing)
                    backlog = None if urgent is None else current_backlog()
                    at_once = missing if backlog is None else [name for name in missing if name in (urgent or ())]
                    how = partial(_made, context, requests, makers, share, store)
                    found |= write_all([(name, partial(how, name)) for name in at_once], writers_for(context.device))
                    if backlog is not None and makers:
                        backlog.add([(name, partial(how, name)) for name in list(makers)], held.pop_all().close)
    references = [reference for reference in found.values() if reference is not None]
    return Outcome(references, cached, 0.0 if cached else time.perf_counter() - start)


def _made(
    context: Site,
    requests: Mapping[P, Request],
    makers: dict[P, Callable[[], Product]],
    share_s: float,
    store: Store,
    name: P,
) -> Callable[[], Reference]:
    """Makes a product, which is then no longer among the makers, and returns how to commit it."""
    begun = time.perf_counter() - share_s
    product = makers.pop(name)()
    return lambda: commit(context, requests[name], product, begun, store).value


@contextmanager
def _within_memory(requests: Mapping[P, Request]) -> Iterator[None]:
    """Turns a GPU's lack of memory into an error that says whether smaller batches would help.

    It goes through any process boundary, and holds nothing of what was in that memory.
    """
    failed = ""
    try:
        yield
    except torch.OutOfMemoryError as error:
        failed = _first_line(error)
        clear_frames(error.__traceback__)
    except MemoryShortageError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        failed = str(error)
        clear_frames(error.__cause__.__traceback__)
    if not failed:
        return
    request = next(iter(requests.values()))
    where = f"{request.label} ran out of memory of the GPU ({failed})."
    if "batch_size" in request.parameters:
        raise BatchMemoryError(where)
    raise MemoryShortageError(
        f"{where} Fewer sequences at a time would not help: use a GPU with more memory, run.device=cpu, or end what "
        "else takes its memory. What was finished is kept."
    )


def _first_line(error: Exception) -> str:
    text = str(error)
    return text.splitlines()[0].rstrip(".") if text else "no more is there"


def commit(
    context: Site, request: Request, product: Product, start: float, store: Store | None = None
) -> Outcome[Reference]:
    """Commits a computed result; ``start`` is what `begin` returned before it was computed."""
    reference = (store or context.store.open()).commit(
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
    stored = context.store.open().open(key)
    return {name: stored.array(name) for name in stored.names()}
