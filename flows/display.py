"""What the user sees while a run goes on: a bar with the time left on a terminal, lines elsewhere, or nothing."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flows.engine import TaskObserver
from tasks.progress import SilentReporter, set_reporter

_LINE_EVERY_S = 5.0
_FIRST_SHARE = 0.04
"""Part of the run after which what tasks really took corrects what was expected: the first say little."""


class Display(TaskObserver):
    """Draws progress on stderr. Also the tasks' reporter while it is entered.

    Args:
        quiet: show nothing at all.
    """

    def __init__(self, quiet: bool) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._quiet = quiet
        self.is_shown = not quiet
        self._expected: dict[str, float] = {}
        self._total = 0.0
        self._start = time.perf_counter()
        self._done = 0.0
        self._taken = 0.0
        self._found = 0.0
        self._task_start = self._start
        self._task = ""
        self._part = 0.0
        self._last_line = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "Display":
        set_reporter(self)
        if not self._quiet and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description:<46}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("starting", total=1.0, left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        set_reporter(SilentReporter())
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Shows a line."""
        if not self._quiet:
            self._console.print(line, highlight=False, markup=False)

    def warn(self, line: str) -> None:
        """Shows a line even if nothing else is shown."""
        self._console.print(line, highlight=False, markup=False)

    def plan(self, seconds: Mapping[str, float]) -> None:
        """How long each task that will be executed is expected to take, so that the time left can be given."""
        self._expected = dict(seconds)
        self._total = sum(seconds.values())

    def task_started(self, name: str) -> None:
        """A task begins."""
        self._task, self._part, self._task_start = name, 0.0, time.perf_counter()

    def task_finished(self, name: str, cached: bool) -> None:
        """A task has ended."""
        # Tasks that were expected to run but were found are done all the same; some are asked for twice.
        expected = self._expected.pop(name, 0.0)
        self._done += expected
        if not cached:
            self._taken += time.perf_counter() - self._task_start
        else:
            self._found += expected
        self._part = 0.0
        self._draw(name)

    def update(self, label: str, done: int, total: int) -> None:
        """A task has done part of its steps."""
        self._part = done / max(total, 1)
        self._draw(label)

    def tasks_reused(self, names: list[str]) -> None:
        """Tasks that were not asked for because a finished result stands for all of them."""
        expected = sum(self._expected.pop(name, 0.0) for name in names)
        self._done += expected
        self._found += expected

    def finished(self) -> None:
        """The run has come to its end, also where less was to do than expected."""
        self._done = self._total = self._total or 1.0

    @property
    def task(self) -> str:
        """The task that runs or ran last; empty before the first."""
        return self._task

    @property
    def fraction(self) -> float:
        """Part of the expected time that is over, from 0 to 1; 0 where none is known."""
        if not self._total:
            return 0.0
        return min(1.0, (self._done + self._part * self._expected.get(self._task, 0.0)) / self._total)

    @property
    def left(self) -> str:
        """The time that is left, as it is shown; empty where none is known."""
        if not self._total:
            return ""
        expected = self._done - self._found + self._part * self._expected.get(self._task, 0.0)
        taken = self._taken + (time.perf_counter() - self._task_start if self._part else 0.0)
        pace = taken / expected if expected >= _FIRST_SHARE * self._total else 1.0
        left = (1.0 - self.fraction) * self._total * pace
        return f"about {int(left) // 60}:{int(left) % 60:02d} left"

    def _draw(self, what: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=what, completed=self.fraction, left=self.left)
            return
        now = time.perf_counter()
        if now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            elapsed = int(now - self._start)
            parts = [
                f"{elapsed // 60}:{elapsed % 60:02d}",
                f"{self.fraction:4.0%}" if self._total else "",
                what,
                self.left,
            ]
            self._console.print("  ".join(part for part in parts if part), highlight=False, markup=False)
