"""What a sub-model is worth: one pass over the calibration sequences with its units switched off, no graph."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from surgeon.bonsai.parts import BoolArray, MaskedPart, masked
from surgeon.choices import Utility
from surgeon.errors import NonFiniteError
from surgeon.passes.curvature import Progress, TokenArray, no_progress
from surgeon.passes.groups import batches
from surgeon.passes.loss import next_token_loss

LEAST = -1e8
"""No perplexity counts for more than this."""


def token_batches(model: nn.Module, tokens: TokenArray, batch_size: int) -> list[Tensor]:
    """Calibration sequences on the device of the model, `[batch_size, length]` at a time; made once per round."""
    device = next(model.parameters()).device
    return [torch.from_numpy(tokens[step]).to(device) for step in batches(len(tokens), batch_size)]


def sub_model_loss(
    model: nn.Module,
    parts: Sequence[MaskedPart],
    keeps: Sequence[BoolArray],
    inputs: Sequence[Tensor],
    progress: Progress = no_progress,
) -> float:
    """Mean loss of the model without some units.

    Args:
        model: a causal language model, called with token ids.
        parts: of the model.
        keeps: for each part the units that stay, `[n_live]` bool.
        inputs: batches of token ids, `[n_sequences, length]`.
        progress: told after each batch.

    Returns:
        Nats per predicted token.

    Raises:
        NonFiniteError: naming the sequences, and the first output that is not finite.
    """
    total, n_predictions, n_sequences = 0.0, 0, 0
    with torch.no_grad(), masked(parts, keeps):
        for done, input_ids in enumerate(inputs, start=1):
            logits = model(input_ids=input_ids, use_cache=False).logits
            loss = float(next_token_loss(logits, input_ids))
            del logits
            if not math.isfinite(loss):
                last = n_sequences + len(input_ids) - 1
                raise NonFiniteError(
                    f"the loss of calibration sequences {n_sequences} to {last} is {loss}"
                    f"{_first_non_finite(model, parts, input_ids)}; use model.dtype=float32"
                )
            total += loss
            n_sequences += len(input_ids)
            n_predictions += input_ids[:, 1:].numel()
            progress(done, len(inputs))
    return total / n_predictions


def utility_of(loss: float, kind: Utility) -> float:
    """What a sub-model of this loss (nats per token) is worth, the higher the better.

    Reference: Dery et al. 2024, section 3.1 (`negative-perplexity`, with the bound of their code); the loss is ours:
    perplexity has a heavy tail, which rules a least-squares fit.
    """
    if kind is Utility.NEGATIVE_LOSS:
        return -loss
    return max(-math.exp(min(loss, 700.0)), LEAST)


def _first_non_finite(model: nn.Module, parts: Sequence[MaskedPart], input_ids: Tensor) -> str:
    """Runs a batch once more, with the same hooks, and names the first part whose output is not finite."""
    found: list[str] = []

    def look(name: str, _linear: nn.Module, _inputs: object, output: Tensor) -> None:
        if not found and not torch.isfinite(output).all():
            found.append(f": the first output that is not finite is that of {name}")

    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.linear.register_forward_hook(partial(look, part.name)).remove)
        model(input_ids=input_ids, use_cache=False)
    return found[0] if found else ""
