"""The report of a run: one HTML file for people, beside the numbers for scripts."""

from flows.report.write import write_report

__all__ = ["write_report"]
