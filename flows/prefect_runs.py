"""Runs in Prefect's records whose process was killed: they would stay RUNNING for ever."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

TAG = "surgeon"
_OWNER = "process:"
_UNFINISHED = ("RUNNING", "PENDING", "SCHEDULED", "CANCELLING")


@contextmanager
def owned_by_this_process(root: Path) -> Iterator[None]:
    """Flow runs that begin here carry the project and the process, so that a later run can tell what became of it."""
    from prefect import tags

    with tags(TAG, _project_tag(root), _owner_tag()):
        yield


def mark_crashed_runs(root: Path) -> int:
    """Marks flow runs of this project whose process on this host has ended as crashed, with their tasks.

    Returns:
        The number of flow runs.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    unfinished = {"state": {"type": {"any_": list(_UNFINISHED)}}}
    crashed = Crashed(message="The process of this run has ended. What it had finished is in the store.")
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter.model_validate({**unfinished, "tags": {"all_": [TAG, _project_tag(root)]}})
        orphans = [run for run in client.read_flow_runs(flow_run_filter=wanted) if _has_ended(run.tags)]
        for run in orphans:
            of_run = FlowRunFilter.model_validate({"id": {"any_": [str(run.id)]}})
            tasks = TaskRunFilter.model_validate(unfinished)
            for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=tasks):
                client.set_task_run_state(task.id, crashed, force=True)
            client.set_flow_run_state(run.id, crashed, force=True)
    return len(orphans)


def _project_tag(root: Path) -> str:
    return f"project:{root}"


def _owner_tag() -> str:
    process = psutil.Process()
    return f"{_OWNER}{platform.node()}:{process.pid}:{process.create_time():.0f}"


def _has_ended(tags: list[str]) -> bool:
    """Whether the process of a run was on this host and is no more (a later one may have its number)."""
    owner = next((tag.removeprefix(_OWNER) for tag in tags if tag.startswith(_OWNER)), "")
    host, _, rest = owner.partition(":")
    pid, _, created = rest.partition(":")
    if host != platform.node() or not pid.isdecimal():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" != created
    except psutil.NoSuchProcess:
        return True
