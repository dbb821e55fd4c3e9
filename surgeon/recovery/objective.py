"""What recovery training minimises: a weighted sum of terms, each a mean over the rows of a batch."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from surgeon.choices import LossTerm
from surgeon.passes.loss import next_token_loss


class Objective(Protocol):
    """The loss of a batch, by term. Means over rows of equal length: a batch may be cut into parts of any size."""

    @property
    def extra(self) -> Mapping[str, nn.Parameter]:
        """Parameters of the loss itself, by name, which are trained with the model."""

    def __call__(self, input_ids: Tensor) -> dict[LossTerm, Tensor]:
        """Each term, a scalar with a graph.

        Args:
            input_ids: `[n_rows, length]` on the device of the model.
        """


class NextTokens:
    """The mean negative log-likelihood of the next token, nats.

    Args:
        model: a causal language model; called as ``model(input_ids, use_cache=False).logits``.
    """

    extra: Mapping[str, nn.Parameter] = {}

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor) -> dict[LossTerm, Tensor]:
        """See `Objective`."""
        return {LossTerm.LM: mean_next_token_loss(logits_of(self._model, input_ids), input_ids)}


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits `[n_rows, length, n_vocabulary]` of a model without a cache."""
    logits: Tensor = model(input_ids, use_cache=False).logits
    return logits


def mean_next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """The next-token loss, nats per predicted token."""
    return next_token_loss(logits, input_ids) / (input_ids.shape[0] * (input_ids.shape[1] - 1))


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """Computes in bfloat16 where the device has it in hardware; parameters stay in float32.

    Nothing on a processor: few have it, and the numbers would then depend on which.
    """
    is_there = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_there)
