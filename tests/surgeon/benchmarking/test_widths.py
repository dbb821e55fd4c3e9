"""Widths that hardware dislikes, from the files of a checkpoint."""

import pytest
from tiny import make_tiny

from surgeon.benchmarking import disliked_widths


def texts(directory):
    return [str(dislike) for dislike in disliked_widths(directory)]


def test_nothing_to_dislike(tmp_path):
    make_tiny("llama", tmp_path, intermediate_size=64, hidden_size=64)
    assert texts(tmp_path) == []


@pytest.mark.parametrize(("family", "name"), [("opt", "ffn_dim"), ("qwen3", "intermediate_size")])
def test_mlp_width(tmp_path, family, name):
    make_tiny(family, tmp_path, **{name: 100})
    assert texts(tmp_path)[0] == "MLP width 100 is not a multiple of 64 (blocks 0-2)"


def test_heads(tmp_path):
    make_tiny("llama", tmp_path, hidden_size=36, num_attention_heads=3, num_key_value_heads=3, intermediate_size=64)
    found = texts(tmp_path)
    assert "3 query heads is an odd number (blocks 0-2)" in found
    assert "head width 12 is not a multiple of 8 (blocks 0-2)" in found
    assert "self_attn.q_proj has a size of 36, which is not a multiple of 8 (blocks 0-2)" in found


def test_fused_heads(tmp_path):
    make_tiny("gpt_neox", tmp_path, hidden_size=24, num_attention_heads=3, intermediate_size=64)
    assert texts(tmp_path) == ["3 query heads is an odd number (blocks 0-2)"]


def test_only_the_blocks_that_have_it(tmp_path):
    from safetensors.torch import load_file, save_file

    make_tiny("llama", tmp_path, intermediate_size=64, num_hidden_layers=5)
    tensors = load_file(tmp_path / "model.safetensors")
    for block in (0, 1, 4):
        for name in ("gate_proj", "up_proj"):
            key = f"model.layers.{block}.mlp.{name}.weight"
            tensors[key] = tensors[key][:56].contiguous()
        key = f"model.layers.{block}.mlp.down_proj.weight"
        tensors[key] = tensors[key][:, :56].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert texts(tmp_path) == ["MLP width 56 is not a multiple of 64 (blocks 0-1, 4)"]
