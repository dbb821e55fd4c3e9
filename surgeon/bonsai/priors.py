"""Priors: a score of every unit from one pass through the model, the higher the more important.

With x the input of the output linear (tokens by columns) and W its weight (outputs by columns), column j scores

- `wanda`: ``mean_i |W_ij| · sqrt(mean_t x_tj²)``
- `magnitude`: ``mean_t |x_tj|``
- `fluctuation`: ``var_t(x_tj) · sum_i W_ij²``
- `random`: a uniform draw for each unit, no pass

and a unit scores the mean of its columns (a key/value group: those of all its query heads). Sums are float64.

Departures from the published code: all tokens weigh the same (there, batches do, so scores depend on the batch size),
and a score that is not finite is an error (there, it becomes zero).

Reference: Dery et al. 2024, section 3.2; Sun et al. 2024, *Wanda*, section 3; An et al. 2024, *FLAP*, section 3.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgeon.bonsai.parts import MaskedPart
from surgeon.choices import Prior
from surgeon.errors import NonFiniteError
from surgeon.passes.curvature import Progress, TokenArray, no_progress
from surgeon.passes.groups import batches

FloatArray = NDArray[np.float64]

_DRAW = 1
"""Keeps the draws of the prior apart from those of the masks, which have the same seed and round."""


class ColumnStatistics:
    """Sums over tokens of the inputs of one output linear, float64.

    Attributes:
        n_tokens: seen so far.
        mean: of each column, `[n_columns]`.
        squares: sum of squared deviations from the mean, `[n_columns]`.
        sizes: sum of absolute values, `[n_columns]`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        zeros = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        self.n_tokens = 0
        self.mean, self.squares, self.sizes = zeros, zeros.clone(), zeros.clone()

    def __call__(self, _linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Adds a batch; a forward pre-hook."""
        values: Tensor = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        n_new, mean = len(values), values.mean(dim=0)
        total = self.n_tokens + n_new
        shift = mean - self.mean
        self.squares = self.squares + ((values - mean) ** 2).sum(dim=0) + shift**2 * (self.n_tokens * n_new / total)
        self.mean = self.mean + shift * (n_new / total)
        self.sizes = self.sizes + values.abs().sum(dim=0)
        self.n_tokens = total

    def scores(self, weight: Tensor, prior: Prior) -> Tensor:
        """The score of every column, `[n_columns]` float64.

        Args:
            weight: of the output linear, `[n_out, n_columns]`.
            prior: which score; not `random`.
        """
        variance = self.squares / self.n_tokens
        if prior is Prior.WANDA:
            return weight.double().abs().mean(dim=0) * (variance + self.mean**2).sqrt()
        if prior is Prior.FLUCTUATION:
            return variance * weight.double().square().sum(dim=0)
        return self.sizes / self.n_tokens


def unit_scores(
    model: nn.Module,
    parts: Sequence[MaskedPart],
    tokens: TokenArray,
    batch_size: int,
    prior: Prior,
    progress: Progress = no_progress,
) -> list[FloatArray]:
    """The prior of every unit that lives.

    Args:
        model: a causal language model, called with token ids.
        parts: of the model.
        tokens: `[n_sequences, length]` int64.
        batch_size: sequences at a time.
        prior: which; for `random` see `random_scores`.
        progress: told after each batch.

    Returns:
        For each part, `[n_live]` float64.

    Raises:
        NonFiniteError: naming block, sub-layer and sequences.
    """
    statistics = [ColumnStatistics(part.linear) for part in parts]
    steps = batches(len(tokens), batch_size)
    with torch.no_grad(), ExitStack() as stack:
        for part, own in zip(parts, statistics, strict=True):
            stack.callback(part.linear.register_forward_pre_hook(own).remove)
        for done, step in enumerate(steps, start=1):
            model(input_ids=_on(model, tokens[step]), use_cache=False)
            for part, own in zip(parts, statistics, strict=True):
                if not torch.isfinite(own.sizes).all():
                    raise NonFiniteError(
                        f"{part.name}: its units are not finite in calibration sequences {step.start} to "
                        f"{step.stop - 1}; use model.dtype=float32"
                    )
            progress(done, len(steps))
    with torch.no_grad():
        return [
            part.by_unit(own.scores(part.linear.weight, prior)) for part, own in zip(parts, statistics, strict=True)
        ]


def random_scores(sizes: Sequence[int], seed: int, number: int) -> list[FloatArray]:
    """Uniform draws for every unit that lives, from a generator keyed by (seed, round).

    Args:
        sizes: for each part, how many of its units live.
        seed: of the run.
        number: of the round, from 1.

    Returns:
        For each part, `[n_live]` float64.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number, _DRAW, 0])))
    return [generator.random(size) for size in sizes]


def _on(model: nn.Module, tokens: TokenArray) -> Tensor:
    return torch.from_numpy(tokens).to(next(model.parameters()).device)
