"""Which process a run in Prefect's records belongs to, and what becomes of it when that process is killed.

A run whose process was killed would stay RUNNING for ever.
"""

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import psutil

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import State

TAG = "surgeon"
_OWNER = "process:"
_WAITING = ("SCHEDULED", "PENDING")
_UNFINISHED = {"state": {"type": {"any_": ["RUNNING", "CANCELLING", *_WAITING]}}}


def is_within_a_run() -> bool:
    """Whether this process executes a flow run already, as a Prefect worker starts it from a deployment."""
    if "prefect.context" not in sys.modules:  # importing it takes a second, and nothing can be within a run before
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


@contextmanager
def owned_by_this_process(root: Path) -> Iterator[None]:
    """Flow runs that begin here carry the project and the process, so that a later run can tell what became of it.

    So does the flow run that this is called in, if there is one. When a worker executes it a second time, what its
    first process left unfinished is marked as crashed.
    """
    from prefect import tags

    own = (TAG, _project_tag(root), _owner_tag())
    if is_within_a_run():
        _take_over(own)
    with tags(*own):
        yield


def _take_over(own: tuple[str, ...]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    run = context.flow_run
    with get_client(sync_client=True) as client:
        others = [tag for tag in run.tags if not tag.startswith(_OWNER) and tag not in own]
        client.update_flow_run(run.id, tags=[*others, *own])
        if run.run_count > 1:
            _mark_tasks_crashed(client, run.id)


def mark_crashed_runs(root: Path) -> int:
    """Marks flow runs of this project whose process on this host has ended as crashed, with their tasks.

    Returns:
        The number of flow runs.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter.model_validate({**_UNFINISHED, "tags": {"all_": [TAG, _project_tag(root)]}})
        orphans = [
            run for run in client.read_flow_runs(flow_run_filter=wanted) if _has_ended(run.tags) and not _waits(run)
        ]
        for run in orphans:
            _mark_tasks_crashed(client, run.id)
            client.set_flow_run_state(run.id, _crashed(), force=True)
    return len(orphans)


def _mark_tasks_crashed(client: "SyncPrefectClient", run: UUID) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter

    of_run = FlowRunFilter.model_validate({"id": {"any_": [str(run)]}})
    tasks = TaskRunFilter.model_validate(_UNFINISHED)
    for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=tasks):
        client.set_task_run_state(task.id, _crashed(), force=True)


def _crashed() -> "State":
    from prefect.states import Crashed

    return Crashed(message="The process of this run has ended. What it had finished is in the store.")


def _waits(run: "FlowRun") -> bool:
    """Whether a run is waiting for a worker, which will execute it in another process than before."""
    return run.deployment_id is not None and run.state_type is not None and run.state_type.value in _WAITING


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
        process = psutil.Process(int(pid))
        # One that was killed is a zombie until whoever started it has asked for its status.
        return process.status() == psutil.STATUS_ZOMBIE or f"{process.create_time():.0f}" != created
    except psutil.NoSuchProcess:
        return True
