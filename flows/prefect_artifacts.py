"""Progress and results of a run as artifacts of a Prefect server, beside what the terminal shows.

They belong to the outermost flow run, whose page shows them.
"""

import json
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.display import Display
from flows.engine import Finding, TaskObserver
from flows.prefect_runs import is_within_a_run

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_EVERY_S = 2.0
"""At most so often the progress is sent; it takes milliseconds of the run each time."""
_PREFIX = "surgeon-"


class RunArtifacts(TaskObserver):
    """Passes everything on to a display, and sends what it comes to.

    Args:
        display: knows how far the run is; a quiet one shows nothing.
    """

    is_shown = True

    def __init__(self, display: Display) -> None:
        self._display = display
        self._is_within_a_run = is_within_a_run()
        self._client: SyncPrefectClient | None = None
        self._flow_run: UUID | None = None
        self._written: dict[str, UUID] = {}
        self._stage = ""
        self._planned = 0
        self._done = 0
        self._reused = 0
        self._last = 0.0
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Shows a line, within a worker's run in its log."""
        if self._is_within_a_run:
            self._logger().info(line)
        else:
            self._display.say(line)

    def warn(self, line: str) -> None:
        """Shows a line that must be seen, within a worker's run in its log."""
        if self._is_within_a_run:
            self._logger().warning(line)
        else:
            self._display.warn(line)

    def plan(self, seconds: Mapping[str, float]) -> None:
        """How long each task that will be executed is expected to take."""
        self._planned = len(seconds)
        self._display.plan(seconds)

    def stage_started(self, name: str) -> None:
        """A stage begins: the first one is the flow run that artifacts belong to."""
        from prefect.client.orchestration import get_client
        from prefect.context import FlowRunContext

        self._display.stage_started(name)
        self._stage = name
        if self._client is None:
            context = FlowRunContext.get()
            self._flow_run = context.flow_run.id if context and context.flow_run else None
            # Settings of its own make it another client than that of the flow, which is closed when the flow ends.
            self._client = get_client(sync_client=True, httpx_settings={})
            self._written = self._find_written()
        self._send_progress(at_once=True)

    def task_started(self, name: str) -> None:
        """A task begins."""
        self._display.task_started(name)

    def task_finished(self, name: str, cached: bool) -> None:
        """A task has ended."""
        self._display.task_finished(name, cached)
        with self._lock:
            self._done += not cached
            self._reused += cached
        self._send_progress()

    def tasks_reused(self, names: list[str]) -> None:
        """Tasks that were not asked for because a finished result stands for all of them."""
        self._display.tasks_reused(names)
        with self._lock:
            self._reused += len(names)
        self._send_progress()

    def update(self, label: str, done: int, total: int) -> None:
        """A task has done part of its steps."""
        self._display.update(label, done, total)
        self._send_progress()

    def found(self, finding: Finding) -> None:
        """Sends a table or a text."""
        self._display.found(finding)
        if finding.rows:
            self._write("table", finding.name, finding.title, json.dumps([dict(row) for row in finding.rows]))
        else:
            self._write("markdown", finding.name, finding.title, finding.text)

    def finished(self) -> None:
        """The run has come to its end."""
        self._display.finished()
        self._send_progress(at_once=True)

    def _send_progress(self, *, at_once: bool = False) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._client is None or not (at_once or now - self._last >= _EVERY_S):
                return
            self._last = now
            percent, text = round(100.0 * self._display.fraction, 1), self._describe()
            self._write("progress", "progress", text, percent)

    def _describe(self) -> str:
        planned = f" of {self._planned}" if self._planned else ""
        parts = [
            f"stage {self._stage}",
            self._display.task,
            f"{self._done}{planned} tasks executed",
            f"{self._reused} found in the store",
            self._display.left,
        ]
        return ", ".join(part for part in parts if part)

    def _write(self, kind: str, name: str, title: str, data: str | float) -> None:
        """Makes an artifact, or changes it if the run has it already."""
        from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

        if self._client is None:
            return
        key = f"{_PREFIX}{name}"
        if key in self._written:
            self._client.update_artifact(self._written[key], ArtifactUpdate(data=data, description=title))
        else:
            new = ArtifactCreate(key=key, type=kind, description=title, data=data, flow_run_id=self._flow_run)
            self._written[key] = self._client.create_artifact(new).id

    def _find_written(self) -> dict[str, UUID]:
        """Artifacts that an earlier execution of the same run has made, by key."""
        from prefect.client.schemas.filters import ArtifactFilter

        assert self._client is not None
        if self._flow_run is None:
            return {}
        of_run = ArtifactFilter.model_validate({"flow_run_id": {"any_": [self._flow_run]}})
        return {found.key: found.id for found in self._client.read_artifacts(artifact_filter=of_run) if found.key}

    def _logger(self) -> Any:
        from prefect.logging import get_run_logger

        return get_run_logger()
