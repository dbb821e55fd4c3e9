"""Who runs tasks: plain calls (inline), or Prefect, which shows and records them.

The tasks are the same; neither engine's cache is used (the store is the one source of truth). Either may have a pool of
workers (`flows/pool.py`) for tasks that can run side by side.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flows.pool import Pool
from tasks.stage import Outcome, WorkLeftError, only_looking

T = TypeVar("T")


@dataclass
class StageTally:
    """What happened in a stage: tasks executed and found in the store, and seconds by kind of task."""

    executed: int = 0
    cached: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What a stage has found, for people.

    Attributes:
        name: short and of lower-case letters, the same for the same kind of finding.
        title: what it is.
        rows: of a table, each with a text for every column; empty where it is not a table.
        text: in Markdown; empty where it is a table.
    """

    name: str
    title: str
    rows: tuple[Mapping[str, str], ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Job:
    """A task to be run beside others.

    Attributes:
        body: the task.
        args: what it is called with; the first is the context.
        name: of the task.
    """

    body: Callable[..., Outcome[Any]]
    args: tuple[Any, ...]
    name: str


class TaskObserver:
    """Is told about tasks; the base class does nothing."""

    is_shown = False
    """Whether a user sees how far the run is, so that the time it takes is worth knowing."""

    def plan(self, seconds: Mapping[str, float]) -> None:
        """How long each task that will be executed is expected to take, by name."""

    def stage_started(self, name: str) -> None:
        """A stage begins; stages may contain stages."""

    def task_started(self, name: str) -> None:
        """A task begins."""

    def task_finished(self, name: str, cached: bool) -> None:
        """A task has ended."""

    def tasks_reused(self, names: list[str]) -> None:
        """Tasks were not asked for, because a finished result stands for all of them."""

    def found(self, finding: Finding) -> None:
        """Something to show has been found."""


class Engine(ABC):
    """Runs stages (flows) and tasks, and keeps count."""

    name: str

    def __init__(self, observer: TaskObserver | None = None, pool: Pool | None = None) -> None:
        self.observer = observer or TaskObserver()
        self.pool = pool
        self.tallies: dict[str, StageTally] = {}
        self._stages: list[str] = []
        self._only_looks = False

    @property
    def tally(self) -> StageTally:
        """Count of the stage that is running."""
        return self.tallies.setdefault(self._stages[-1] if self._stages else "", StageTally())

    def stage(self, name: str, body: Callable[[], T]) -> T:
        """Runs a stage; stages may contain stages."""
        self._stages.append(name)
        start = time.perf_counter()
        try:
            return self._run_stage(name, lambda: self._announced(name, body))
        finally:
            self.tally.elapsed_s += time.perf_counter() - start
            self._stages.pop()

    def task(self, body: Callable[..., Outcome[T]], *args: Any, name: str) -> T:
        """Runs a task and returns its value (a reference, or several)."""
        self.observer.task_started(name)
        outcome: Outcome[T] = self._run_task(body, args, name)
        self._count(name, outcome)
        return outcome.value

    def tasks(self, jobs: Sequence[Job]) -> list[Any]:
        """Runs tasks that do not depend on each other, side by side where there are workers.

        Returns:
            Their values, in the order of the jobs.
        """
        if self.pool is None or self._only_looks:
            return [self.task(job.body, *job.args, name=job.name) for job in jobs]
        values: dict[int, Any] = {}
        missing: dict[int, Job] = {}
        for index, job in enumerate(jobs):
            if _is_there(job):
                values[index] = self.task(job.body, *job.args, name=job.name)
            else:
                missing[index] = job
        if missing:
            self.pool.start()
            self.observer.task_started(next(iter(missing.values())).name)
        for index, outcome in self._run_jobs(missing, self.pool):
            values[index] = outcome.value
            self._count(missing[index].name, outcome)
            self.observer.task_started(missing[index].name)
        return [values[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Ends the workers, if there are any."""
        if self.pool is not None:
            self.pool.close()

    def _count(self, name: str, outcome: Outcome[Any]) -> None:
        self.observer.task_finished(name, outcome.cached)
        tally = self.tally
        if outcome.cached:
            tally.cached += 1
        else:
            tally.executed += 1
            kind = name.rsplit("/", 1)[-1]
            tally.seconds[kind] = tally.seconds.get(kind, 0.0) + outcome.seconds

    def reuse(self, names: list[str]) -> None:
        """Counts tasks that were not even asked for, because a result made from all of them was there."""
        self.tally.cached += len(names)
        self.observer.tasks_reused(names)

    def _announced(self, name: str, body: Callable[[], T]) -> T:
        self.observer.stage_started(name)
        return body()

    def _run_jobs(self, jobs: Mapping[int, Job], pool: Pool) -> Iterator[tuple[int, Outcome[Any]]]:
        """Runs jobs side by side and yields what they return, in the order in which they end."""
        with ThreadPoolExecutor(pool.workers) as threads:
            running = {threads.submit(pool.run, job.body, job.args): index for index, job in jobs.items()}
            try:
                for future in as_completed(running):
                    yield running[future], future.result()
            finally:
                for future in running:
                    future.cancel()

    @abstractmethod
    def _run_stage(self, name: str, body: Callable[[], T]) -> T: ...

    @abstractmethod
    def _run_task(self, body: Callable[..., Outcome[T]], args: tuple[Any, ...], name: str) -> Outcome[T]: ...


def _is_there(job: Job) -> bool:
    """Whether a task would only find its results."""
    try:
        with only_looking():
            job.body(*job.args)
    except WorkLeftError:
        return False
    return True


class InlineEngine(Engine):
    """Calls everything directly: no server, no other process."""

    name = "inline"

    def _run_stage(self, name: str, body: Callable[[], T]) -> T:  # noqa: ARG002
        return body()

    def _run_task(self, body: Callable[..., Outcome[T]], args: tuple[Any, ...], name: str) -> Outcome[T]:  # noqa: ARG002
        return body(*args)
