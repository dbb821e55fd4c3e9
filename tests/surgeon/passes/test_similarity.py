"""How blocks turn the hidden states, against the stock model run whole with hidden states kept."""

import math

import numpy as np
import pytest
import torch
from tiny import FAMILIES, make_tiny

from surgeon.errors import NonFiniteError
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.groups import block_groups
from surgeon.passes.similarity import mean_angles, measure_blocks, measure_sub_layers
from tests.surgeon.passes.running import sequences_of
from tests.surgeon.passes.stock import load_stock


def stock_states(path, sequences, blocks_path, silent=None):
    """Input of every block and what leaves the last, `[n_blocks + 1, n, length, width]`; and each block's output.

    Args:
        path: of the checkpoint.
        sequences: token ids.
        blocks_path: where the blocks are.
        silent: full name of a linear whose output is zero.
    """
    model = load_stock(path)
    inputs, outputs = [], []
    blocks = model.get_submodule(blocks_path)
    for block in blocks:
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    if silent:
        model.get_submodule(silent).register_forward_hook(lambda _m, _i, out: torch.zeros_like(out))
    with torch.no_grad():
        model(torch.from_numpy(sequences))
    return torch.stack([*inputs, outputs[-1]]).double(), torch.stack(outputs).double()


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_blocks_against_the_stock_model(family, checkpoint_of):
    checkpoint, sequences = checkpoint_of(family), sequences_of()
    model = BlockwiseModel(checkpoint)
    states, _ = stock_states(checkpoint.path, sequences, model.architecture.blocks_path)
    found = measure_blocks(model, sequences, block_groups(3, 3), 2)
    for index in range(3):
        influence = 1 - float(cosine(states[index], states[index + 1]).mean())
        assert found.influence[index] == pytest.approx(influence, rel=1e-4, abs=1e-7)
    for i in range(4):
        for j in range(4):
            angles = cosine(states[i, :, -1], states[j, :, -1]).clamp(-1, 1).arccos() / math.pi
            expected = 0.0 if i == j else float(angles.mean())
            assert found.angles[i, j] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert (found.n_tokens, found.n_sequences) == (sequences.size, len(sequences))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouping_does_not_change_a_bit(dtype, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of("llama-gqa-tied"), dtype=dtype), sequences_of()
    outputs = ["mlp.down_proj"] * 3
    blocks = [measure_blocks(model, sequences, block_groups(3, size), 2) for size in (3, 1, 2)]
    subs = [measure_sub_layers(model, sequences, block_groups(3, size), 2, outputs) for size in (3, 1, 2)]
    for found in blocks[1:]:
        assert np.array_equal(found.influence, blocks[0].influence)
        assert np.array_equal(found.angles, blocks[0].angles)
    for found in subs[1:]:
        assert np.array_equal(found.attention, subs[0].attention)
        assert np.array_equal(found.mlp, subs[0].mlp)


@pytest.mark.parametrize(
    ("family", "output"),
    [("llama", "mlp.down_proj"), ("opt", "fc2"), ("gemma", "mlp.down_proj"), ("gpt_neox", "mlp.dense_4h_to_h")],
)
def test_sub_layers_against_the_stock_model(family, output, checkpoint_of):
    """The stock model runs once more for each block, with the output of that block's MLP at zero."""
    checkpoint, sequences = checkpoint_of(family), sequences_of()
    model = BlockwiseModel(checkpoint)
    path = model.architecture.blocks_path
    states, _ = stock_states(checkpoint.path, sequences, path)
    found = measure_sub_layers(model, sequences, block_groups(3, 2), 2, [output] * 3)
    for index in range(3):
        half = stock_states(checkpoint.path, sequences, path, f"{path}.{index}.{output}")[1][index]
        attention = 1 - float(cosine(states[index], half).mean())
        mlp = 1 - float(cosine(half, states[index + 1]).mean())
        assert found.attention[index] == pytest.approx(attention, rel=1e-4, abs=1e-7)
        assert found.mlp[index] == pytest.approx(mlp, rel=1e-4, abs=1e-7)
    assert not any(linear._forward_hooks for block in range(3) for linear in model.linears(block).values())


def test_sequential_blocks_are_cut_between_attention_and_mlp(checkpoint_of):
    """In a Llama block what leaves without the MLP is the input and the attention's output, nothing else."""
    checkpoint, sequences = checkpoint_of("llama"), sequences_of()
    stock = load_stock(checkpoint.path)
    attended, entering = [], []
    layer = stock.model.layers[1]
    layer.self_attn.register_forward_hook(lambda _m, _i, out: attended.append(out[0]))
    layer.register_forward_pre_hook(lambda _m, args: entering.append(args[0]))
    with torch.no_grad():
        stock(torch.from_numpy(sequences))
    x, f = entering[0].double(), attended[0].double()
    found = measure_sub_layers(BlockwiseModel(checkpoint), sequences, [range(3)], 2, ["mlp.down_proj"] * 3)
    assert found.attention[1] == pytest.approx(1 - float(cosine(x, x + f).mean()), rel=1e-5)


def test_small_angles_keep_their_digits():
    angle = 1e-9
    vectors = torch.tensor([[[1.0, 0.0]], [[math.cos(angle), math.sin(angle)]], [[-1.0, 0.0]]], dtype=torch.float64)
    found = mean_angles(vectors)
    assert found[0, 1] == pytest.approx(angle / math.pi, rel=1e-6)
    assert found[0, 2] == pytest.approx(1.0)
    assert found[0, 0] == 0.0


def test_a_hidden_state_without_a_direction_is_named(tmp_path):
    model = BlockwiseModel(resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "cache"))
    model.model.get_input_embeddings().weight[261] = 0.0
    sequences = sequences_of()
    sequences[3, 0] = 261
    with pytest.raises(NonFiniteError, match=r"directions of hidden states near block 0, sequence 3\. Try"):
        measure_blocks(model, sequences, [range(3)], 2)


def test_a_hidden_state_that_is_not_finite_is_named(tmp_path):
    model = BlockwiseModel(resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "cache"))
    with model.loaded(range(3)):
        model.linears(1)["mlp.down_proj"].weight[0, 0] = torch.inf
        with pytest.raises(NonFiniteError, match=r"block 2, sequence 0"):
            measure_blocks(model, sequences_of(), [range(3)], 2)


def test_progress_counts_all_batches_of_all_groups(checkpoint_of):
    steps = []
    model = BlockwiseModel(checkpoint_of("llama"))
    measure_blocks(model, sequences_of(5), block_groups(3, 2), 2, lambda done, total: steps.append((done, total)))
    assert steps == [(n, 6) for n in range(1, 7)]
