"""Models without weights, loaded block by block."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_tiny
from transformers import AutoModelForCausalLM

from surgeon.errors import ModelError
from surgeon.models import WeightFiles, build_skeleton, discover, load_into, load_trunk, resolve_model, unload
from surgeon.models.quiet import quiet_transformers

TOKENS = torch.arange(3, 43).view(2, 20)


def stock(path, dtype=torch.float32):
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(checkpoint, dtype=torch.float32, overrides=None):
    """A skeleton with its trunk and all blocks loaded."""
    model = build_skeleton(checkpoint, dtype)
    architecture, weights = discover(model), WeightFiles(checkpoint)
    load_trunk(model, architecture, weights, dtype)
    for index in range(architecture.n_blocks):
        load_into(architecture.block(model, index), architecture.block_path(index), weights, dtype, overrides)
    return model


def rewrite(path, change):
    """Saves the weights of a checkpoint again after `change(tensors)`."""
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors), path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_stock_bit_for_bit(family, dtype, tmp_path):
    path = make_tiny(family, tmp_path / "model")
    model = loaded(resolve_model(str(path), tmp_path / "cache"), dtype)
    reference = stock(path, dtype)
    assert logits(reference).std() > 0.3
    assert torch.equal(logits(model), logits(reference))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_has_meta_parameters_and_right_buffers(family, tmp_path):
    path = make_tiny(family, tmp_path / "model")
    state = torch.get_rng_state()
    model = build_skeleton(resolve_model(str(path), tmp_path / "cache"), torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    expected = dict(stock(path).named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model.config.use_cache is False


def test_attention_is_a_parameter(tmp_path):
    checkpoint = resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "cache")
    assert build_skeleton(checkpoint, torch.float32).config._attn_implementation == "sdpa"
    eager = build_skeleton(checkpoint, torch.float32, attention="eager")
    assert eager.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"attention='flash' is not supported. Use 'sdpa' or 'eager'"):
        build_skeleton(checkpoint, torch.float32, attention="flash")


def test_unload_puts_one_block_back_and_it_loads_again(tmp_path):
    checkpoint = resolve_model(str(make_tiny("qwen2", tmp_path / "model")), tmp_path / "cache")
    model = loaded(checkpoint)
    architecture, before = discover(model), logits(model)
    unload(architecture.block(model, 1))
    assert {p.device.type for p in architecture.block(model, 1).parameters()} == {"meta"}
    assert {p.device.type for p in architecture.block(model, 0).parameters()} == {"cpu"}
    load_into(architecture.block(model, 1), "model.layers.1", WeightFiles(checkpoint), torch.float32)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gemma", "opt"])
def test_tied_embeddings_are_one_tensor(family, tmp_path):
    path = make_tiny(family, tmp_path / "model")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = loaded(resolve_model(str(path), tmp_path / "cache"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_only_the_head_of_a_tied_pair_is_stored(tmp_path):
    path = make_tiny("llama-gqa-tied", tmp_path / "model")
    rewrite(path, lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()})
    model = loaded(resolve_model(str(path), tmp_path / "cache"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model), logits(stock(path)))


def test_sharded_checkpoint(tmp_path):
    whole = make_tiny("mistral", tmp_path / "whole")
    sharded = make_tiny("mistral", tmp_path / "sharded", max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    model = loaded(resolve_model(str(sharded), tmp_path / "cache"))
    assert torch.equal(logits(model), logits(stock(whole)))


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("opt", lambda name: name.removeprefix("model.")),
        ("llama-gqa-tied", lambda name: name.removeprefix("model.")),
        ("llama", lambda name: f"model.{name}"),
        ("gpt_neox", lambda name: name.replace("embed_out", "lm_head")),
    ],
)
def test_other_prefixes_are_understood(family, rename, tmp_path):
    path = make_tiny(family, tmp_path / "model")
    before = logits(stock(path))
    rewrite(path, lambda tensors: {rename(name): value for name, value in tensors.items()})
    assert torch.equal(logits(loaded(resolve_model(str(path), tmp_path / "cache"))), before)


def test_overrides_replace_stored_tensors_and_are_copied(tmp_path):
    checkpoint = resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "cache")
    name = "model.layers.1.mlp.up_proj.weight"
    pruned = torch.zeros(48, 32, dtype=torch.float64)
    model = loaded(checkpoint, overrides={name: pruned})
    assert model.get_parameter(name).dtype == torch.float32
    model.get_parameter(name).add_(1)
    assert pruned.count_nonzero() == 0
    reference = stock(checkpoint.path)
    with torch.no_grad():
        reference.get_parameter(name).fill_(1)
    assert torch.equal(logits(model), logits(reference))


def test_overrides_are_checked(tmp_path):
    checkpoint = resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "cache")
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up.weight' names no tensor of model.layers.1"):
        loaded(checkpoint, overrides={"model.layers.1.mlp.up.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"has shape \(3, 2\), not \(48, 32\)"):
        loaded(checkpoint, overrides={"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 2)})


def test_read_gives_memory_of_its_own(tmp_path):
    checkpoint = resolve_model(str(make_tiny("llama", tmp_path / "model")), tmp_path / "cache")
    weights = WeightFiles(checkpoint)
    name = "model.norm.weight"
    assert weights.shape(name) == (32,)
    first = weights.read([name], torch.float32)[name]
    first.zero_()
    again = weights.read([name], torch.float16)[name]
    assert again.dtype == torch.float16
    assert again.count_nonzero() == 32
    with pytest.raises(ModelError, match=r"does not hold the tensor 'model.nothing'"):
        weights.read(["model.nothing"], torch.float32)


def test_missing_tensors_are_named(tmp_path):
    path = make_tiny("llama", tmp_path / "model")
    rewrite(path, lambda tensors: {n: v for n, v in tensors.items() if "layers.2.mlp" not in n})
    checkpoint = resolve_model(str(path), tmp_path / "cache")
    with pytest.raises(ModelError, match=r"lacks 3 of \d+ tensors of LlamaForCausalLM: model.layers.2.mlp.gate_proj"):
        WeightFiles(checkpoint).matches(build_skeleton(checkpoint, torch.float32))


def test_an_untied_head_must_be_stored(tmp_path):
    path = make_tiny("llama", tmp_path / "model")
    rewrite(path, lambda tensors: {n: v for n, v in tensors.items() if n != "lm_head.weight"})
    checkpoint = resolve_model(str(path), tmp_path / "cache")
    with pytest.raises(ModelError, match=r"lacks 1 of \d+ tensors .*: lm_head.weight"):
        loaded(checkpoint)


def test_shapes_must_fit_the_configuration(tmp_path):
    path = make_tiny("llama", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    checkpoint = resolve_model(str(path), tmp_path / "cache")
    with pytest.raises(
        ModelError, match=r"gate_proj.weight is stored as \(48, 32\), but config.json makes it \(40, 32\)"
    ):
        loaded(checkpoint)


@pytest.mark.parametrize("model_type", ["unheard-of", "vit"])
def test_not_a_causal_language_model(model_type, tmp_path):
    path = make_tiny("llama", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ModelError, match=r"cannot build a causal language model from .*config.json"):
        build_skeleton(resolve_model(str(path), tmp_path / "cache"), torch.float32)
