"""Perplexity by the standard protocol: non-overlapping windows, every prediction weighted the same.

A window of ``length`` tokens gives ``length - 1`` predictions; perplexity is the exponential of the mean negative
log-likelihood over all predictions of all windows. Perplexities of different window lengths do not compare, so the
length is part of the result.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from surgeon.errors import NonFiniteError
from surgeon.passes.blockwise import BlockwiseModel, Embedded
from surgeon.passes.curvature import FloatArray, Progress, TokenArray, forward_group, no_progress
from surgeon.passes.groups import batches
from surgeon.passes.loss import next_token_loss


@dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation.

    Attributes:
        perplexity: exp of the mean loss.
        loss: mean negative log-likelihood, nats per predicted token.
        n_predictions: number of predicted tokens.
        n_windows: number of windows.
        length: tokens per window.
    """

    perplexity: float
    loss: float
    n_predictions: int
    n_windows: int
    length: int


def evaluate_perplexity(
    model: BlockwiseModel,
    windows: TokenArray,
    groups: list[range],
    batch_size: int,
    progress: Progress = no_progress,
) -> Perplexity:
    """Perplexity of a model on windows of tokens, holding one group of blocks at a time.

    Args:
        model: opened block-wise.
        windows: `[n_windows, length]` token ids, length at least 2.
        groups: blocks in consecutive groups, first to last.
        batch_size: windows at a time.
        progress: told after each batch of each group.

    Raises:
        NonFiniteError: if the loss of a window is not finite; names the first block, linear and window that is not.
    """
    n_windows, length = windows.shape
    parts = batches(n_windows, batch_size)
    n_steps = len(parts) * len(groups)
    boundary: FloatArray | None = None
    n_done = 0

    def one_more(_done: int, _total: int) -> None:
        nonlocal n_done
        n_done += 1
        progress(n_done, n_steps)

    for group in groups[:-1]:
        boundary = forward_group(model, windows, group, boundary, batch_size, one_more)
    total = 0.0
    with torch.no_grad(), model.loaded(groups[-1]):
        for part in parts:
            input_ids = torch.from_numpy(windows[part])
            embedded = model.embed(input_ids)
            hidden = embedded.hidden if boundary is None else torch.from_numpy(boundary[part]).to(embedded.hidden)
            start = hidden
            for index in groups[-1]:
                hidden = model.run_block(index, hidden, embedded.calls[index])
            loss = float(next_token_loss(model.head(input_ids, hidden), input_ids))
            if not math.isfinite(loss):
                where = _first_non_finite(model, groups[-1], Embedded(start, embedded.calls), part)
                raise NonFiniteError(f"the loss of evaluation windows {part.start} to {part.stop - 1} is {loss}{where}")
            total += loss
            one_more(0, 0)
    n_predictions = n_windows * (length - 1)
    mean = total / n_predictions
    return Perplexity(math.exp(min(mean, 700.0)), mean, n_predictions, n_windows, length)


def _first_non_finite(model: BlockwiseModel, group: range, entering: Embedded, part: slice) -> str:
    """Runs a batch through loaded blocks once more and names the first linear whose output is not finite."""
    found: list[str] = []

    def look(where: str, _linear: nn.Module, _inputs: object, output: Tensor) -> None:
        bad = ~torch.isfinite(output.reshape(len(entering.hidden), -1)).all(dim=1)
        if bad.any() and not found:
            window = part.start + int(bad.nonzero()[0])
            found.append(f": the first output that is not finite is that of {where}, window {window}")

    with ExitStack() as stack:
        for index in group:
            for name, linear in model.linears(index).items():
                handle = linear.register_forward_hook(partial(look, f"block {index}, linear {name}"))
                stack.callback(handle.remove)
        hidden = entering.hidden
        for index in group:
            hidden = model.run_block(index, hidden, entering.calls[index])
    return found[0] if found else ""
