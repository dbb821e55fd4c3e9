"""Estimated memory of a curvature pass, and how many blocks fit into a budget."""

from functools import partial

import numpy as np
import pytest
from tiny import make_tiny

from surgeon.errors import ParameterError
from surgeon.memory import MemoryEstimate, blocks_that_fit
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from tests.surgeon.passes.running import kfac_group

SMALL = [(64, 64)] * 4
LARGE = [(256, 64), (64, 256)]
UNEQUAL = partial(MemoryEstimate.of, [SMALL, LARGE, SMALL], 64, 1000, 128, 4)


def test_parts_by_hand():
    estimate = MemoryEstimate.of(
        [[(2, 3)], [(5, 3), (3, 5)]],
        width=4,
        n_vocabulary=7,
        batch_tokens=6,
        dtype_bytes=2,
        blocks_per_group=1,
        pass_tokens=10,
    )
    assert estimate == MemoryEstimate(
        trunk=2 * (7 * 4) * 2,  # embedding and head
        weights=2 * 15 * 2,  # the second block is the larger one
        factors=2 * (25 + 9) * 4,
        activations=round(1.1 * 6 * (2 * 8) * 2),
        head=4 * (6 * 7) * 4,
        boundaries=3 * (10 * 4) * 4,
    )
    assert estimate.total_gib * 2**30 == 112 + 60 + 272 + 211 + 672 + 480


def test_one_group_hands_nothing_on():
    assert MemoryEstimate.of([SMALL, LARGE], 64, 1000, 128, 4, 2, pass_tokens=10**9).boundaries == 0


def test_agrees_with_what_a_pass_holds(tmp_path):
    """GPT-NeoX shares no inputs between linears, so its factors are what the estimate counts."""
    model = BlockwiseModel(resolve_model(str(make_tiny("gpt_neox", tmp_path / "model")), tmp_path / "cache"))
    shapes = [[tuple(linear.weight.shape) for linear in model.linears(index).values()] for index in range(3)]
    estimate = MemoryEstimate.of(shapes, 32, 272, 24, 4, 2)
    factors = kfac_group(model, np.full((2, 12), 5), range(2), None, None, 2)[0]
    held = [t for block in factors.values() for kind in (block.activations, block.gradients) for t in kind.values()]
    assert estimate.factors == sum(t.numel() * t.element_size() for t in held)
    embeddings = (model.model.get_input_embeddings(), model.model.get_output_embeddings())
    assert estimate.trunk == sum(module.weight.numel() * 4 for module in embeddings)
    with model.loaded(range(2)):
        weights = [linear.weight for index in range(2) for linear in model.linears(index).values()]
        assert estimate.weights == sum(w.numel() * w.element_size() for w in weights)


def test_grows_with_every_cause():
    def total(**changes):
        given = {"width": 64, "n_vocabulary": 1000, "batch_tokens": 128, "dtype_bytes": 2, "blocks_per_group": 1}
        return MemoryEstimate.of([SMALL, LARGE], **{**given, **changes}).total_gib

    assert total(dtype_bytes=4) > total()
    assert total(batch_tokens=256) > total()
    assert total(n_vocabulary=2000) > total()
    assert total(blocks_per_group=2) > total()
    assert total(width=65) > total()


def test_the_most_blocks_that_fit_are_chosen():
    needs = [UNEQUAL(n).total_gib for n in (1, 2, 3)]
    assert needs == sorted(set(needs))
    chosen = [blocks_that_fit(UNEQUAL, 3, budget) for budget in np.linspace(needs[0], 1.2 * needs[2], 50)]
    assert chosen == sorted(chosen)
    assert set(chosen) == {1, 2, 3}
    for n, need in enumerate(needs, start=1):
        assert blocks_that_fit(UNEQUAL, 3, need) == n
        assert blocks_that_fit(UNEQUAL, 3, np.nextafter(need, np.inf)) == n


def test_the_largest_block_has_to_fit():
    """Any block may be the one that runs, so the first of a group counts no less than the largest."""
    only_small = MemoryEstimate.of([SMALL], 64, 1000, 128, 4, 1)
    assert UNEQUAL(1).total_gib > only_small.total_gib
    with pytest.raises(ParameterError, match=r"run.memory_gib"):
        blocks_that_fit(UNEQUAL, 3, only_small.total_gib)


def test_a_budget_too_small_for_one_block_is_an_error():
    one_gib = partial(MemoryEstimate.of, [[(8192, 8192)]] * 2, 8192, 1000, 1024, 2)
    message = (
        r"run.memory_gib: one block at a time needs about 0\.7 GiB and the budget is 0\.2 GiB\. "
        r"Lower run.batch_size or calibrate.length, or give more memory\."
    )
    assert 0.65 < one_gib(1).total_gib < 0.75
    with pytest.raises(ParameterError, match=message):
        blocks_that_fit(one_gib, 2, 0.2)
