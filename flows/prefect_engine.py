"""Stages as Prefect flows and tasks as Prefect tasks.

Uses the Prefect server that is configured (`PREFECT_API_URL`), or else starts one for the time of the run, with its
database below the project, so that `prefect server start` shows past runs.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from flows.engine import Engine, TaskObserver
from tasks.stage import Outcome

T = TypeVar("T")


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


@cache
def _as_prefect_task(body: Callable[..., Outcome[Any]]) -> Any:
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    def run(*args: Any) -> Any:
        outcome = body(*args)
        return Completed(name="Cached", message="found in the store", data=outcome) if outcome.cached else outcome

    run.__doc__ = body.__doc__
    return task(run, name=body.__name__, cache_policy=NO_CACHE, persist_result=False)


class PrefectEngine(Engine):
    """Runs stages and tasks under Prefect, in this process."""

    name = "prefect"

    def __init__(self, root: Path, observer: TaskObserver | None = None) -> None:
        super().__init__(observer)
        configure(root)

    def _run_stage(self, name: str, body: Callable[[], T]) -> T:
        from prefect import flow

        result: T = flow(body, name=f"surgeon-{name}", persist_result=False, validate_parameters=False)()
        return result

    def _run_task(self, body: Callable[..., Outcome[T]], args: tuple[Any, ...], name: str) -> Outcome[T]:
        state = _as_prefect_task(body).with_options(task_run_name=name)(*args, return_state=True)
        outcome: Outcome[T] = state.result()
        return outcome
