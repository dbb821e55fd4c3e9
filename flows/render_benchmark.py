"""Two models side by side as rows of a table."""

from typing import Any

from rich.console import Console
from rich.table import Table

_MOST_WARNINGS = 5


def render_benchmark(figures: dict[str, Any], console: Console) -> None:
    """The table of `surgeon benchmark`, with what the figures mean below."""
    table = Table(title="dense and pruned, measured in turn", title_justify="left")
    for name in ("", "dense", "pruned", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for row in benchmark_rows(figures):
        table.add_row(*row)
    console.print(table)
    for line in benchmark_lines(figures):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def benchmark_rows(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, dense, pruned and ratio of each figure."""
    rows = [_row("weight files, MiB", figures["weight_bytes"], 1 / 2**20, ",.1f")]
    rows.append(_row("parameters", figures["parameters"], 1, ",.0f"))
    if "cache_bytes_per_token" in figures:
        rows.append(_row("key/value cache of a token, KiB", figures["cache_bytes_per_token"], 1 / 2**10, ",.1f"))
    for name, where in (("loaded_gib", "loaded"), ("device_loaded_gib", "loaded, on the GPU")):
        if name in figures:
            rows.append(_row(f"memory, {where}, GiB", figures[name], 1, ".2f"))
    for size, batch in sorted(figures["batches"].items(), key=lambda item: int(item[0])):
        rows.append(_row(f"peak memory, batch {size}, GiB", batch["peak_memory_gib"], 1, ".2f"))
        if batch["device_peak_memory_gib"]:
            rows.append(_row(f"peak memory, on the GPU, batch {size}, GiB", batch["device_peak_memory_gib"], 1, ".2f"))
        for name in ("prefill", "decode"):
            rows.append(_row(f"{name}, batch {size}, tokens/s", batch[f"{name}_tokens_per_s"], 1, ",.0f"))
    return rows


def benchmark_lines(figures: dict[str, Any]) -> list[str]:
    """What has to be known about the figures."""
    lines = []
    if figures["batches"]:
        machine = figures["machine"]
        lines.append(
            f"measured on {machine['cpu']}, {machine['threads']} threads, {machine['device']}; medians, and in "
            "brackets the smallest and largest ratio of a round"
        )
    dtypes = figures["dtype"]
    if dtypes["dense"] != dtypes["pruned"]:
        lines.append(
            f"dense is {dtypes['dense']} and pruned is {dtypes['pruned']}, as they are stored; set benchmark.dtype to "
            "measure both in the same"
        )
    if figures["last_logits_only"] and not all(figures["last_logits_only"].values()):
        lines.append("prefill computes the logits of all positions, as a model here cannot leave any out")
    disliked = figures["disliked_widths"]["pruned"]
    lines += [f"pruned: {text}" for text in disliked[:_MOST_WARNINGS]]
    if len(disliked) > _MOST_WARNINGS:
        lines.append(f"pruned: {len(disliked) - _MOST_WARNINGS} more such widths (disliked_widths in the JSON)")
    if figures["failure"]:
        lines.append(f"not measured to the end: {figures['failure']}")
    return lines


def _row(name: str, found: dict[str, Any], factor: float, form: str) -> tuple[str, str, str, str]:
    ratio = f"{found['ratio']:.2f}"
    if "ratio_min" in found:
        ratio += f" ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"
    return name, format(found["dense"] * factor, form), format(found["pruned"] * factor, form), ratio
