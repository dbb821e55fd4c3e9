"""How large and how fast models are on this machine: two models side by side, and the parts of one by their shape."""

from surgeon.benchmarking.comparison import BatchFigures, Benchmark, BenchmarkSettings, benchmark, sizes_only
from surgeon.benchmarking.machine import describe_machine
from surgeon.benchmarking.sides import Side
from surgeon.benchmarking.widths import Dislike, disliked_widths

__all__ = [
    "BatchFigures",
    "Benchmark",
    "BenchmarkSettings",
    "Dislike",
    "Side",
    "benchmark",
    "describe_machine",
    "disliked_widths",
    "sizes_only",
]
