"""Stages as Prefect flows and tasks as Prefect tasks.

Uses the Prefect server that is configured (`PREFECT_API_URL`), or else starts one for the time of the run, with its
database below the project, so that `prefect server start` shows past runs. Where everything is in the store already,
none is started: that would take longer than all the rest.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil

from flows.engine import Engine, Job, TaskObserver
from flows.pool import Pool
from flows.prefect_runs import is_within_a_run, mark_crashed_runs, owned_by_this_process
from flows.prefect_server import require_server
from tasks.stage import Outcome, WorkLeftError, only_looking

T = TypeVar("T")

OWNER_VARIABLE = "SURGEON_SERVER_OWNER"
"""In the environment of a server that was started for the time of a run: the process id of the run."""


def configure(root: Path) -> None:
    """Sets Prefect up for this project; what the user has set in the environment wins. Call before importing it."""
    defaults = {
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
        "PREFECT_CLI_PROMPT": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ[OWNER_VARIABLE] = str(os.getpid())


def end_orphaned_servers() -> None:
    """Ends servers that runs of this project started and did not live to stop: nothing else would ever end them."""
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except psutil.Error:
            continue
        owner = variables.get(OWNER_VARIABLE, "")
        is_ours = variables.get("PREFECT_HOME") == os.environ["PREFECT_HOME"]
        is_temporary = variables.get("PREFECT__SERVER_EPHEMERAL") == "1"
        if is_ours and is_temporary and owner.isdecimal() and not psutil.pid_exists(int(owner)):
            process.terminate()


@cache
def _as_prefect_task(body: Callable[..., Outcome[Any]], pool: Pool | None = None) -> Any:
    """A task as Prefect sees it: in this process, whoever computes it."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    def run(*args: Any) -> Any:
        outcome = body(*args) if pool is None else pool.run(body, args)
        return Completed(name="Cached", message="found in the store", data=outcome) if outcome.cached else outcome

    run.__doc__ = body.__doc__
    return task(run, name=body.__name__, cache_policy=NO_CACHE, persist_result=False)


class PrefectEngine(Engine):
    """Runs stages and tasks under Prefect, in this process; within a flow run, as parts of that one."""

    name = "prefect"

    def __init__(self, root: Path, observer: TaskObserver | None = None, pool: Pool | None = None) -> None:
        super().__init__(observer, pool)
        self._root = root
        if not is_within_a_run():
            configure(root)
            end_orphaned_servers()
            require_server()

    def _run_stage(self, name: str, body: Callable[[], T]) -> T:
        if self._only_looks:
            return body()
        is_first = len(self._stages) == 1
        if is_first and is_within_a_run():  # a deployment's, which is the flow of this stage
            with owned_by_this_process(self._root):
                mark_crashed_runs(self._root)
                return body()
        if is_first and not os.environ.get("PREFECT_API_URL"):
            with suppress(WorkLeftError):
                return self._look(body)
        return self._run_flow(name, body, is_first)

    def _look(self, body: Callable[[], T]) -> T:
        """Runs a stage without Prefect as long as nothing has to be computed.

        Raises:
            WorkLeftError: something has; nothing was counted.
        """
        before = deepcopy(self.tallies)
        self._only_looks = True
        try:
            with only_looking():
                return body()
        except WorkLeftError:
            self.tallies = before
            raise
        finally:
            self._only_looks = False

    def _run_flow(self, name: str, body: Callable[[], T], is_first: bool) -> T:
        from prefect import flow
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        def marked() -> T:
            if is_first:
                mark_crashed_runs(self._root)
            return body()

        run = flow(marked, name=f"surgeon-{name}", persist_result=False, validate_parameters=False)
        # The end of a flow waits up to a second for its heartbeat. A killed command is told by its process instead, and
        # a deployment's stages by the run that they belong to, which has a heartbeat.
        silent = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with silent, owned_by_this_process(self._root) if is_first else nullcontext():
            result: T = run()
        return result

    def _run_jobs(self, jobs: Mapping[int, Job], pool: Pool) -> Iterator[tuple[int, Outcome[Any]]]:
        """Tasks of Prefect in as many threads of this process as there are workers, which they wait for."""
        from prefect.futures import as_completed
        from prefect.task_runners import ThreadPoolTaskRunner

        with ThreadPoolTaskRunner(max_workers=pool.workers) as runner:
            running = {}
            for index, job in jobs.items():
                task = _as_prefect_task(job.body, pool).with_options(task_run_name=job.name)
                running[runner.submit(task, {"args": job.args})] = index
            try:
                for future in as_completed(list(running)):
                    yield running[future], future.result()
            finally:
                for future in running:
                    future.wrapped_future.cancel()

    def _run_task(self, body: Callable[..., Outcome[T]], args: tuple[Any, ...], name: str) -> Outcome[T]:
        if self._only_looks:
            return body(*args)
        state = _as_prefect_task(body).with_options(task_run_name=name)(*args, return_state=True)
        outcome: Outcome[T] = state.result()
        return outcome
