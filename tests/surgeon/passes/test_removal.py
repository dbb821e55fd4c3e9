"""The loss without a block, against the stock model with that block taken out of its list."""

import pytest
import torch
from tiny import FAMILIES, make_tiny

from surgeon.errors import NonFiniteError
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.groups import block_groups
from surgeon.passes.removal import removal_losses
from tests.surgeon.passes.running import LENGTH, sequences_of
from tests.surgeon.passes.stock import load_stock, token_losses


def stock_loss_without(path, sequences, blocks_path, gone):
    model = load_stock(path)
    parent, _, name = blocks_path.rpartition(".")
    blocks = model.get_submodule(blocks_path)
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList(b for i, b in enumerate(blocks) if i not in gone))
    model.config.num_hidden_layers = len(blocks) - len(gone)
    model.config.use_cache = False
    with torch.no_grad():
        return float(token_losses(model, torch.from_numpy(sequences)).mean())


@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_equals_the_stock_model_without_the_block(family, checkpoint_of):
    checkpoint, sequences = checkpoint_of(family), sequences_of()
    model = BlockwiseModel(checkpoint)
    found = removal_losses(model, sequences, block_groups(3, 2), 2, range(3))
    assert list(found) == [0, 1, 2]
    for index, loss in found.items():
        expected = stock_loss_without(checkpoint.path, sequences, model.architecture.blocks_path, {index})
        assert loss == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 6) for loss in found.values()}) == 3, "the test can tell blocks apart"


def test_blocks_that_are_gone_are_passed_over(checkpoint_of):
    checkpoint, sequences = checkpoint_of("llama"), sequences_of()
    found = removal_losses(BlockwiseModel(checkpoint), sequences, block_groups(3, 1), 2, [2, 0])
    assert list(found) == [0, 2]
    for index, loss in found.items():
        assert loss == pytest.approx(
            stock_loss_without(checkpoint.path, sequences, "model.layers", {1, index}), rel=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("live", [(0, 1, 2), (0, 2), (1,)])
def test_grouping_does_not_change_a_bit(dtype, live, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of("llama-gqa-tied"), dtype=dtype), sequences_of()
    expected = removal_losses(model, sequences, [range(3)], 2, live)
    assert removal_losses(model, sequences, block_groups(3, 1), 2, live) == expected
    assert removal_losses(model, sequences, block_groups(3, 2), 2, live) == expected


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    model = BlockwiseModel(resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "cache"))
    with model.loaded(range(3)):
        model.linears(1)["mlp.down_proj"].weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"without block 0, the loss of sequences 0 to 1 is nan"):
            removal_losses(model, sequences_of(), [range(3)], 2, range(3))


def test_each_block_is_run_no_more_often_than_it_must(checkpoint_of, monkeypatch):
    runs = []
    model = BlockwiseModel(checkpoint_of("llama"))
    inner = model.run_block
    monkeypatch.setattr(model, "run_block", lambda index, *rest: (runs.append(index), inner(index, *rest))[1])
    for groups in ([range(3)], block_groups(3, 1)):
        runs.clear()
        removal_losses(model, sequences_of(2, LENGTH), groups, 2, range(3))
        # Block 1 runs without block 0 and on the way to block 2; block 2 without block 0 and without block 1.
        assert [runs.count(index) for index in range(3)] == [1, 2, 2]


def test_progress_counts_every_batch_of_every_run(checkpoint_of):
    steps = []
    model = BlockwiseModel(checkpoint_of("llama"))
    groups = block_groups(3, 2)
    removal_losses(model, sequences_of(5), groups, 2, range(3), lambda done, total: steps.append((done, total)))
    assert steps == [(n, 9) for n in range(1, 10)]
