"""A plan as a table on a terminal, and in one line."""

from rich.console import Console
from rich.table import Table

from flows.planning import Plan


def render_plan(plan: Plan, console: Console) -> None:
    """What will happen by stage, then memory and disk."""
    table = Table(show_footer=True)
    totals = (
        "",
        f"{plan.to_run}",
        f"{plan.found}",
        _tera(plan.flops),
        _gib(plan.needs.memory.own),
        duration(plan.seconds),
    )
    for name, total in zip(("stage", "to run", "found", "Tflop", "memory, GiB", "time"), totals, strict=True):
        table.add_column(name, total, justify="left" if name == "stage" else "right")
    for stage in plan.stages:
        counts = (f"{stage.to_run}", f"{stage.found}") if stage.to_run or stage.found else ("", "")
        memory = _gib(stage.memory_gib) if stage.memory_gib else ""
        table.add_row(stage.name, *counts, _tera(stage.work.flops), memory, duration(stage.seconds))
    console.print(table)
    for name, need in plan.needs.memory.children.items():
        console.print(f"{name}: {need:.2f} GiB in processes of its own", highlight=False)
    for disk in plan.needs.disk:
        console.print(
            f"{disk.what}: {disk.n_bytes / 2**30:.2f} GiB more on the disk of {disk.path}",
            highlight=False,
            soft_wrap=True,
        )


def plan_line(plan: Plan, *, is_measured: bool) -> str:
    """The plan in one line, for the start of a run."""
    disk = sum(need.n_bytes for need in plan.needs.disk) / 2**30
    source = "" if is_measured else " (roughly; `surgeon plan` measures this machine)"
    return (
        f"{plan.to_run} tasks to run, {plan.found} found; expected: {duration(plan.seconds)}{source}, "
        f"{plan.needs.memory.own:.1f} GiB of memory, {disk:.1f} GiB of disk"
    )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    text = f"{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
    return f"{hours}:{text}" if hours else text


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.2f}"


def _gib(value: float) -> str:
    return f"{value:.2f}"
