"""The loss of a model with one block left out, for each of its blocks.

All runs share what comes before the block that is left out: block i is entered once, and from there a branch goes on
without it. With several groups, the branches that leave a group are carried through those after it together, so peak
memory is one group's weights, one batch, and the hidden states of all sequences once for each block of a group.

A branch runs the batches that a model without that block would run, so its loss is the same to the bit.

Reference: Song et al. 2024, *SLEB*; Kim et al. 2024, *Shortened LLaMA* (PPL).
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from surgeon.errors import NonFiniteError
from surgeon.passes.blockwise import BlockwiseModel, Embedded
from surgeon.passes.curvature import FloatArray, Progress, TokenArray, no_progress
from surgeon.passes.groups import batches
from surgeon.passes.loss import next_token_loss
from surgeon.passes.walking import empty_hidden, start_batch

_PREFIX = -1
"""Name of the run that leaves out nothing."""


def removal_losses(
    model: BlockwiseModel,
    sequences: TokenArray,
    groups: list[range],
    batch_size: int,
    live: Collection[int],
    progress: Progress = no_progress,
) -> dict[int, float]:
    """Mean loss of a predicted token with each live block left out, nats.

    Args:
        model: opened block-wise.
        sequences: `[n_sequences, length]` token ids, length at least 2.
        groups: blocks in consecutive groups, first to last.
        batch_size: sequences at a time.
        live: blocks that are there; the others are passed over in every run.
        progress: told after each batch of each run.

    Returns:
        Loss by the block that was left out, ascending.

    Raises:
        NonFiniteError: a loss is not finite; names the block that was left out and the sequences.
    """
    runs = _Runs(model, sequences, groups, batch_size, sorted(live), progress)
    boundary: FloatArray | None = None
    for place, group in enumerate(groups):
        branches = runs.fork(group, boundary)
        boundary = branches.pop(_PREFIX, None)
        for later in groups[place + 1 :]:
            branches = runs.carry(later, branches)
    n_predictions = len(sequences) * (sequences.shape[1] - 1)
    return {index: total / n_predictions for index, total in runs.totals.items()}


class _Runs:
    """All runs of one call, and the losses of those that have ended."""

    def __init__(
        self,
        model: BlockwiseModel,
        sequences: TokenArray,
        groups: list[range],
        batch_size: int,
        live: Sequence[int],
        progress: Progress,
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.last = groups[-1]
        self.parts = batches(len(sequences), batch_size)
        self.live = live
        self.progress = progress
        self.totals = dict.fromkeys(live, 0.0)
        self._n_done = 0

    def fork(self, group: range, boundary: FloatArray | None) -> dict[int, FloatArray]:
        """Runs a group whole, and once without each of its blocks; returns what leaves it, if any."""
        leaving: dict[int, FloatArray] = {}
        with torch.no_grad(), self.model.loaded(group):
            for part in self.parts:
                embedded = start_batch(self.model, self.sequences[part], boundary, part)
                hidden = embedded.hidden
                for index in self._live_in(group):
                    branch = self._through(range(index + 1, group.stop), hidden, embedded)
                    self._hand_on(index, group, part, branch, leaving)
                    if group is not self.last or index < group[-1]:
                        hidden = self.model.run_block(index, hidden, embedded.calls[index])
                if group is not self.last:
                    self._hand_on(_PREFIX, group, part, hidden, leaving)
        return leaving

    def carry(self, group: range, branches: dict[int, FloatArray]) -> dict[int, FloatArray]:
        """Runs a group on what left the group before it in each branch."""
        leaving: dict[int, FloatArray] = {}
        if not branches:
            return leaving
        with torch.no_grad(), self.model.loaded(group):
            for part in self.parts:
                embedded = self.model.embed(torch.from_numpy(self.sequences[part]))
                for name, entering in branches.items():
                    hidden = torch.from_numpy(entering[part]).to(device=self.model.device, dtype=self.model.dtype)
                    self._hand_on(name, group, part, self._through(group, hidden, embedded), leaving)
        return leaving

    def _live_in(self, blocks: range) -> list[int]:
        return [index for index in self.live if index in blocks]

    def _through(self, blocks: range, hidden: Tensor, embedded: Embedded) -> Tensor:
        for index in self._live_in(blocks):
            hidden = self.model.run_block(index, hidden, embedded.calls[index])
        return hidden

    def _hand_on(self, name: int, group: range, part: slice, hidden: Tensor, leaving: dict[int, FloatArray]) -> None:
        """Ends a branch with its loss after the last group; keeps its hidden states after any other."""
        if group is not self.last:
            if name not in leaving:
                leaving[name] = empty_hidden(len(self.sequences), hidden)
            leaving[name][part] = hidden.float().cpu().numpy()
            return
        input_ids = torch.from_numpy(self.sequences[part])
        loss = float(next_token_loss(self.model.head(input_ids, hidden), input_ids))
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"without block {name}, the loss of sequences {part.start} to {part.stop - 1} is {loss}. Try "
                "model.dtype float32 or bfloat16, or a selector that removes no block to score it."
            )
        self.totals[name] += loss
        self._n_done += 1
        self.progress(self._n_done, len(self.live) * len(self.parts))
