"""Results as tables on a terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.compare_spec import DENSE, percent
from flows.comparison import (
    USAGE_TITLES,
    Cell,
    Comparison,
    Measure,
    after_pruning,
    after_recovery,
    show_perplexity,
)
from flows.render_benchmark import benchmark_lines, benchmark_rows

_PLAIN_WIDTH = 160
"""Columns where the output is not a terminal, so that tables in files and pipes are not squeezed."""


def console() -> Console:
    """The console for results, on stdout."""
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def render_results(results: dict[str, Any], console: Console) -> None:
    """The table a run ends with."""
    figures = results["benchmark"]
    table = Table(title=f"{results['provenance']['model']['source']}: dense and pruned", title_justify="left")
    for name in ("", "dense", "pruned", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for row in result_rows(results):
        table.add_row(*row)
    console.print(table)
    for line in benchmark_lines(figures) if figures else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_shot_table(results["shots"]))
    for line in _convergence_lines(results["shots"]):
        console.print(line, highlight=False)
    for line in _recovery_lines(results["recovery"]):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_seconds_line(results), highlight=False)
    for name in ("dense", "pruned"):
        sample = results["samples"][name]
        console.print(
            f"{name}: {sample['prompt']}→{sample['continuation']}", highlight=False, markup=False, soft_wrap=True
        )


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, dense, pruned and ratio of each figure of a run, those of the benchmark included."""
    dense, pruned = results["dense"], results["pruned"]
    windows = f"{results['windows']} windows of {results['window_length']} tokens"
    rows = [
        (name, format(dense[key], form), format(pruned[key], form), f"{pruned[key] / dense[key]:.2f}")
        for name, key, form in (
            (f"perplexity ({windows})", "perplexity", ".2f"),
            ("non-zero parameters", "nonzero", ",d"),
            ("non-zero decoder weights", "linear_nonzero", ",d"),
        )
    ]
    figures = results["benchmark"]
    return rows + (benchmark_rows(figures) if figures else [])


def _shot_table(shots: list[dict[str, Any]]) -> Table:
    kinds = list(dict.fromkeys(kind for shot in shots for kind in shot["seconds"]))
    table = Table(title="shots: sparsity, perplexity, and seconds spent when computed", title_justify="left")
    for name in ("shot", "asked", "reached", "perplexity", *kinds):
        table.add_column(name, justify="right")
    for shot in shots:
        seconds = [f"{shot['seconds'].get(kind, 0.0):.1f}" for kind in kinds]
        table.add_row(
            str(shot["shot"]), f"{shot['target']:.2%}", f"{shot['sparsity']:.3%}", f"{shot['perplexity']:.2f}", *seconds
        )
    return table


def _convergence_lines(shots: list[dict[str, Any]]) -> list[str]:
    """One line a shot in which conjugate gradients stopped before they reached the tolerance."""
    return [
        f"shot {shot['shot']}: conjugate gradients did not reach prune.tolerance in {found['not_converged']} of "
        f"{found['linears']} linears (worst residual {found['worst_residual']:.1e}); raise prune.max_iterations"
        for shot in shots
        if (found := shot["convergence"]) and found["not_converged"]
    ]


def _recovery_lines(found: Mapping[str, Any]) -> list[str]:
    """What training after pruning came to; nothing where there was none."""
    if found["accepted"] is None:
        return []
    before, after = found["before"]["perplexity"], found["after"]["perplexity"]
    losses = [point["loss"] for point in found["validation"]]
    trained = f"recovery ({found['method']}, {found['tokens']:,} tokens)"
    held_out = f"loss of held-out rows {losses[0]:.3f}, at best {min(losses[1:]):.3f} after training"
    if not found["accepted"]:
        return [f"{trained} did not help, so the pruned weights stayed ({held_out})"]
    return [f"{trained}: perplexity {before:.2f} → {after:.2f} ({held_out})"]


def _seconds_line(results: dict[str, Any]) -> str:
    parts = ", ".join(f"{kind} {s:.1f}" for kind, s in sorted(results["seconds"].items()) if kind != "total")
    tasks = results["tasks"]
    return (
        f"{results['elapsed_s']:.0f} s this time ({tasks['executed']} tasks executed, {tasks['cached']} reused), "
        f"peak memory {results['peak_memory_gib']:.2f} GiB. Seconds by stage when computed: {parts}."
    )


def render_comparison(comparison: Comparison, console: Console) -> None:
    """One table for each of a comparison; the best of each column is bold."""
    for found in comparison.tables:
        table = Table(title=Text(found.title), title_justify="left")
        measures: list[Measure] = [after_pruning, *([after_recovery] if found.has_recovery else [])]
        sparsities = [percent(sparsity) for sparsity in found.sparsities]
        recovered = [f"{sparsity}, recovered" for sparsity in sparsities] if found.has_recovery else []
        for name in ("", *sparsities, *recovered, *USAGE_TITLES):
            table.add_column(name, justify="right" if name else "left")
        dense = [show_perplexity(comparison.dense["perplexity"])] * len(found.sparsities)
        table.add_row(DENSE, *dense)
        for row in found.rows:
            cells = [
                _comparison_cell(cell, measure, found.best(column, measure))
                for measure in measures
                for column, cell in enumerate(row.cells)
            ]
            table.add_row(Text(" ".join(row.name.split())), *cells, *row.usage.texts())
        console.print(table)


def _comparison_cell(cell: Cell, measure: Measure, best: float | None) -> Text:
    value = measure(cell)
    if value is None:
        return Text("failed" if cell.error else "-")
    return Text(show_perplexity(value), style="bold" if value == best else "")


def render_evaluation(facts: dict[str, Any], console: Console) -> None:
    """One model's numbers."""
    table = Table()
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in facts.items():
        table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


def render_status(lines: list[dict[str, Any]], console: Console) -> None:
    """What is there and what would run."""
    table = Table()
    for name in ("stage", "in the store", "would run"):
        table.add_column(name)
    for line in lines:
        table.add_row(line["stage"], line["found"], line["would_run"] or "nothing")
    console.print(table)


def render_verified(found: dict[str, Any], console: Console) -> None:
    """What `surgeon verify` read, and what it found."""
    for line in found["damaged"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{found['verified']} results are what was committed ({found['bytes'] / 2**20:,.0f} MiB read), "
        f"{len(found['damaged'])} were damaged; of {found['evicted']} only the reference is kept.",
        highlight=False,
        soft_wrap=True,
    )
    if found["damaged"]:
        console.print("`surgeon run` computes damaged results again where it needs them.", highlight=False)
