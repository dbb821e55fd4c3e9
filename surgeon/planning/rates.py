"""How many operations of each kind this machine does in a second: measured in a few seconds, on the model itself.

Passes are measured on blocks of the model with the batch of the run, solves at the size of its factors, the disk where
the store lies. `guess_rates` takes a second: it measures products alone and derives the rest by fixed ratios.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from surgeon.benchmarking.clock import seconds_of
from surgeon.curvature.gram import add_gram
from surgeon.curvature.triangular import cholesky_in_place, gram_of_lower, invert_lower
from surgeon.models import Checkpoint
from surgeon.passes.blockwise import BlockwiseModel, Embedded
from surgeon.passes.loss import next_token_loss
from surgeon.planning.passes import BlockShape, gram_work
from surgeon.planning.solves import INVERSE
from surgeon.planning.work import Operation, Work
from surgeon.store import Store, digest_file, digest_text

_CACHE_BYTES = 64 << 20
"""More weights than any cache holds: in a run, those of a block have been pushed out by the others."""
_BATCH_BLOCKS = 3
_LARGEST = 2048
"""Side of the largest matrix that is factorised here."""
_EIGEN_SIDE = 384
_DISK_BYTES = 16 << 20
_SMALL_ARRAYS = 16
_START = "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM"


_UNCOUNTED = 1.08
"""What a run takes over what is counted: what is between operations, and caches that a short measurement keeps warm
(measured on SmolLM2-135M, in processor time)."""


@dataclass(frozen=True)
class Rates:
    """Operations a second.

    Attributes:
        per_second: by operation, in its unit.
    """

    per_second: Mapping[Operation, float]

    def seconds(self, work: Work) -> float:
        """What some work takes."""
        rates = {**self.per_second, Operation.SECONDS: _UNCOUNTED}
        return _UNCOUNTED * sum(amount / rates[name] for name, amount in work.amounts.items())

    def to_json(self) -> dict[str, float]:
        """Name of operation → operations a second."""
        return {name.value: rate for name, rate in self.per_second.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, float]) -> "Rates | None":
        """What `to_json` gave; None if it is of other operations than are counted now."""
        names = {name.value for name in Operation} - {Operation.SECONDS.value}
        return cls({Operation(name): float(rate) for name, rate in value.items()}) if set(value) == names else None


@dataclass(frozen=True)
class Sample:
    """What of a model and a run rates are measured on.

    Attributes:
        checkpoint: the model.
        dtype: of weights and passes.
        device: "cpu" or "cuda".
        batch_size: sequences at a time.
        length: tokens of each.
        blocks: what a token costs in each block.
        sides: of the factors that are formed and solved.
        step_tokens: sequences of the largest batch that tokens are added to one by one.
        n_head: weights of the head.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: str
    batch_size: int
    length: int
    blocks: tuple[BlockShape, ...]
    sides: tuple[int, ...]
    step_tokens: int
    n_head: int


def measure_rates(sample: Sample, directory: Path) -> Rates:
    """Measures everything.

    Args:
        sample: of what.
        directory: on the disk of the store; nothing stays in it.
    """
    clock = _Clock(sample.device)
    found = {
        **_model_rates(sample, clock),
        **_matrix_rates(sample, clock),
        **_disk_rates(directory, clock),
        Operation.PROCESSES: 1.0 / clock.once(_start_process),
    }
    return Rates({name: found[name] for name in Operation if name is not Operation.SECONDS})


_GUESSES: Mapping[Operation, float] = {
    Operation.FORWARD: 0.9,
    Operation.BACKWARD: 0.85,
    Operation.HEAD: 0.65,
    Operation.HEAD_BACKWARD: 0.5,
    Operation.STEP: 0.19,
    Operation.STEP_TOKENS: 0.8,
}
"""Rates over that of plain products (measured on SmolLM2-135M); of the step in bytes for a multiply-add."""


def guess_rates(sample: Sample, directory: Path) -> Rates:
    """The same in about a second, from products, factorisations and the disk."""
    clock = _Clock(sample.device)
    found = {**_matrix_rates(sample, clock), **_disk_rates(directory, clock)}
    products = found[Operation.PRODUCTS]
    found |= {name: share * products for name, share in _GUESSES.items()}
    found |= {Operation.LOADS: found[Operation.COPIES] / 4, Operation.OPENINGS: 5.0, Operation.PROCESSES: 0.25}
    return Rates({name: found[name] for name in Operation if name is not Operation.SECONDS})


class _Clock:
    """Measures calls, waiting for the device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def once(self, body: Callable[[], Any]) -> float:
        """Seconds of one call."""
        return seconds_of(body, self._device)

    def typical(self, body: Callable[[], Any], rounds: int = 3) -> float:
        """Median of some calls, the first of which may be slow."""
        return float(np.median([self.once(body) for _ in range(rounds)]))


def _model_rates(sample: Sample, clock: _Clock) -> dict[Operation, float]:
    opened: list[BlockwiseModel] = []
    first = clock.once(
        lambda: opened.append(BlockwiseModel(sample.checkpoint, dtype=sample.dtype, device=sample.device))
    )
    second = clock.once(
        lambda: opened.append(BlockwiseModel(sample.checkpoint, dtype=sample.dtype, device=sample.device))
    )
    model = opened.pop()
    opened.clear()
    itemsize = sample.dtype.itemsize
    sizes = [block.n_weights * itemsize for block in sample.blocks]
    held = range(min(len(sizes), max(2, -(-_CACHE_BYTES // max(1, max(sizes))))))
    start = time.perf_counter()
    with model.loaded(held):
        loading = time.perf_counter() - start
        rates = {**_block_rates(sample, clock, model, held), **_head_rates(sample, clock, model)}
    return {
        **rates,
        Operation.OPENINGS: 1.0 / min(first, second),
        Operation.LOADS: sum(sizes[index] for index in held) / loading,
    }


def _block_rates(sample: Sample, clock: _Clock, model: BlockwiseModel, held: range) -> dict[Operation, float]:
    blocks = [sample.blocks[index] for index in held]
    tokens, length = sample.batch_size * sample.length, sample.length
    embedded = model.embed(torch.zeros(sample.batch_size, length, dtype=torch.long))
    few = held[:_BATCH_BLOCKS]  # a batch keeps its activations, not the weights, in the caches
    forward = clock.typical(lambda: _forward(model, few, embedded))
    both = clock.typical(lambda: _forward_backward(model, few, embedded))
    one, many = (model.embed(torch.zeros(n, 1, dtype=torch.long)) for n in (1, sample.step_tokens + 1))
    step, steps = (clock.typical(lambda e=e: _forward(model, held, e), 5) for e in (one, many))  # type: ignore[misc]
    n_weights = sum(block.n_weights for block in blocks)
    return {
        Operation.FORWARD: sum(block.forward(tokens, length) for block in blocks[:_BATCH_BLOCKS]) / forward,
        Operation.BACKWARD: sum(block.backward(tokens, length) for block in blocks[:_BATCH_BLOCKS])
        / max(both - forward, 0.1 * both),
        Operation.STEP: n_weights * sample.dtype.itemsize / step,
        Operation.STEP_TOKENS: sample.step_tokens * n_weights / max(steps - step, 0.05 * steps),
    }


def _head_rates(sample: Sample, clock: _Clock, model: BlockwiseModel) -> dict[Operation, float]:
    ids = torch.zeros(max(1, sample.batch_size // 2), sample.length, dtype=torch.long)
    hidden = model.embed(ids).hidden
    multiply_adds = sample.n_head * ids.numel()

    def forward() -> None:
        with torch.no_grad():
            next_token_loss(model.head(ids, hidden), ids)

    def both() -> None:
        start = hidden.detach().requires_grad_()
        torch.autograd.grad(next_token_loss(model.head(ids, start), ids), start)

    alone, together = clock.typical(forward), clock.typical(both)
    return {
        Operation.HEAD: multiply_adds / alone,
        Operation.HEAD_BACKWARD: multiply_adds / max(together - alone, 0.1 * together),
    }


def _forward(model: BlockwiseModel, blocks: range, embedded: Embedded) -> None:
    with torch.no_grad():
        hidden = embedded.hidden
        for index in blocks:
            hidden = model.run_block(index, hidden, embedded.calls[index])


def _forward_backward(model: BlockwiseModel, blocks: range, embedded: Embedded) -> None:
    start = embedded.hidden.detach().requires_grad_()
    hidden = start
    for index in blocks:
        hidden = model.run_block(index, hidden, embedded.calls[index])
    torch.autograd.grad(hidden, start, torch.ones_like(hidden))


def _matrix_rates(sample: Sample, clock: _Clock) -> dict[Operation, float]:
    side = min(_LARGEST, max(sample.sides))
    tokens = sample.batch_size * sample.length
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, side, generator=generator).to(sample.device)
    total = torch.zeros(side, side, device=sample.device)
    a = torch.randn(side, side, generator=generator).to(sample.device)
    spd = (a @ a.T / side).double() + torch.eye(side, dtype=torch.float64, device=sample.device)
    small = spd[:_EIGEN_SIDE, :_EIGEN_SIDE].contiguous()
    kept = torch.arange(side, device=sample.device)[: side - side // 32 or 1]

    def solve() -> None:
        gram_of_lower(invert_lower(cholesky_in_place(spd.clone())[0]))

    return {
        Operation.GRAM: tokens * side * side * _panel_share(side) / clock.typical(lambda: add_gram(total, x)),
        Operation.PRODUCTS: side**3 / clock.typical(lambda: a @ a),
        Operation.SOLVES: INVERSE * side**3 / clock.typical(solve),
        Operation.EIGEN: len(small) ** 3 / clock.typical(lambda: torch.linalg.eigh(small)),
        Operation.COPIES: 32 * len(kept) ** 2 / clock.typical(lambda: spd[kept][:, kept]),
    }


def _panel_share(side: int) -> float:
    return gram_work([side], 1).amounts[Operation.GRAM] / side**2


def _disk_rates(directory: Path, clock: _Clock) -> dict[Operation, float]:
    directory.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).random(_DISK_BYTES // 4, dtype=np.float32).reshape(-1, 1024)
    little = {f"a{number}/b": np.zeros(8, dtype=np.float32) for number in range(_SMALL_ARRAYS)}
    with TemporaryDirectory(prefix=".measuring-", dir=directory) as folder:
        store = Store(Path(folder) / "store")

        def commit(name: str, arrays: dict[str, Any]) -> float:
            return clock.once(lambda: store.commit(digest_text(name), "measurement", arrays, {}))

        commit("warm-up", little)
        small = float(np.median([commit(f"small {number}", little) for number in range(3)]))
        large = float(np.median([commit(f"large {number}", {"a": values + number}) for number in range(3)]))
        opening = clock.typical(lambda: store.open(digest_text("warm-up")))
        reading = clock.typical(lambda: store.open(digest_text("large 0")).array("a"))
        file = Path(folder) / "file"

        def write() -> None:
            values.tofile(file)
            digest_file(file)

        filing = clock.typical(write)
    return {
        Operation.ARRAYS: _SMALL_ARRAYS / small,
        Operation.OPENED: _SMALL_ARRAYS / opening,
        Operation.WRITES: _DISK_BYTES / max(large - small / _SMALL_ARRAYS, 0.5 * large),
        Operation.READS: _DISK_BYTES / reading,
        Operation.FILES: _DISK_BYTES / filing,
    }


def _start_process() -> None:
    subprocess.run([sys.executable, "-c", _START], check=True, capture_output=True)
