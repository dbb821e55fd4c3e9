"""The physically smaller model computes what the masked one does, and gives its tensors back where they were."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, make_tiny

from surgeon.errors import ModelError
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.pruning.linear import LiveSet
from surgeon.shrinking import shrink

N_BLOCKS = 5


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    path = make_tiny(request.param, tmp_path / "model", num_hidden_layers=N_BLOCKS)
    return resolve_model(str(path), tmp_path / "models")


def everything(dense: BlockwiseModel, block: int) -> dict[str, LiveSet]:
    with dense.loaded(range(block, block + 1)):
        return {
            name: LiveSet(*(torch.ones(n, dtype=torch.bool) for n in linear.weight.shape))
            for name, linear in dense.linears(block).items()
        }


def cut(dense: BlockwiseModel, block: int, sets: dict[str, LiveSet]) -> dict[str, LiveSet]:
    """Block 0: some neurons and a group; 1: no attention; 2: no MLP; 3: single weights; 4: nothing."""
    couplings = dense.architecture.couplings[block]
    mlp, attention = couplings.mlp, couplings.attention
    if block == 0:
        neurons = torch.arange(len(sets[mlp.column_linear].columns)) % 3 != 0
        for name in mlp.row_linears:
            sets[name].rows[:] = neurons
        sets[mlp.column_linear].columns[:] = neurons
        span = attention.columns(1)
        sets[attention.output].columns[span.start : span.stop] = False
        for name, rows in attention.rows(1).items():
            sets[name].rows[rows.start : rows.stop] = False
    elif block == 1:
        for name in attention.input_linears:
            sets[name].rows[:] = False
        sets[attention.output].columns[:] = False
    elif block == 2:
        for name in (*mlp.row_linears, mlp.column_linear):
            sets[name].rows[:] = False
            sets[name].columns[:] = False
    elif block == 3:
        shape = (len(sets[mlp.column_linear].rows), len(sets[mlp.column_linear].columns))
        weights = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
        sets[mlp.column_linear] = LiveSet(sets[mlp.column_linear].rows, sets[mlp.column_linear].columns, weights)
    return sets


def overrides_of(dense, live):
    def overrides(block):
        with dense.loaded(range(block, block + 1)):
            tensors = {}
            for name, linear in dense.linears(block).items():
                full = f"{dense.prefix(block)}.{name}"
                tensors[f"{full}.weight"] = linear.weight * live[block][name].alive()
                if linear.bias is not None:
                    tensors[f"{full}.bias"] = linear.bias * live[block][name].rows
            return tensors

    return overrides


@pytest.fixture
def pruned(checkpoint):
    dense = BlockwiseModel(checkpoint)
    live = [cut(dense, block, everything(dense, block)) for block in range(N_BLOCKS)]
    return checkpoint, overrides_of(dense, live), live


@pytest.mark.parametrize("removed", [(), (0,), (4,), (1, 3), (0, 1, 2, 4)])
def test_logits_are_those_of_the_masked_model(pruned, removed):
    checkpoint, overrides, live = pruned
    masked = BlockwiseModel(checkpoint, overrides=overrides, removed=removed)
    small = shrink(BlockwiseModel(checkpoint, overrides=overrides, removed=removed), live.__getitem__)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(4, 260, (2, 12)))
    with torch.no_grad(), masked.loaded(range(N_BLOCKS)):
        embedded = masked.embed(tokens)
        hidden = embedded.hidden
        for block in range(N_BLOCKS):
            hidden = masked.run_block(block, hidden, embedded.calls[block])
        expected = masked.head(tokens, hidden)
        torch.testing.assert_close(masked.model(tokens).logits, expected)  # its own forward passes removed blocks by
        torch.testing.assert_close(small.model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert small.blocks == tuple(block for block in range(N_BLOCKS) if block not in removed)
    assert len(small.model.get_submodule(small.architecture.blocks_path)) == N_BLOCKS - len(removed)


def test_sizes_are_those_that_are_left_and_masks_are_where_they_are_not(pruned):
    checkpoint, overrides, live = pruned
    small = shrink(BlockwiseModel(checkpoint, overrides=overrides, removed=(4,)), live.__getitem__)
    couplings = small.architecture.couplings[0]
    down = live[0][couplings.mlp.column_linear]
    assert small.linear(0, couplings.mlp.column_linear).weight.shape == (len(down.rows), int(down.columns.sum()))
    for block in (0, 1, 2):  # also where an attention or an MLP is gone
        left = [small.linear(block, name) for name in live[block]]
        assert sum(module.weight.numel() for module in left if isinstance(module, torch.nn.Linear)) == sum(
            int(one.rows.sum()) * int(one.columns.sum()) for one in live[block].values()
        )
    masked = f"{small.path(3)}.{couplings.mlp.column_linear}.weight"
    assert list(small.masks) == [masked]
    assert torch.equal(small.masks[masked], live[3][couplings.mlp.column_linear].weights)


def test_tensors_come_back_where_they_were(pruned):
    checkpoint, overrides, live = pruned
    masked = BlockwiseModel(checkpoint, overrides=overrides, removed=(4,))
    small = shrink(BlockwiseModel(checkpoint, overrides=overrides, removed=(4,)), live.__getitem__)
    for block in small.blocks:
        restored = small.restored(block)
        with masked.loaded(range(block, block + 1)):
            whole = dict(masked.block(block).named_parameters())
            attention = small.architecture.couplings[block].attention.output.rpartition(".")[0]
            left_out = whole.keys() - restored.keys()
            assert left_out == (
                {name for name in whole if block == 1 and "norm" in name and name.startswith(f"{attention}.")}
            )
            for name, tensor in restored.items():
                assert torch.equal(tensor, whole[name]), (block, name)
    trunk = small.trunk()
    assert trunk and not any(name.startswith(small.architecture.blocks_path) for name in trunk)
    again = BlockwiseModel(checkpoint, overrides=overrides, trunk={n: t * 2 for n, t in trunk.items()})
    for name, tensor in trunk.items():
        assert torch.equal(again.model.get_parameter(name), tensor * 2)


def test_at_least_one_block_stays(checkpoint):
    with pytest.raises(ModelError, match="all 5 blocks are removed; at least one must stay"):
        BlockwiseModel(checkpoint, removed=range(N_BLOCKS))


def test_what_is_tied_stays_tied_when_the_trunk_is_replaced(tmp_path):
    path = make_tiny("llama-gqa-tied", tmp_path / "model")
    model = BlockwiseModel(resolve_model(str(path), tmp_path / "models"))
    name = "model.embed_tokens.weight"
    replaced = {name: model.model.get_parameter(name) + 1}
    other = BlockwiseModel(resolve_model(str(path), tmp_path / "models"), trunk=replaced)
    assert other.model.get_input_embeddings().weight is other.model.get_output_embeddings().weight
    assert torch.equal(other.model.get_output_embeddings().weight, replaced[name])
