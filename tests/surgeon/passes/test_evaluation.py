"""Perplexity against the stock model, one window at a time."""

import math

import pytest
import torch
from tiny import FAMILIES

from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.evaluation import evaluate_perplexity
from surgeon.passes.groups import block_groups
from tests.surgeon.passes.running import LENGTH, sequences_of
from tests.surgeon.passes.stock import load_stock, token_losses


def stock_loss(path, windows):
    """Mean negative log-likelihood of a predicted token."""
    model = load_stock(path)
    with torch.no_grad():
        losses = [token_losses(model, torch.from_numpy(window[None])) for window in windows]
    return float(torch.cat(losses).sum()) / sum(loss.numel() for loss in losses)


@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_equals_the_stock_model_for_every_grouping_and_batch_size(family, checkpoint_of):
    checkpoint, windows = checkpoint_of(family), sequences_of(5)
    expected = stock_loss(checkpoint.path, windows)
    model = BlockwiseModel(checkpoint)
    for batch_size in (2, 8):
        found = [evaluate_perplexity(model, windows, block_groups(3, size), batch_size) for size in (1, 2, 3)]
        assert found[0] == found[1] == found[2]
        assert found[0].loss == pytest.approx(expected, rel=1e-6)
        assert found[0].perplexity == pytest.approx(math.exp(expected), rel=1e-5)
        assert (found[0].n_predictions, found[0].n_windows, found[0].length) == (5 * (LENGTH - 1), 5, LENGTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_stock_model_and_the_loss_is_exact(dtype, checkpoint_of):
    checkpoint, windows = checkpoint_of("gemma"), sequences_of(2)
    model = BlockwiseModel(checkpoint, dtype=dtype)
    found = [evaluate_perplexity(model, windows, block_groups(3, size), 2) for size in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
    with torch.no_grad():
        expected = token_losses(load_stock(checkpoint.path, dtype), torch.from_numpy(windows)).mean()
    assert found[0].loss == pytest.approx(float(expected), rel=1e-6)


def test_a_model_of_constant_logits_has_the_perplexity_of_its_vocabulary(checkpoint_of):
    model = BlockwiseModel(checkpoint_of("llama"))
    model.model.get_output_embeddings().weight.zero_()
    result = evaluate_perplexity(model, sequences_of(3, length=2), [range(3)], 2)
    assert result.perplexity == pytest.approx(272, rel=1e-6)
    assert result.n_predictions == 3


def test_progress_counts_all_batches_of_all_groups(checkpoint_of):
    steps = []
    model = BlockwiseModel(checkpoint_of("llama"))
    evaluate_perplexity(model, sequences_of(5), block_groups(3, 2), 2, lambda done, total: steps.append((done, total)))
    assert steps == [(n, 6) for n in range(1, 7)]
