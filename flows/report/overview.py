"""The top of the page: what was removed and what it cost, in a headline, tiles and a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.comparison import show_perplexity
from flows.render import result_rows
from flows.render_benchmark import benchmark_lines
from flows.report.numbers import ARROW, bytes_pair, change, percent, short_count, times
from flows.report.tables import Table
from surgeon.choices import ExportLayout

_LOADED_BY = {
    ExportLayout.STOCK: "The export is a stock checkpoint: any program that reads transformers models loads it.",
    ExportLayout.COMPACT: "The export is in the compact form: surgeon.load reads it, or transformers with "
    "trust_remote_code=True.",
    ExportLayout.DENSE: "The export has the shapes of the dense model: no row or column is gone, and removed weights "
    "are stored as zeros.",
}


@dataclass(frozen=True)
class Tile:
    """One number of the top.

    Attributes:
        label: what it is about.
        value: the number.
        note: dense and pruned.
        dense: length of the dense bar, between 0 and 1.
        pruned: of the pruned one; in the first tile the removed part.
    """

    label: str
    value: str
    note: str
    dense: float
    pruned: float


def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """Name, removed fraction and one sentence of what it cost."""
    dense, pruned, export = results["dense"], results["pruned"], results["export"]
    costs = (dense["perplexity"], pruned["perplexity"])
    size = round(100 * (1 - export["bytes"] / export["bytes_dense"]))
    smaller = f"The checkpoint is {size}% smaller" if size > 0 else "The checkpoint is as large as before"
    loads = " and loads in stock transformers" if export["layout"] == ExportLayout.STOCK else ""
    return {
        "model": results["provenance"]["model"]["source"],
        "removed": percent(pruned["sparsity"]),
        "lead": f"Perplexity on held-out text goes from {' to '.join(map(show_perplexity, costs))} "
        f"({times(costs[1] / costs[0])}). {smaller}{loads}.",
        "chips": _chips(results),
    }


def _chips(results: Mapping[str, Any]) -> list[str]:
    prune, calibration = results["provenance"]["parameters"]["prune"], results["provenance"]["calibration"]
    shots = len(results["shots"])
    tokens = calibration["n_sequences"] * calibration["length"]
    return [
        f"method {prune['method']}",
        *([f"curvature {prune['curvature']}"] if prune["curvature"] else []),
        f"structure {prune['structure']}",
        f"{shots} shot{'s' * (shots != 1)}",
        f"{tokens:,} calibration tokens",
    ]


def tiles(results: Mapping[str, Any]) -> list[Tile]:
    """The numbers of the top: always weights, perplexity and size; memory and speed where they were measured."""
    dense, pruned, export, figures = (results[name] for name in ("dense", "pruned", "export", "benchmark"))
    total = dense["linear_weights"]
    counts = f"{short_count(total)} {ARROW} {short_count(total * (1 - pruned['sparsity']))}"
    costs = (dense["perplexity"], pruned["perplexity"])
    found = [
        Tile("Weights removed", percent(pruned["sparsity"]), counts, 1.0, pruned["sparsity"]),
        _pair("Perplexity", *costs, f" {ARROW} ".join(map(show_perplexity, costs)), times),
    ]
    sizes = bytes_pair(export["bytes_dense"], export["bytes"])
    found.append(_pair("Size", export["bytes_dense"], export["bytes"], sizes, change))
    measured = figures and figures["batches"]
    if not measured:
        counts = f"{short_count(export['parameters_dense'])} {ARROW} {short_count(export['parameters'])}"
        found.append(_pair("Parameters", export["parameters_dense"], export["parameters"], counts, change))
        return found
    if loaded := figures.get("device_loaded_gib", figures["loaded_gib"]):
        found.append(_tile("Memory, loaded", loaded["dense"], loaded["pruned"], ".2f", change, " GiB"))
    batch = max(measured, key=int)
    for name in ("prefill", "decode"):
        speed = measured[batch][f"{name}_tokens_per_s"]
        note = " tokens/s" + (", no clear difference" if speed["ratio_min"] <= 1 <= speed["ratio_max"] else "")
        found.append(_tile(f"{name.title()}, batch {batch}", speed["dense"], speed["pruned"], ",.0f", times, note))
    return found


def _tile(label: str, dense: float, pruned: float, form: str, show: Any, unit: str = "") -> Tile:
    return _pair(label, dense, pruned, f"{dense:{form}} {ARROW} {pruned:{form}}{unit}", show)


def _pair(label: str, dense: float, pruned: float, note: str, show: Any) -> Tile:
    largest = max(dense, pruned) or 1.0
    return Tile(label, show(pruned / dense if dense else 1.0), note, dense / largest, pruned / largest)


def result_section(results: Mapping[str, Any]) -> dict[str, Any]:
    """The table of the terminal, and what has to be known about it."""
    figures, export = results["benchmark"], results["export"]
    note = _LOADED_BY[ExportLayout(export["layout"])]
    if removed := export["blocks_removed"]:
        left = export["blocks_dense"] - len(removed)
        note += f" {left} of {export['blocks_dense']} decoder blocks are left, numbered anew."
    if export["why_not_stock"]:
        note += f" It is not a stock one: {export['why_not_stock']}."
    notes = benchmark_lines(figures) if figures else []
    if not figures:
        notes = ["Memory and speed were not measured on this export; `surgeon benchmark` does it."]
    elif not figures["batches"] and not figures["failure"]:
        notes.append("Speed was not measured (benchmark.rounds is 0).")
    head: tuple[str, ...] = ("", "dense", "pruned", "ratio")
    rows: list[tuple[str, ...]] = list(result_rows(results))
    if figures and figures["batches"]:
        head, rows = (*head, "rounds"), [(*row[:3], *_split_ratio(row[3])) for row in rows]
    caption = "Dense and pruned model; sizes, memory and speed are those of the checkpoints as they are loaded"
    return {
        "export_note": note,
        "result": Table(caption, head, rows, style="result"),
        "result_notes": [*notes, *_overlap(results)],
    }


def _split_ratio(text: str) -> tuple[str, str]:
    """A ratio, and the smallest and largest of the rounds, which stand in brackets behind it."""
    ratio, _, rounds = text.partition(" ")
    return ratio, rounds


def _overlap(results: Mapping[str, Any]) -> list[str]:
    if not results["overlap"]:
        return []
    share = percent(results["overlap"], 2)
    return [f"{share} of the evaluation tokens are in spans that the calibration sequences have too."]
