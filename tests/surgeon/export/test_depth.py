"""Exports of models that lost whole blocks, and whose norms, embeddings or head have changed.

What is loaded back gives the logits of the stock model of dense shapes whose removed blocks hand their input on, with
padding, in one go and with a cache.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, VOCABULARY, byte_tokenizer
from transformers import AutoModelForCausalLM, Gemma3TextConfig, SmolLM3Config

import surgeon
from surgeon.choices import ExportLayout
from surgeon.errors import ExportError, ParameterError
from surgeon.export import expected_logits
from surgeon.models.quiet import quiet_transformers
from tests.surgeon.export.exporting import (
    PROBE,
    case_of,
    difference,
    exported,
    logits_by_others,
    masked_logits,
    opened,
    tiny_case,
)
from tests.surgeon.export.test_forms import made

EXACT = 2e-6
PATTERNS = ((0,), (1,), (2,), (0, 2))


def whole(family, folder, **options):
    """A model of which nothing is removed, but everything in its linears a little changed."""
    return tiny_case(family, folder, lambda *_: None, seed=1, **options)


def check(case, folder, code=False, **options):
    """Exports it and compares what others load with the masked model and with the block-wise one; gives the facts."""
    facts = exported(case, folder, **options)
    assert facts["code"] == code, facts["why_not_stock"]
    expected = masked_logits(case)
    assert difference(expected_logits(case.block_wise(), PROBE), expected) < EXACT
    found = logits_by_others(folder, facts)
    assert difference(found["whole"], expected) < EXACT
    assert difference(found["stepwise"], expected) < EXACT
    ours = surgeon.load(folder)
    with torch.no_grad():
        assert torch.equal(ours(PROBE.input_ids, attention_mask=PROBE.attention_mask).logits, found["whole"])
    n_left = len(case.blocks) - len(case.removed)
    config = ours.config.get_text_config(decoder=True)
    assert (config.num_hidden_layers, len(ours.get_submodule(case.path))) == (n_left, n_left)
    for position, block in enumerate(ours.get_submodule(case.path)):
        indices = {m.layer_idx for m in block.modules() if getattr(m, "layer_idx", None) is not None}
        assert indices <= {position}
    assert facts["blocks_removed"] == list(case.removed)
    assert facts["blocks_dense"] == len(case.blocks)
    return facts


@pytest.mark.parametrize("removed", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_blocks_gone_is_a_stock_model(family, removed, tmp_path):
    case = whole(family, tmp_path).without(*removed)
    facts = check(case, tmp_path / "export")
    assert facts["layout"] == "stock"
    dense, left = (load_file(path / "model.safetensors") for path in (case.checkpoint.path, tmp_path / "export"))
    numbers = {index: position for position, index in enumerate(i for i in range(3) if i not in removed)}
    gone = [name for name in dense if any(f".{index}." in name for index in removed)]
    assert gone
    renamed = {name: name for name in dense if name not in gone}
    for index, position in numbers.items():
        renamed |= {n: n.replace(f"layers.{index}.", f"layers.{position}.") for n in renamed if f"layers.{index}." in n}
    assert sorted(renamed.values()) == sorted(left)
    for before, after in renamed.items():
        if "norm" in before:
            assert torch.equal(dense[before], left[after])
    assert facts["bytes"] == facts["bytes_dense"] - sum(4 * dense[name].numel() for name in gone)
    assert facts["parameters"] == sum(tensor.numel() for tensor in left.values())
    n_linear = sum(linear.n_weights for block in case.blocks.values() for linear in block.values())
    assert (facts["weights"], facts["weights_gone"]) == (n_linear, n_linear * len(removed) // 3)
    assert facts["weights_zeroed"] == facts["weights_gone"]


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2", "gpt_neox", "gemma"])
@pytest.mark.parametrize("removed", [(0,), (1, 2)])
def test_text_with_and_without_cache(family, removed, tmp_path):
    case = whole(family, tmp_path).without(*removed)
    check(case, tmp_path / "export")
    model, masked = surgeon.load(tmp_path / "export"), case.masked()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    inputs = {"input_ids": PROBE.input_ids, "attention_mask": PROBE.attention_mask}
    texts = [model.generate(**inputs, **settings, use_cache=cache) for cache in (True, False)]
    texts.append(masked.generate(**inputs, **settings, use_cache=False))
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize("removed", [(0,), (1,)])
@pytest.mark.parametrize(
    ("kill", "layout"),
    [
        ("width_of_mlp", "stock"),
        ("uniform", "stock"),
        ("free_widths", "compact"),
        ("dropped_attention", "compact"),
        ("rows_and_columns", "compact"),
        ("everything", "compact"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_blocks_left_are_smaller_too(family, kill, layout, removed, tmp_path):
    case = made(family, kill, tmp_path).without(*removed)
    facts = check(case, tmp_path / "export", code=layout == "compact")
    assert facts["layout"] == layout
    left = load_file(tmp_path / "export" / "model.safetensors")
    assert facts["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in left.values())
    n_left = sum(t.numel() for name, t in left.items() if name.endswith("proj.weight"))
    assert facts["weights_gone"] == facts["weights"] - n_left


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "phi"])
def test_compact_forms_of_other_families(family, tmp_path):
    facts = check(made(family, "everything", tmp_path).without(0), tmp_path / "export", code=True)
    assert facts["layout"] == "compact"


def test_widths_that_differ_only_in_the_block_that_is_gone(tmp_path):
    case = made("llama", "dropped_mlp", tmp_path).without(1)
    assert check(case, tmp_path / "export")["layout"] == "stock"


def test_the_reason_names_blocks_by_their_old_numbers(tmp_path):
    case = made("llama", "free_widths", tmp_path).without(0)
    with pytest.raises(ParameterError, match="block 2 keeps 24 MLP neurons and block 1 keeps 32"):
        case.plan(layout=ExportLayout.STOCK)


def test_dense_shapes_have_fewer_blocks_as_well(tmp_path):
    case = made("llama", "everything", tmp_path).without(1)
    facts = check(case, tmp_path / "export", layout=ExportLayout.DENSE)
    n_linear = sum(linear.n_weights for linear in case.blocks[1].values())
    assert (facts["layout"], facts["weights_gone"]) == ("dense", n_linear)
    live = sum(linear.n_live_weights for index in (0, 2) for linear in case.blocks[index].values())
    assert facts["weights_zeroed"] == facts["weights"] - live
    card = (tmp_path / "export" / "README.md").read_text()
    assert "2 of 3 decoder blocks are left, numbered anew; gone: 1 (counted from 0)." in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    case = whole("qwen2", tmp_path).without(0)
    facts = exported(case, tmp_path / "export", dtype)
    expected = masked_logits(case, getattr(torch, dtype))
    assert difference(logits_by_others(tmp_path / "export", facts, dtype)["stepwise"], expected) < 2e-2
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert facts["bytes"] == sum(2 * tensor.numel() for tensor in tensors.values())


def test_shards_of_removed_blocks_are_left_out(tmp_path):
    case = whole("opt", tmp_path, max_shard_size="6KB").without(0, 1)
    facts = check(case, tmp_path / "export")
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "export").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == facts["bytes"]
    assert len(files) < len(list(case.checkpoint.path.glob("*.safetensors")))
    assert not any("layers.1." in name for name in index["weight_map"])


def test_names_without_the_leading_part_and_tensors_the_model_has_not(tmp_path):
    case = whole("gpt_neox", tmp_path)
    file = case.checkpoint.path / "model.safetensors"
    tensors = {name.removeprefix("gpt_neox."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"layers.{i}.attention.masked_bias": torch.full((), float(i)) for i in range(3)}
    save_file(tensors, file, metadata={"format": "pt"})
    case = replace(case, checkpoint=opened(case.checkpoint.path)).without(1)
    check(case, tmp_path / "export")
    left = load_file(tmp_path / "export" / "model.safetensors")
    biases = {name: float(tensor) for name, tensor in left.items() if "masked_bias" in name}
    assert biases == {"layers.0.attention.masked_bias": 0.0, "layers.1.attention.masked_bias": 2.0}


def test_a_family_without_description(checkpoint_of, tmp_path):
    case = case_of(checkpoint_of("falcon"), lambda *_: None, seed=3).without(1)
    assert check(case, tmp_path / "export")["layout"] == "stock"


def make_model(config, path):
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return opened(path)


_SHAPE = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


@pytest.mark.parametrize("stripped", [False, True])
def test_patterns_of_gemma3(stripped, tmp_path):
    """Every other layer has a window and its own rotary base; the pattern alone would give it to others."""
    window, full = "sliding_attention", "full_attention"
    config = Gemma3TextConfig(**_SHAPE, sliding_window=4, layer_types=[window, full, window, full, window])
    checkpoint = make_model(config, tmp_path / "model")
    if stripped:  # as older files have it: nothing by layer, only the pattern
        path = tmp_path / "model" / "config.json"
        content = json.loads(path.read_text())
        content.pop("layer_types")
        path.write_text(json.dumps({**content, "sliding_window_pattern": 2}))
        checkpoint = opened(tmp_path / "model")
    case = case_of(checkpoint, lambda *_: None, seed=2).without(1, 2)
    check(case, tmp_path / "export")
    after = json.loads((tmp_path / "export" / "config.json").read_text())
    assert after["layer_types"] == [window, full, window]


def test_layers_without_rotary_positions(tmp_path):
    config = SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0, 1, 1, 0], use_sliding_window=False)
    case = case_of(make_model(config, tmp_path / "model"), lambda *_: None, seed=2).without(0, 2)
    check(case, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["no_rope_layers"] == [0, 1, 0]


def test_windows_of_qwen2(tmp_path):
    options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    case = whole("qwen2", tmp_path, **options).without(0)
    check(case, tmp_path / "export")
    after = json.loads((tmp_path / "export" / "config.json").read_text())
    assert after["max_window_layers"] == 1
    assert after["layer_types"] == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("kill", ["uniform", "free_widths"])
def test_pruned_again(kill, tmp_path):
    """An export with fewer blocks is a model like any other: it can lose more of its blocks, and of what is in them."""
    first = made("qwen2", kill, tmp_path).without(0)
    exported(first, tmp_path / "first")
    checkpoint = opened(tmp_path / "first")
    dense = case_of(checkpoint, lambda *_: None)
    assert len(dense.blocks) == 2

    def fewer(_index, live):
        live["mlp.down_proj"][1][20:] = False

    again = case_of(checkpoint, fewer).without(0)
    expected = expected_logits(again.block_wise(), PROBE)
    facts = exported(again, tmp_path / "second")
    assert (facts["layout"], facts["neurons"], facts["blocks_removed"]) == ("stock", [20, 20], [0])
    assert difference(logits_by_others(tmp_path / "second", facts)["stepwise"], expected) < EXACT
    only = case_of(checkpoint, lambda *_: None).without(1)
    facts = exported(only, tmp_path / "third")
    expected = expected_logits(only.block_wise(), PROBE)
    assert difference(logits_by_others(tmp_path / "third", facts)["stepwise"], expected) < EXACT


def test_a_compact_export_with_maps_loses_blocks(tmp_path):
    exported(made("llama", "everything", tmp_path), tmp_path / "first")
    case = case_of(opened(tmp_path / "first"), lambda *_: None).without(1)
    expected = expected_logits(case.block_wise(), PROBE)
    facts = exported(case, tmp_path / "second")
    described = json.loads((tmp_path / "second" / "config.json").read_text())["pruned"]["layers"]
    assert len(described) == 2
    assert difference(logits_by_others(tmp_path / "second", facts)["stepwise"], expected) < EXACT


def changed(case, removed=(), seed=4):
    """The same with other norms, embeddings, final norm and head."""
    generator = torch.Generator().manual_seed(seed)
    model = case.masked()
    inside, linears = f"{case.path}.", case.blocks
    others, trunk = {index: {} for index in linears}, {}
    for name, parameter in model.named_parameters():  # tied ones once
        value = parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
        if not name.startswith(inside):
            trunk[name] = value
            continue
        number, _, rest = name.removeprefix(inside).partition(".")
        if rest.rpartition(".")[0] not in linears[int(number)]:
            others[int(number)][rest] = value
    assert trunk
    assert all(others.values())
    return replace(case, others=others, trunk=trunk, removed=removed)


@pytest.mark.parametrize("removed", [(), (1,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_embeddings_and_head_that_have_changed(family, removed, tmp_path):
    before = whole(family, tmp_path)
    case = changed(before, removed)
    facts = check(case, tmp_path / "export")
    assert difference(masked_logits(case), masked_logits(before.without(*removed))) > 0.01
    model = surgeon.load(tmp_path / "export")
    is_tied = family == "llama-gqa-tied"
    if is_tied:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert "lm_head.weight" not in load_file(tmp_path / "export" / "model.safetensors")
    assert facts["layout"] == ("stock" if removed else "dense")


@pytest.mark.parametrize("kill", ["uniform", "everything"])
def test_changed_norms_of_smaller_blocks(kill, tmp_path):
    case = changed(made("qwen3", kill, tmp_path), (1,))
    check(case, tmp_path / "export", code=kill == "everything")


def test_a_tie_that_is_stored_twice(tmp_path):
    case = whole("llama-gqa-tied", tmp_path)
    file = case.checkpoint.path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    case = changed(replace(case, checkpoint=opened(case.checkpoint.path)), (2,))
    check(case, tmp_path / "export")
    left = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(left["lm_head.weight"], left["model.embed_tokens.weight"])
    assert torch.equal(left["lm_head.weight"], case.trunk["model.embed_tokens.weight"])


@pytest.mark.parametrize(("removed", "named"), [((0, 1, 2), "0, 1, 2"), ((1, 3), "1, 3")])
def test_blocks_that_cannot_be_left_out(removed, named, tmp_path):
    case = whole("llama", tmp_path).without(*removed)
    with pytest.raises(ExportError, match=rf"blocks {named} are to be left out of a model with 3 \(from 0\); at least"):
        case.plan()


def test_changed_tensors_that_do_not_fit(tmp_path):
    case = whole("llama", tmp_path)
    name = "model.norm.weight"
    with pytest.raises(ExportError, match=rf"{name} has the shape \[32\], but what has become of it \[31\]; nothing"):
        exported(replace(case, trunk={name: torch.ones(31)}), tmp_path / "export")
    with pytest.raises(ExportError, match=r"has no tensor 'model.layers.1.norm.weight' to be replaced; nothing was"):
        exported(replace(case, others={1: {"norm.weight": torch.ones(32)}}), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_what_uses_the_tests_here_is_what_they_say(tmp_path):
    """The masked model with a removed block differs from the one with it, so the comparisons above can fail."""
    case = whole("llama", tmp_path)
    assert difference(masked_logits(case.without(1)), masked_logits(case)) > 0.01
    assert difference(masked_logits(case.without(1)), masked_logits(case.without(0))) > 0.01
