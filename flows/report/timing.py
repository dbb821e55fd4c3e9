"""The section about time and memory."""

from collections.abc import Mapping
from typing import Any

from flows.report.numbers import duration
from flows.report.tables import Table, bar


def time_section(results: Mapping[str, Any], timings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Wall clock and memory by stage, and seconds by kind of result."""
    tasks = results["tasks"]
    note = (
        f"The stages took {duration(results['elapsed_s'])} as they last ran ({tasks['executed']:,} tasks executed, "
        f"{tasks['cached']:,} found in the store), and at most {results['peak_memory_gib']:.2f} GiB of memory. Results "
        "count with the time that they took when they were computed, which may have been in an earlier run."
    )
    return {
        "time_note": note,
        "stages": _stages(timings),
        "results_time": _kinds(results["seconds"]),
        "shot_seconds": _shots(results),
    }


def _stages(timings: Mapping[str, Mapping[str, Any]]) -> Table:
    longest = max((timing["elapsed_s"] for timing in timings.values()), default=0.0) or 1.0
    rows = [
        (
            name,
            bar(timing["elapsed_s"] / longest, time=True),
            duration(timing["elapsed_s"]),
            f"{timing['executed']:,}",
            f"{timing['cached']:,}",
            f"{timing['peak_memory_gib']:.2f}",
        )
        for name, timing in timings.items()
    ]
    head = ("stage", "", "wall clock", "executed", "found", "peak GiB")
    return Table("Stages as they last ran: time, tasks, and memory of the process until then", head, rows)


def _kinds(seconds: Mapping[str, float]) -> Table:
    kinds = sorted(((s, kind) for kind, s in seconds.items() if kind != "total"), reverse=True)
    longest = max((s for s, _ in kinds), default=0.0) or 1.0
    rows: list[tuple[Any, ...]] = [(kind, bar(s / longest, time=True), duration(s)) for s, kind in kinds]
    rows.append(("total", "", duration(seconds["total"])))
    return Table("Kinds of result, all shots together", ("kind", "", "time"), rows)


def _shots(results: Mapping[str, Any]) -> Table:
    shots = results["shots"]
    kinds = list(dict.fromkeys(kind for shot in shots for kind in shot["seconds"]))
    rows = [(str(shot["shot"]), *(f"{shot['seconds'].get(kind, 0.0):.1f}" for kind in kinds)) for shot in shots]
    return Table("Seconds by kind of result, when computed", ("shot", *kinds), rows)
