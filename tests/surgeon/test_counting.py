"""Counts of a model held a block at a time, against the stock model."""

import pytest
import torch
from tiny import FAMILIES, make_tiny

from surgeon.counting import count_model
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from tests.surgeon.passes.stock import load_stock


def opened(family, folder, dtype=torch.float32, **options):
    path = make_tiny(family, folder / "model")
    return BlockwiseModel(resolve_model(str(path), folder / "cache"), dtype=dtype, **options), load_stock(path, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_stock_model(family, tmp_path):
    model, stock = opened(family, tmp_path)
    counts, inside = count_model(model), f"{model.architecture.blocks_path}."
    linears = [m for n, m in stock.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(inside)]
    assert counts.parameters == sum(p.numel() for p in stock.parameters())
    assert counts.nonzero == sum(int((p != 0).sum()) for p in stock.parameters())
    assert counts.linear_weights == sum(m.weight.numel() for m in linears)
    assert counts.linear_nonzero == sum(int((m.weight != 0).sum()) for m in linears)
    assert counts.bytes == 4 * counts.parameters
    assert all(p.is_meta for index in range(3) for p in model.block(index).parameters())


def test_tied_embeddings_count_once(tmp_path):
    tied, untied = make_tiny("llama-gqa-tied", tmp_path / "tied"), make_tiny("mistral", tmp_path / "untied")
    counts = [count_model(BlockwiseModel(resolve_model(str(path), tmp_path / "cache"))) for path in (tied, untied)]
    assert counts[1].parameters - counts[0].parameters == 272 * 32
    assert counts[1].linear_weights == counts[0].linear_weights


def test_zeros_of_pruned_weights_and_biases(tmp_path):
    weight, bias = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.bias"
    pruned = torch.ones(32, 32)
    pruned[:, 5], pruned[7, 5] = 0, torch.tensor(-0.0)
    overrides = {1: {weight: pruned}, 2: {bias: torch.zeros(32)}}
    dense = count_model(opened("qwen2", tmp_path)[0])
    counts = count_model(opened("qwen2", tmp_path, overrides=lambda index: overrides.get(index, {}))[0])
    assert dense.nonzero == dense.parameters
    assert counts.parameters == dense.parameters
    assert counts.nonzero == dense.nonzero - 32 - 32
    assert counts.linear_weights == dense.linear_weights == dense.linear_nonzero
    assert counts.linear_nonzero == dense.linear_nonzero - 32


def test_bytes_are_those_of_the_dtype(tmp_path):
    model, stock = opened("gpt_neox", tmp_path, torch.bfloat16)
    assert count_model(model).bytes == 2 * sum(p.numel() for p in stock.parameters())


def test_blocks_that_are_in_memory_count_once(tmp_path):
    model, _ = opened("phi", tmp_path)
    expected = count_model(model)
    with model.loaded(range(1, 3)):
        assert count_model(model) == expected
