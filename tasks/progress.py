"""Where tasks say how far they are. The command line sets a reporter that draws; the default shows nothing."""

from typing import Protocol


class Reporter(Protocol):
    """Shows progress of the task that is running."""

    def update(self, label: str, done: int, total: int) -> None:
        """Task ``label`` has done ``done`` of ``total`` steps."""


class SilentReporter:
    """Shows nothing."""

    def update(self, label: str, done: int, total: int) -> None:
        """Does nothing."""


_reporter: Reporter = SilentReporter()


def set_reporter(reporter: Reporter) -> None:
    """Sets the reporter of this process."""
    global _reporter
    _reporter = reporter


def report(label: str, done: int, total: int) -> None:
    """Tells the reporter of this process."""
    _reporter.update(label, done, total)
