"""First-order correction: low-rank adapters, trained on a part of the calibration sequences and absorbed.

Pruning with the curvature takes the gradient of the loss to be zero. After a shot it is not: a few small steps on
adapters take the loss down before the next shot. Removed weights stay removed.

Reference:
    van der Ouderaa et al. 2024 (LLM Surgeon), section 3.5; Hu et al. 2022 (LoRA).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgeon.correction.masked import MaskedAdapter, masked_adapters
from surgeon.errors import NonFiniteError, ParameterError
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import Progress, TokenArray, no_progress
from surgeon.passes.evaluation import evaluate_perplexity
from surgeon.passes.groups import batches
from surgeon.passes.loss import next_token_loss

_CHOICE, _ORDER, _START = range(3)
"""What is drawn: the sequences, their order, the start of the adapters. Each has a generator of its own."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How adapters are trained.

    Attributes:
        rank: of the adapters.
        learning_rate: of AdamW, constant, without weight decay.
        epochs: times that each sequence is seen.
        fraction: of the calibration sequences that is used, rounded to whole sequences, at least one.
        batch_size: sequences at a time; each batch is one step.
        seed: of all draws. Give every shot its own, as in ``(seed, shot)``, so that shots do not all correct in the
            same random directions.
    """

    rank: int = 8
    learning_rate: float = 1e-4
    epochs: int = 1
    fraction: float = 1.0
    batch_size: int
    seed: int | tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ParameterError(f"correction {name}: got {getattr(self, name)}, allowed: 1 or more")
        if not 0.0 < self.learning_rate < math.inf:
            raise ParameterError(
                f"correction learning_rate: got {self.learning_rate}, allowed: above 0 and finite; try 1e-4"
            )
        if not 0.0 < self.fraction <= 1.0:
            raise ParameterError(f"correction fraction: got {self.fraction}, allowed: above 0, up to 1")
        if not self.seeds or min(self.seeds) < 0:
            raise ParameterError(f"correction seed: got {self.seed}, allowed: 0 or more")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed as a tuple."""
        return (self.seed,) if isinstance(self.seed, int) else self.seed


@dataclass(frozen=True)
class AdapterResult:
    """What the correction came to.

    Attributes:
        weights: of every linear by its full name, "model.layers.3.mlp.up_proj.weight" say, `[n_out, n_in]` float32 on
            the CPU; the weights as they were if the correction is not accepted.
        accepted: whether the trained weights have a lower loss than those before.
        loss_before: mean loss of the sequences used, nats per predicted token.
        loss_after: the same with the trained weights, in the model's dtype, accepted or not.
        steps: optimiser steps taken.
        sequences: indices of the calibration sequences used, ascending.
    """

    weights: dict[str, Tensor]
    accepted: bool
    loss_before: float
    loss_after: float
    steps: int
    sequences: tuple[int, ...]


def train_adapters(
    model: BlockwiseModel,
    sequences: TokenArray,
    live: Mapping[str, Tensor],
    settings: AdapterSettings,
    progress: Progress = no_progress,
) -> AdapterResult:
    """Trains low-rank adapters on all linears of the blocks and absorbs them into new weights.

    Needs all blocks in memory, with a graph through all of them for one batch. The model itself is left as it was.

    Args:
        model: the pruned model, opened block-wise.
        sequences: calibration, `[n_sequences, length]` token ids, length at least 2.
        live: for every linear of the blocks by its full name, "model.layers.3.mlp.up_proj" say, which weights live,
            `[n_out, n_in]` bool. The others must be zero, and stay zero bit for bit.
        settings: of the training.
        progress: told after each batch of the two evaluations and the training.

    Raises:
        NonFiniteError: if the loss of a step, or of the model before or after, is not finite.
        ValueError: if ``live`` does not fit the linears, or a weight that does not live is not zero.
    """
    chosen = choose_sequences(len(sequences), settings)
    tokens = sequences[chosen]
    n_batches = len(batches(len(tokens), settings.batch_size))
    meter = _Meter(progress, n_batches * (settings.epochs + 2))
    with model.loaded(range(model.n_blocks)):
        _check_live(model, live)
        before = _mean_loss(model, tokens, settings.batch_size, meter, "before the correction")
        with masked_adapters(model.model, live, settings.rank, _start_seed(settings)) as adapters:
            steps = _train(model, tokens, chosen, adapters, settings, meter)
        weights = _absorbed(model, live, adapters)
        with _in_place(model, weights):
            after = _mean_loss(model, tokens, settings.batch_size, meter, f"after {steps} steps of the correction")
        accepted = after < before
        if not accepted:
            weights = _absorbed(model, live, {})
    return AdapterResult(weights, accepted, before, after, steps, tuple(int(index) for index in chosen))


def choose_sequences(n_sequences: int, settings: AdapterSettings) -> NDArray[np.int64]:
    """Indices of the sequences that are trained on, ascending."""
    n_chosen = max(1, round(settings.fraction * n_sequences))
    drawn = np.random.default_rng((*settings.seeds, _CHOICE)).choice(n_sequences, n_chosen, replace=False)
    return np.sort(drawn)


class _Meter:
    """Counts batches over several passes."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, _done: int = 0, _total: int = 0) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _start_seed(settings: AdapterSettings) -> int:
    return int(np.random.default_rng((*settings.seeds, _START)).integers(2**63))


def _train(
    model: BlockwiseModel,
    tokens: TokenArray,
    numbers: NDArray[np.int64],
    adapters: Mapping[str, MaskedAdapter],
    settings: AdapterSettings,
    meter: _Meter,
) -> int:
    """Takes one step of AdamW a batch, in another order each epoch; returns the number of steps."""
    parameters = [p for adapter in adapters.values() for p in (adapter.a, adapter.b)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    step = 0
    for epoch in range(settings.epochs):
        order = np.random.default_rng((*settings.seeds, _ORDER, epoch)).permutation(len(tokens))
        for part in batches(len(tokens), settings.batch_size):
            step += 1
            input_ids = torch.from_numpy(tokens[order[part]]).to(model.device)
            logits = model.model(input_ids, use_cache=False).logits
            loss = next_token_loss(logits, input_ids) / input_ids[:, 1:].numel()
            if not bool(torch.isfinite(loss)):
                _raise_non_finite(step, loss.item(), logits.detach(), input_ids, numbers[order[part]])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            meter()
    return step


def _raise_non_finite(
    step: int, loss: float, logits: Tensor, input_ids: Tensor, numbers: NDArray[np.int64]
) -> NoReturn:
    losses = [float(next_token_loss(logits[i : i + 1], input_ids[i : i + 1])) for i in range(len(input_ids))]
    bad = [int(number) for number, each in zip(numbers, losses, strict=True) if not math.isfinite(each)]
    where = f"sequence {bad[0]}" if bad else f"the batch of sequences {', '.join(map(str, numbers))}"
    raise NonFiniteError(
        f"the loss in step {step} of the correction is {loss}, first in {where}. Try a lower learning rate, or "
        "model.dtype float32 or bfloat16."
    )


def _mean_loss(model: BlockwiseModel, tokens: TokenArray, batch_size: int, meter: _Meter, when: str) -> float:
    try:
        return evaluate_perplexity(model, tokens, [range(model.n_blocks)], batch_size, meter).loss
    except NonFiniteError as error:
        raise NonFiniteError(f"{when}, windows being the {len(tokens)} sequences that it uses: {error}") from error


def _absorbed(
    model: BlockwiseModel, live: Mapping[str, Tensor], adapters: Mapping[str, MaskedAdapter]
) -> dict[str, Tensor]:
    """All weights with what the adapters add to them, where there are any; float32 on the CPU.

    Overrides may be more precise than what the model holds of them, so they are read again.
    """
    weights = {}
    for index in range(model.n_blocks):
        overrides = model.overrides(index)
        for name, linear in _linears(model, index).items():
            weight = overrides.get(f"{name}.weight", linear.weight).detach().to("cpu", torch.float32, copy=True)
            mask = live[name].cpu()
            if bool(weight[~mask].any()):
                raise ValueError(f"{name} has weights that are not zero where none lives")
            if name in adapters:
                with torch.no_grad():
                    weight = torch.where(mask, weight + adapters[name].change().cpu(), 0.0)
            weights[f"{name}.weight"] = weight
    return weights


@contextmanager
def _in_place(model: BlockwiseModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the loaded model compute with other weights for a while."""
    parameters = {name: model.model.get_parameter(name) for name in weights}
    held = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(held[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = held[name]


def _check_live(model: BlockwiseModel, live: Mapping[str, Tensor]) -> None:
    shapes = {
        name: tuple(linear.weight.shape)
        for index in range(model.n_blocks)
        for name, linear in _linears(model, index).items()
    }
    if set(shapes) != set(live):
        wrong = sorted(set(shapes) ^ set(live))
        raise ValueError(f"live weights must be given for exactly the {len(shapes)} linears; differs in {wrong[:4]}")
    for name, shape in shapes.items():
        if live[name].dtype != torch.bool or tuple(live[name].shape) != shape:
            got = f"{live[name].dtype} {tuple(live[name].shape)}"
            raise ValueError(f"live weights of {name}: got {got}, must be torch.bool {shape}")


def _linears(model: BlockwiseModel, index: int) -> dict[str, nn.Linear]:
    """Linears of a block by their full name."""
    return {f"{model.prefix(index)}.{name}": linear for name, linear in model.linears(index).items()}
