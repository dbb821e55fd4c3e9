"""How long one forward pass takes by what its blocks keep: a table measured on this machine.

A block of the real model is run with its MLP at several widths and its attention with several numbers of key/value
groups, filled with random numbers (times do not depend on them). Three parts make up a pass:

- the MLP of a block at a width: the block with its attention left out, less the block with both left out;
- the attention of a block with a number of groups: likewise, with the MLP left out;
- the rest: the model with all blocks left out (embeddings, final norm, and the head for the last position, as in a
  prefill), and what remains of every block without MLP and attention (norms and sums).

Where a block keeps nothing of a part, that part takes no time. All shapes are measured in turn, round after round, and
the medians are made monotone, since a wider part is never really faster by being wider.
"""

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from surgeon.benchmarking.clock import seconds_of
from surgeon.errors import ModelError
from surgeon.models import AttentionCoupling, BlockCouplings, Checkpoint, MlpCoupling
from surgeon.models.families import family_names
from surgeon.passes.blockwise import BlockCall, BlockwiseModel

ROUNDS = 9
_STEPS = 8
"""Parts that a range of widths is cut into."""
_FLUSHED_BYTES = 1 << 27
"""Written before every measurement, so that no weights are left in the caches; more than most processors have."""

Shape = tuple[str, int]
"""What of a block is kept, and how much of it."""


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one forward pass by what a block keeps, on one machine and for one shape of batch.

    Attributes:
        neurons: widths of the MLP that were measured, ascending, from 0 to the full width.
        mlp_s: seconds of the MLP of one block at each; non-decreasing, 0 at 0.
        groups: kept key/value groups that were measured, ascending, from 0 to all.
        attention_s: seconds of the attention of one block with each; non-decreasing, 0 at 0.
        rest_s: seconds of everything else of the model.
        n_blocks: number of blocks.
    """

    neurons: tuple[int, ...]
    mlp_s: tuple[float, ...]
    groups: tuple[int, ...]
    attention_s: tuple[float, ...]
    rest_s: float
    n_blocks: int

    def mlp(self, width: ArrayLike) -> NDArray[np.float64]:
        """Seconds of the MLP of one block at a width, or of each at an array of widths (linear between measured)."""
        return np.asarray(np.interp(np.asarray(width, dtype=np.float64), self.neurons, self.mlp_s), dtype=np.float64)

    def attention(self, n: ArrayLike) -> NDArray[np.float64]:
        """Seconds of the attention of one block with n groups, or of each of an array."""
        return np.asarray(np.interp(np.asarray(n, dtype=np.float64), self.groups, self.attention_s), dtype=np.float64)

    def total(self, widths: ArrayLike, groups: ArrayLike) -> float:
        """Seconds of a pass.

        Args:
            widths: kept neurons of each block, `[n_blocks]`.
            groups: kept key/value groups of each block, `[n_blocks]`.
        """
        return self.rest_s + float(self.mlp(widths).sum() + self.attention(groups).sum())

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "BlockTimes":
        """From what `to_json` gave; other entries are ignored."""
        return cls(
            neurons=tuple(plain["neurons"]),
            mlp_s=tuple(plain["mlp_s"]),
            groups=tuple(plain["groups"]),
            attention_s=tuple(plain["attention_s"]),
            rest_s=plain["rest_s"],
            n_blocks=plain["n_blocks"],
        )

    @property
    def dense_s(self) -> float:
        """Seconds of a pass of the dense model."""
        return self.rest_s + self.n_blocks * (self.mlp_s[-1] + self.attention_s[-1])


def measure_block_times(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str,
    batch_size: int,
    length: int,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> BlockTimes:
    """Measures the table of a model.

    Args:
        checkpoint: the dense model.
        dtype: of weights and passes.
        device: "cpu" or "cuda".
        batch_size: sequences of a pass.
        length: tokens of each.
        rounds: measurements of each shape, of which the median counts.
        progress: is told of rounds done and rounds in all.

    Raises:
        ModelError: the family has no description of what is coupled, blocks have different shapes, or the sequences
            are longer than the model's positions.
    """
    model = BlockwiseModel(checkpoint, dtype=dtype, device=device)
    couplings = _common_couplings(model)
    limit = getattr(model.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ModelError(f"block times: got sequences of {length} tokens, but the model's positions end at {limit}")
    with torch.inference_mode(), model.loaded(range(1)):
        bench = _Bench(model, couplings, batch_size, length)
        widths, groups = _steps(bench.n_neurons), _steps(couplings.attention.n_kv_heads)
        shapes: dict[Shape, Callable[[], Callable[[], object]]] = {
            ("rest", 0): bench.rest,
            **{("mlp", width): partial(bench.with_mlp, width) for width in widths},
            **{("attention", n): partial(bench.with_attention, n) for n in groups[1:]},
        }
        medians = _medians(shapes, rounds, bench.clock, progress)
    bare = medians["mlp", 0]
    return BlockTimes(
        widths,
        monotone([0.0, *(medians["mlp", width] - bare for width in widths[1:])]),
        groups,
        monotone([0.0, *(medians["attention", n] - bare for n in groups[1:])]),
        medians["rest", 0] + model.n_blocks * bare,
        model.n_blocks,
    )


def monotone(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest non-decreasing sequence of non-negative numbers (least squares).

    Reference: pool adjacent violators, Barlow et al. 1972, *Statistical Inference under Order Restrictions*.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, n_before = pools.pop()
            mean, count = (before * n_before + mean * count) / (n_before + count), n_before + count
        pools.append((mean, count))
    return tuple(max(mean, 0.0) for mean, count in pools for _ in range(count))


def _common_couplings(model: BlockwiseModel) -> BlockCouplings:
    couplings = model.architecture.couplings
    if couplings is None:
        kind = model.model.config.get_text_config(decoder=True).model_type
        raise ModelError(
            f"block times: it is not known which linears of a {kind!r} block form neurons and heads, so its times by "
            f"shape cannot be measured; described families: {family_names()}"
        )
    first = {name: linear.weight.shape for name, linear in model.linears(0).items()}
    for index in range(1, model.n_blocks):
        shapes = {name: linear.weight.shape for name, linear in model.linears(index).items()}
        if shapes != first:
            raise ModelError(
                f"block times: block {index} has linears of other shapes than block 0; one table stands for all "
                "blocks, so give the dense model whose blocks are alike"
            )
    return couplings[0]


def _steps(full: int) -> tuple[int, ...]:
    """From 0 to all in at most 8 about equal steps, at multiples of what the number allows (64 for usual widths)."""
    unit = next(unit for unit in (64, 8, 1) if full >= _STEPS * unit or unit == 1)
    inner = (round(full * k / _STEPS / unit) * unit for k in range(1, _STEPS))
    return tuple(sorted({0, *(step for step in inner if step < full), full}))


class _Bench:
    """One block of a model, put into one shape after the other."""

    def __init__(self, model: BlockwiseModel, couplings: BlockCouplings, batch_size: int, length: int) -> None:
        self._model = model
        self._mlp: MlpCoupling = couplings.mlp
        self._attention: AttentionCoupling = couplings.attention
        self._linears = model.linears(0)
        self.n_neurons = self._linears[self._mlp.column_linear].in_features
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.model.config.get_text_config(decoder=True).vocab_size
        self._ids = torch.randint(0, vocabulary, (batch_size, length), generator=generator).to(model.device)
        embedded = model.embed(self._ids)
        self._hidden = embedded.hidden
        self._call: BlockCall = embedded.calls[0]
        # Every shape of a linear is a view of the same memory, which is that of the largest.
        self._memory = {name: _random(linear.weight, generator) for name, linear in self._linears.items()}
        self._biases = {name: linear.bias for name, linear in self._linears.items()}
        parent = self._attention.output.rpartition(".")[0]
        self._attention_module = model.block(0).get_submodule(parent)
        self._attended, self._returned = self._run_once()
        self.clock = _Clock(self._hidden, model.device)

    def rest(self) -> Callable[[], object]:
        """Makes the model without its blocks ready to run."""
        blocks = [self._model.block(index) for index in range(self._model.n_blocks)]
        model = self._model.model
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

        def run() -> object:
            for block in blocks:
                block.forward = lambda *_args, **_kwargs: self._returned
            try:
                return model(self._ids, use_cache=False, **last).logits
            finally:
                for block in blocks:
                    del block.forward

        return run

    def with_mlp(self, width: int) -> Callable[[], object]:
        """Makes the block ready to run with this many neurons and without its attention."""
        for name in self._mlp.row_linears:
            self._resize(name, n_out=width)
        self._resize(self._mlp.column_linear, n_in=width)
        self._attention_module.forward = lambda *_args, **_kwargs: self._attended
        return self._run

    def with_attention(self, n_groups: int) -> Callable[[], object]:
        """Makes the block ready to run with this many key/value groups and without its MLP."""
        self.with_mlp(0)
        del self._attention_module.forward
        coupling = self._attention
        for name, rows in coupling.rows(0).items():
            self._resize(name, n_out=n_groups * len(rows))
        self._resize(coupling.output, n_in=n_groups * len(coupling.columns(0)))
        if hasattr(self._attention_module, "num_heads"):  # OPT; the others see the number of heads from the shapes
            n_heads: Any = n_groups * (coupling.n_query_heads // coupling.n_kv_heads)
            self._attention_module.num_heads = n_heads
        return self._run

    def _run(self) -> Tensor:
        return self._model.run_block(0, self._hidden, self._call)

    def _run_once(self) -> tuple[Any, Any]:
        """What the attention and the whole block return, to stand in for them."""
        noted: list[Any] = []
        handle = self._attention_module.register_forward_hook(lambda _module, _args, output: noted.append(output))
        returned = self._model.block(0)(self._hidden, *self._call.args, **self._call.kwargs)
        handle.remove()
        return noted[0], returned

    def _resize(self, name: str, *, n_out: int | None = None, n_in: int | None = None) -> None:
        linear, memory, bias = self._linears[name], self._memory[name], self._biases[name]
        shape = (linear.out_features if n_out is None else n_out, linear.in_features if n_in is None else n_in)
        linear.weight = nn.Parameter(memory[: shape[0] * shape[1]].view(shape), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias[: shape[0]], requires_grad=False)


def _random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers, as many as a weight has."""
    flat = torch.randn(weight.numel(), generator=generator) / math.sqrt(weight.shape[1])
    return flat.to(device=weight.device, dtype=weight.dtype)


class _Clock:
    """Times a body with the block's weights out of the caches, as they are when the block before has just run."""

    def __init__(self, hidden: Tensor, device: str) -> None:
        self._hidden = hidden
        self._device = device
        self._flushed = torch.zeros(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, body: Callable[[], object]) -> float:
        """Seconds of one run."""
        self._flushed.add_(1)
        self._hidden.sum()  # what the block before wrote is at hand
        return seconds_of(body, self._device)


def _medians(
    shapes: Mapping[Shape, Callable[[], Callable[[], object]]],
    rounds: int,
    clock: _Clock,
    progress: Callable[[int, int], None] | None,
) -> dict[Shape, float]:
    """Seconds of each shape: all of them in turn, in every round; what makes a shape ready does not count."""
    seconds: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    for number in range(-1, rounds):  # the first round warms up
        for shape, prepare in shapes.items():
            spent = clock.seconds(prepare())
            if number >= 0:
                seconds[shape].append(spent)
        if progress is not None:
            progress(number + 2, rounds + 1)
    return {shape: statistics.median(values) for shape, values in seconds.items()}
