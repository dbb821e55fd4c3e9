"""Size, memory and speed of two checkpoints, side by side. Measured times are not results of the store."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from surgeon.benchmarking import BatchFigures, BenchmarkSettings, Side, benchmark, disliked_widths
from tasks.progress import report
from tasks.stage import Outcome, begin

LABEL = "benchmark"


def benchmark_task(
    dense: Side,
    pruned: Side,
    settings: BenchmarkSettings,
    say: Callable[[str], None],
    known: Mapping[str, Any] | None = None,
) -> Outcome[dict[str, Any]]:
    """Measures both models.

    Args:
        dense: the model to compare with.
        pruned: the other.
        settings: what to measure.
        say: shows a line for each batch size.
        known: what an earlier measurement of the same gave; it is returned as it is.

    Returns:
        The figures as in `data/metrics/benchmark.json`.
    """
    if known is not None:
        return Outcome(dict(known), cached=True, seconds=0.0)
    start = begin()
    sizes = list(settings.batch_sizes)

    def progress(batch_size: int, figures: BatchFigures | None) -> None:
        done = sizes.index(batch_size) + (figures is not None)
        report(f"{LABEL}: batch size {batch_size}", done, len(sizes))
        if figures is not None:
            say(f"{LABEL}: batch size {batch_size}: {describe_figures(figures)}")

    found = benchmark(dense, pruned, settings, progress)
    figures = {
        **found.to_json(),
        "disliked_widths": {
            side.name: [str(dislike) for dislike in disliked_widths(side.directory)] for side in (dense, pruned)
        },
    }
    return Outcome(figures, cached=False, seconds=time.perf_counter() - start)


def describe_figures(figures: BatchFigures) -> str:
    """Tokens per second in one line."""
    parts = (("prefill", figures.prefill), ("decode", figures.decode))
    return ", ".join(f"{name} {f.dense:,.0f} → {f.pruned:,.0f} tokens/s ({f.ratio:.2f} times)" for name, f in parts)
