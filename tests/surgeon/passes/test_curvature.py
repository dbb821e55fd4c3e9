"""Factors of a block-wise pass against those of the stock model run whole."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES

from surgeon.curvature import gram
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import forward_group
from surgeon.passes.groups import block_groups
from tests.surgeon.passes.running import LENGTH, N_SEQUENCES, grouped_curvature, kfac_group, sequences_of
from tests.surgeon.passes.stock import relative, stock_curvature

QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
GATED = [QKV, {"self_attn.o_proj"}, {"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]
SHARED = {
    "opt": [QKV, {"self_attn.out_proj"}, {"fc1"}, {"fc2"}],
    "gpt_neox": [
        {"attention.query_key_value"},
        {"attention.dense"},
        {"mlp.dense_h_to_4h"},
        {"mlp.dense_4h_to_h"},
    ],
    "phi": [QKV | {"mlp.fc1"}, {"self_attn.dense"}, {"mlp.fc2"}],
}


def bits(factors):
    """All tensors of the factors of all blocks, by block, kind and name."""
    return {
        (index, kind, name): tensor
        for index, block in factors.items()
        for kind in ("activations", "mean_inputs", "gradients")
        for name, tensor in getattr(block, kind).items()
    }


@pytest.mark.parametrize("blocks_per_group", [3, 1])
@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_equals_the_stock_model_run_whole(family, blocks_per_group, checkpoint_of):
    checkpoint, sequences = checkpoint_of(family), sequences_of()
    model = BlockwiseModel(checkpoint)
    expected = stock_curvature(checkpoint.path, sequences, model.architecture.blocks_path)
    factors, boundaries, gradients = grouped_curvature(model, sequences, blocks_per_group, batch_size=2)
    names = {f"{model.prefix(index)}.{name}" for index, block in factors.items() for name in block.gradients}
    assert names == expected.gradients.keys()
    for index, block in factors.items():
        assert block.n_tokens == N_SEQUENCES * LENGTH
        for name in block.gradients:
            found, full = block.linear(name), f"{model.prefix(index)}.{name}"
            assert relative(found.activations, expected.activations[full]) < 1e-6
            assert relative(found.mean_input, expected.mean_inputs[full]) < 1e-6
            assert relative(found.gradients, expected.gradients[full]) < 1e-5
    for start in range(1, 3) if blocks_per_group == 1 else ():
        assert relative(torch.from_numpy(boundaries[start]), expected.block_inputs[start]) < 1e-6
        assert relative(torch.from_numpy(gradients[start]), expected.block_gradients[start]) < 1e-5
    assert gradients[0] is None


@pytest.mark.parametrize(("family", "batch_size"), [("phi", 5), ("falcon", 2), *((family, 2) for family in FAMILIES)])
def test_grouping_does_not_change_a_bit(family, batch_size, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of(family)), sequences_of()
    expected = bits(grouped_curvature(model, sequences, 3, batch_size)[0])
    for blocks_per_group in (1, 2):
        found = bits(grouped_curvature(model, sequences, blocks_per_group, batch_size)[0])
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouping_does_not_change_a_bit_in_half_precision(dtype, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of("llama-gqa-tied"), dtype=dtype), sequences_of()
    expected = bits(grouped_curvature(model, sequences, 3, 2)[0])
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
    found = bits(grouped_curvature(model, sequences, 1, 2)[0])
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_changes_rounding_only(family, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of(family)), sequences_of()
    expected = bits(grouped_curvature(model, sequences, 3, 5)[0])
    for batch_size in (1, 3):
        found = bits(grouped_curvature(model, sequences, 2, batch_size)[0])
        assert max(relative(found[key], expected[key]) for key in expected) < 1e-5


def test_the_same_pass_twice_gives_the_same_bits(checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of("llama")), sequences_of()
    first = bits(grouped_curvature(model, sequences, 2, 2)[0])
    second = bits(grouped_curvature(BlockwiseModel(checkpoint_of("llama")), sequences, 2, 2)[0])
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("family", "panel_width"), [("llama", 256), *((family, 20) for family in FAMILIES)])
def test_one_input_has_one_factor_and_factors_are_symmetric(family, panel_width, checkpoint_of, monkeypatch):
    monkeypatch.setattr(gram, "PANEL_WIDTH", panel_width)
    model, sequences = BlockwiseModel(checkpoint_of(family)), sequences_of(2)
    factors = kfac_group(model, sequences, range(3), None, None, batch_size=2)[0]
    expected = SHARED.get(family, GATED)
    for block in factors.values():
        by_source = {source: {name for name in block.reads if block.reads[name] == source} for source in block.reads}
        groups = [group for group in by_source.values() if group]
        assert sorted(map(sorted, groups)) == sorted(map(sorted, expected))
        assert block.activations.keys() == block.mean_inputs.keys() == set(block.reads.values())
        for group in groups:
            assert len({id(block.linear(name).activations) for name in group}) == 1
        for square in (*block.activations.values(), *block.gradients.values()):
            assert torch.equal(square, square.T)
            assert square.dtype == torch.float32
            assert torch.linalg.eigvalsh(square.double())[0] > -1e-6 * square.trace()


def devices(model):
    return [{p.device.type for p in model.block(index).parameters()} for index in range(model.n_blocks)]


class Watch:
    """A progress callback that looks at the parameters in the middle of a pass."""

    def __init__(self, model):
        self.model = model
        self.seen = []
        self.steps = []

    def __call__(self, done, total):
        self.steps.append((done, total))
        self.seen.append(devices(self.model))
        assert not any(p.requires_grad for p in self.model.model.parameters())
        assert all(p.grad is None for p in self.model.model.parameters())


@pytest.mark.parametrize("family", ["opt", "llama-gqa-tied", "gpt_neox"])
def test_only_the_group_is_in_memory_and_no_weight_has_a_gradient(family, checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of(family)), sequences_of()
    meta, here = {"meta"}, {"cpu"}
    assert devices(model) == [meta, meta, meta]
    boundary, above = None, None
    for index in range(2):
        watch = Watch(model)
        boundary = forward_group(model, sequences, range(index, index + 1), boundary, 2, watch)
        assert watch.seen == [[here if other == index else meta for other in range(3)]] * 3
        assert watch.steps == [(1, 3), (2, 3), (3, 3)]
        assert devices(model) == [meta, meta, meta]
    for group, seen, start in (
        (range(2, 3), [meta, meta, here], boundary),
        (range(2), [here, here, meta], None),
    ):
        watch = Watch(model)
        above = kfac_group(model, sequences, group, start, above, 2, watch)[1]
        assert watch.seen == [seen] * 3
        assert watch.steps == [(1, 3), (2, 3), (3, 3)]
        assert devices(model) == [meta, meta, meta]
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


def test_backward_forms_no_product_of_the_shape_of_a_weight(checkpoint_of):
    """Gradients of weights are `[n_out, n_in]`; with unequal sides no other product has that shape."""
    model, sequences = BlockwiseModel(checkpoint_of("llama")), sequences_of(2)
    shapes = {tuple(linear.weight.shape) for linear in model.linears(0).values()}
    shapes = {shape for shape in shapes if shape[0] != shape[1]}
    assert shapes == {(48, 32), (32, 48)}

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        products = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                self.products += (tuple(result.shape),)
            return result

    with Spy() as spy:
        kfac_group(model, sequences, range(3), None, None, batch_size=2)
    assert (2 * LENGTH, 48) in spy.products
    assert (2 * LENGTH, 32) in spy.products
    assert shapes.isdisjoint(spy.products)


def test_blocks_are_dropped_after_an_error_and_hooks_are_gone(checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of("llama")), sequences_of()

    def stop(_done, _total):
        raise KeyboardInterrupt

    for run in (
        lambda: forward_group(model, sequences, range(2), None, 2, stop),
        lambda: kfac_group(model, sequences, range(3), None, None, 2, stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert devices(model) == [{"meta"}] * 3
        assert not any(module._forward_hooks or "forward" in vars(module) for module in model.model.modules())


def test_blocks_that_were_loaded_before_stay_loaded(checkpoint_of):
    model, sequences = BlockwiseModel(checkpoint_of("llama")), sequences_of(2)
    with model.loaded(range(1, 2)):
        kfac_group(model, sequences, range(3), None, None, 2)
        assert devices(model) == [{"meta"}, {"cpu"}, {"meta"}]
    assert devices(model) == [{"meta"}] * 3


def test_overrides_take_part_in_the_pass(checkpoint_of):
    name = "model.layers.1.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(1)
    pruned = torch.randn(48, 32, generator=generator)
    model = BlockwiseModel(checkpoint_of("llama"), overrides=lambda index: {name: pruned} if index == 1 else {})
    dense, sequences = BlockwiseModel(checkpoint_of("llama")), sequences_of(2)
    found = grouped_curvature(model, sequences, 1, 2)[0]
    plain = grouped_curvature(dense, sequences, 1, 2)[0]
    assert torch.equal(found[1].activations["mlp.gate_proj"], plain[1].activations["mlp.gate_proj"])
    assert relative(found[1].activations["mlp.down_proj"], plain[1].activations["mlp.down_proj"]) > 0.1
    assert relative(found[0].gradients["mlp.up_proj"], plain[0].gradients["mlp.up_proj"]) > 0.01


def test_boundaries_are_those_of_the_stock_model_to_the_bit(checkpoint_of):
    checkpoint, sequences = checkpoint_of("qwen3"), sequences_of()
    model = BlockwiseModel(checkpoint)
    expected = stock_curvature(checkpoint.path, sequences, model.architecture.blocks_path).block_inputs
    boundary = None
    for group in block_groups(3, 1)[:-1]:
        boundary = forward_group(model, sequences, group, boundary, len(sequences))
        assert boundary.dtype == np.float32
        assert np.array_equal(boundary, expected[group.stop].numpy())
