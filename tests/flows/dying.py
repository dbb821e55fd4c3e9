"""Tasks that kill the worker that runs them or damage what they read; importable by workers."""

import os
import signal
from pathlib import Path
from typing import Any

from surgeon.store import Reference
from tasks.context import Context
from tasks.curvature import Measured, statistic_request
from tasks.measuring import GroupWork, curvature_task
from tasks.progress import SilentReporter, set_reporter
from tasks.reducing import reduction_task
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


def reduction_that_finds_damage_once(context: Context, measured: Measured, block: int, statistics: Any) -> Outcome[Any]:
    """A byte of what it reads has flipped, the first time."""
    begin()
    if not marker_of(context).exists():
        marker_of(context).touch()
        part = measured.parts(measured.calibration.attributes["n_sequences"])[1]
        request = statistic_request(context, part, statistics[0], block)
        assert request is not None
        folder = context.store.open().path(request.key(context))
        chunk = next(path for path in sorted(folder.rglob("c/*")) if path.is_file())
        content = bytearray(chunk.read_bytes())
        content[3] ^= 1
        chunk.write_bytes(bytes(content))
    return reduction_task(context, measured, block, statistics)


def curvature_that_dies(_context: Context, _measured: Measured, _work: GroupWork) -> Outcome[Any]:
    begin()  # the flow only looks whether there is anything to do
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
