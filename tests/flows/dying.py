"""Tasks that kill the worker that runs them, once or always; importable by workers."""

import os
import signal
from pathlib import Path
from typing import Any

from surgeon.store import Reference
from tasks.context import Context
from tasks.curvature import Measured
from tasks.measuring import GroupWork, curvature_task
from tasks.progress import SilentReporter, set_reporter
from tasks.stage import Outcome, begin


class _Killer:
    """Kills this process when a pass has done its second batch, unless that was done before."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def update(self, label: str, done: int, total: int) -> None:
        if done == 2 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def marker_of(context: Context) -> Path:
    return context.store.root.parent / "killed"


def curvature_that_dies_once(context: Context, measured: Measured, work: GroupWork) -> Outcome[list[Reference]]:
    """The worker is killed in the middle of the pass through the second shard."""
    if measured.part is not None and measured.part[0] > 0:
        set_reporter(_Killer(marker_of(context)))
    try:
        return curvature_task(context, measured, work)
    finally:
        set_reporter(SilentReporter())


def curvature_that_dies(_context: Context, _measured: Measured, _work: GroupWork) -> Outcome[Any]:
    begin()  # the flow only looks whether there is anything to do
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
