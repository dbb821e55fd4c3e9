"""A masked model and the physically smaller one give the same logits, in every family."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES

from surgeon.bonsai.parts import masked
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.pruning.linear import LiveSet
from surgeon.shrinking import shrink


def keeps_of(whole):
    """Some units of every sub-layer; in block 1 no unit at all."""
    draw = np.random.default_rng(3)
    keeps = []
    for part in whole.parts:
        keep = draw.random(part.n_live) < 0.6
        keep[draw.integers(part.n_live)] = False
        keep[0] |= not keep.any()
        keeps.append(keep & (part.block != 1))
    return keeps


def live_sets(whole, keeps, block):
    """What of the linears of a block lives if those units do."""
    sets = {
        name: LiveSet(*(torch.ones(n, dtype=torch.bool) for n in linear.weight.shape))
        for name, linear in whole.blockwise.linears(block).items()
    }
    for part, sub, keep in zip(whole.parts, whole.sub_layers, keeps, strict=True):
        if part.block != block:
            continue
        for name, (rows, columns) in sub.live_parts(torch.from_numpy(keep)).items():
            old = sets[name]
            sets[name] = LiveSet(old.rows if rows is None else rows, old.columns if columns is None else columns)
    return sets


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_is_slicing(whole_of, checkpoint_of, family):
    whole = whole_of(family)
    keeps = keeps_of(whole)
    assert {keep.all() for keep in keeps} == {False}
    ids = torch.from_numpy(whole.tokens)
    smaller = shrink(BlockwiseModel(checkpoint_of(family)), lambda block: live_sets(whole, keeps, block))
    with torch.no_grad():
        dense = whole.model(input_ids=ids, use_cache=False).logits
        with masked(whole.parts, keeps):
            by_mask = whole.model(input_ids=ids, use_cache=False).logits
        by_size = smaller.model(input_ids=ids, use_cache=False).logits
    assert not smaller.masks
    assert sum(p.numel() for p in smaller.model.parameters()) < sum(p.numel() for p in whole.model.parameters())
    assert (by_mask - dense).abs().max() > 0.01
    torch.testing.assert_close(by_mask, by_size, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-gqa-tied", "qwen3"])
def test_groups_take_their_query_heads_with_them(whole_of, family):
    """A key/value group has all columns of its two query heads."""
    whole = whole_of(family)
    attention = next(part for part in whole.parts if part.kind == "attention")
    head_dim = whole.model.config.head_dim or 8
    assert (attention.n_live, attention.width) == (2, 2 * head_dim)
    columns = attention.columns(np.array([False, True]))
    assert columns.tolist() == [0.0] * 2 * head_dim + [1.0] * 2 * head_dim
