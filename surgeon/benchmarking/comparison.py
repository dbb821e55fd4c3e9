"""Two models measured side by side: size, memory and speed.

Each is held by a process of its own, so that the peak memory of one is not that of the other. Only one computes at a
time: they take turns, and who begins changes from round to round (dense, pruned, pruned, dense, ...), so that a machine
that gets slower or faster meanwhile does so for both. Figures are medians over rounds; the ratio is that of medians,
and its spread the smallest and largest ratio of a round.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from surgeon.benchmarking.machine import describe_machine
from surgeon.benchmarking.process import WorkerError, WorkerProcess
from surgeon.benchmarking.sides import Side
from surgeon.errors import BenchmarkError, InputError

Progress = Callable[[int, "BatchFigures | None"], None]
"""Is told a batch size: with None before it is measured, with its figures after."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, and how.

    Attributes:
        batch_sizes: sequences at a time.
        prompt: tokens of each sequence that one forward pass reads.
        new_tokens: tokens of each sequence that follow one by one.
        rounds: measurements of each model at each batch size, after one that does not count; 0 measures nothing.
        dtype: to load both models in; None as stored.
        device: "cpu" or "cuda".
        seed: of the random token ids.
    """

    batch_sizes: Sequence[int] = (1, 8, 32)
    prompt: int = 64
    new_tokens: int = 16
    rounds: int = 3
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Compared:
    """One figure of both models, and how often the second goes into the first.

    Attributes:
        dense: of the first model.
        pruned: of the second.
        ratio: pruned / dense.
        spread: smallest and largest ratio of a round; None where nothing varies.
    """

    dense: float
    pruned: float
    ratio: float
    spread: tuple[float, float] | None = None

    @classmethod
    def of(cls, dense: float, pruned: float) -> "Compared":
        """Of two single numbers."""
        return cls(dense, pruned, pruned / dense)

    @classmethod
    def of_rounds(cls, dense: Sequence[float], pruned: Sequence[float]) -> "Compared":
        """Medians of what each round gave."""
        ratios = [p / d for d, p in zip(dense, pruned, strict=True)]
        middle = (statistics.median(dense), statistics.median(pruned))
        return cls(*middle, middle[1] / middle[0], (min(ratios), max(ratios)))

    def to_json(self) -> dict[str, Any]:
        """As in `data/metrics/benchmark.json`."""
        plain: dict[str, Any] = {"dense": self.dense, "pruned": self.pruned, "ratio": self.ratio}
        if self.spread is not None:
            plain |= {"ratio_min": self.spread[0], "ratio_max": self.spread[1]}
        return plain


@dataclass(frozen=True)
class BatchFigures:
    """What one batch size gave.

    Attributes:
        batch_size: sequences at a time.
        prefill: prompt tokens per second, all sequences together.
        decode: new tokens per second, all sequences together.
        memory_gib: peak resident memory of the process, GiB.
        device_memory_gib: peak memory of tensors on the GPU, GiB; None on a CPU.
        order: names of the models in the order in which they were measured, without the warm-up.
        spans: begin and end of each measurement, seconds of the system's monotonic clock.
    """

    batch_size: int
    prefill: Compared
    decode: Compared
    memory_gib: Compared
    device_memory_gib: Compared | None
    order: tuple[str, ...]
    spans: tuple[tuple[float, float], ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """As in `data/metrics/benchmark.json`; the clock readings mean nothing later and are left out."""
        return {
            "prefill_tokens_per_s": self.prefill.to_json(),
            "decode_tokens_per_s": self.decode.to_json(),
            "peak_memory_gib": self.memory_gib.to_json(),
            "device_peak_memory_gib": self.device_memory_gib and self.device_memory_gib.to_json(),
            "order": list(self.order),
        }


@dataclass(frozen=True)
class Benchmark:
    """What was found.

    Attributes:
        sizes: "weight_bytes" and "parameters", and where models were loaded also "idle_gib" (a process without a
            model), "loaded_gib" and "cache_bytes_per_token".
        batches: by batch size, in the order asked for; shorter if something failed.
        dtypes: that each model was loaded in (or is stored in, if nothing was measured).
        last_logits_only: whether prefill computes the logits of the last position alone, by model.
        machine: where; see `describe_machine`.
        failure: what ended the measurement early, and what to change; None if nothing did.
    """

    sizes: Mapping[str, Compared]
    batches: tuple[BatchFigures, ...]
    dtypes: Mapping[str, str]
    last_logits_only: Mapping[str, bool]
    machine: Mapping[str, str | int]
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As in `data/metrics/benchmark.json`."""
        return {
            **{name: compared.to_json() for name, compared in self.sizes.items()},
            "batches": {str(figures.batch_size): figures.to_json() for figures in self.batches},
            "dtype": dict(self.dtypes),
            "last_logits_only": dict(self.last_logits_only),
            "machine": dict(self.machine),
            "failure": self.failure,
        }


def sizes_only(dense: Side, pruned: Side, settings: BenchmarkSettings) -> Benchmark:
    """What the files tell, without loading a model."""
    return Benchmark(
        {
            "weight_bytes": Compared.of(dense.weight_bytes, pruned.weight_bytes),
            "parameters": Compared.of(dense.stored_parameters, pruned.stored_parameters),
        },
        (),
        {side.name: side.dtype(settings.dtype) for side in (dense, pruned)},
        {},
        describe_machine(settings.device),
    )


def benchmark(dense: Side, pruned: Side, settings: BenchmarkSettings, progress: Progress | None = None) -> Benchmark:
    """Measures two models side by side.

    Args:
        dense: the model to compare with.
        pruned: the other; its name must differ.
        settings: what to measure.
        progress: is told of each batch size before and after.

    Returns:
        All figures. If a model could not be run at a batch size, those of the batch sizes before, and `failure`.

    Raises:
        BenchmarkError: a model could not even be loaded.
        InputError: the sequences are longer than the positions of a model.
    """
    if settings.rounds == 0:
        return sizes_only(dense, pruned, settings)
    with ExitStack() as stack:
        sides = (dense, pruned)
        pair = _Pair(settings, [(side, stack.enter_context(WorkerProcess(side.name))) for side in sides])
        loaded = pair.load()
        batches: list[BatchFigures] = []
        failure = None
        for batch_size in settings.batch_sizes:
            if progress is not None:
                progress(batch_size, None)
            try:
                batches.append(pair.measure(batch_size))
            except WorkerError as error:
                failure = _failure(error, batch_size, settings)
                break
            if progress is not None:
                progress(batch_size, batches[-1])
        sizes = {"weight_bytes": Compared.of(dense.weight_bytes, pruned.weight_bytes)}
        for name in ("parameters", "idle_gib", "loaded_gib"):
            sizes[name] = Compared.of(*(loaded[side.name][name] for side in sides))
        if settings.device == "cuda":
            sizes["device_loaded_gib"] = Compared.of(*(loaded[side.name]["device_loaded_gib"] for side in sides))
        if len(pair.cache_bytes) == len(sides):
            sizes["cache_bytes_per_token"] = Compared.of(*(pair.cache_bytes[side.name] for side in sides))
    return Benchmark(
        sizes,
        tuple(batches),
        {side.name: side.dtype(settings.dtype) for side in sides},
        {side.name: loaded[side.name]["last_logits_only"] for side in sides},
        describe_machine(settings.device),
        failure,
    )


class _Pair:
    """Both workers, taking turns."""

    def __init__(self, settings: BenchmarkSettings, workers: list[tuple[Side, WorkerProcess]]) -> None:
        self.settings = settings
        self.workers = workers
        self.cache_bytes: dict[str, int] = {}
        self._vocabulary = 0

    def load(self) -> dict[str, dict[str, Any]]:
        """Loads both models at once; what each says of itself."""
        for side, worker in self.workers:
            worker.send(
                {
                    "do": "load",
                    "directory": str(side.directory.absolute()),
                    "dtype": side.dtype(self.settings.dtype),
                    "device": self.settings.device,
                    "threads": torch.get_num_threads(),
                    "trust_remote_code": side.trust_remote_code,
                }
            )
        try:
            loaded = {side.name: worker.receive() for side, worker in self.workers}
        except WorkerError as error:
            advice = "; both models are held in memory at once, rounds 0 compares sizes only"
            raise BenchmarkError(f"{error} while it was loaded{advice if error.out_of_memory else ''}") from error
        self._vocabulary = min(facts["vocabulary"] for facts in loaded.values())
        length = self.settings.prompt + self.settings.new_tokens
        for side, _ in self.workers:
            limit = loaded[side.name]["positions"]
            if limit is not None and length > limit:
                raise InputError(
                    f"prompt + new_tokens: got {length} tokens, but the positions of {side.directory} end at {limit}; "
                    "ask for at most that"
                )
        return loaded

    def measure(self, batch_size: int) -> BatchFigures:
        """All rounds of one batch size, after a warm-up."""
        request = {
            "do": "time",
            "batch_size": batch_size,
            "prompt": self.settings.prompt,
            "new_tokens": self.settings.new_tokens,
            "vocabulary": self._vocabulary,
            "seed": self.settings.seed,
            "first": True,
        }
        for _, worker in self.workers:
            worker.ask(request)
        found: dict[str, list[dict[str, Any]]] = {side.name: [] for side, _ in self.workers}
        order: list[str] = []
        spans: list[tuple[float, float]] = []
        for number in range(self.settings.rounds):
            for side, worker in self.workers if number % 2 == 0 else reversed(self.workers):
                answer = worker.ask({**request, "first": False})
                found[side.name].append(answer)
                order.append(side.name)
                spans.append((answer["span"][0], answer["span"][1]))
        for name, answers in found.items():
            if answers[-1]["cache_bytes_per_token"]:
                self.cache_bytes[name] = answers[-1]["cache_bytes_per_token"]
        (first, second), both = found.values(), list(found.values())
        device = None
        if self.settings.device == "cuda":
            device = Compared.of(*(max(answer["device_peak_gib"] for answer in answers) for answers in both))
        prompt, new = batch_size * self.settings.prompt, batch_size * self.settings.new_tokens
        return BatchFigures(
            batch_size,
            Compared.of_rounds(*([prompt / answer["prefill_s"] for answer in answers] for answers in (first, second))),
            Compared.of_rounds(*([new / answer["decode_s"] for answer in answers] for answers in (first, second))),
            Compared.of(*(max(answer["peak_gib"] for answer in answers) for answers in both)),
            device,
            tuple(order),
            tuple(spans),
        )


def _failure(error: WorkerError, batch_size: int, settings: BenchmarkSettings) -> str:
    if not error.out_of_memory:
        return f"batch size {batch_size}: {error}"
    smaller = [size for size in settings.batch_sizes if size < batch_size]
    advice = f"leave {batch_size} out of batch_sizes" if smaller else "lower batch_sizes"
    return (
        f"batch size {batch_size}: {error}. That is not enough memory for {batch_size} sequences of "
        f"{settings.prompt} + {settings.new_tokens} tokens: {advice}, or lower prompt"
    )
