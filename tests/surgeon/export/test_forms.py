"""Every form of export gives the logits of the stock model with masked weights, loaded by transformers and by us."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import surgeon
from surgeon.choices import ExportLayout
from surgeon.errors import ParameterError
from surgeon.export import PrunedModel, expected_logits, export_checkpoint, plan_export
from surgeon.models import BlockCouplings, build_skeleton, discover
from surgeon.models.quiet import quiet_transformers
from surgeon.passes.blockwise import BlockwiseModel
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
from tests.surgeon.passes.stock import load_stock

NAMED = ("opt", "llama", "llama-gqa-tied", "mistral", "qwen2", "qwen3", "gpt_neox")
FAMILIES = (*NAMED, "gemma", "phi")
HEADS_TIED = ("opt", "gpt_neox")
EXACT = 2e-6


def couplings_of(checkpoint) -> tuple[BlockCouplings, ...]:
    return discover(build_skeleton(checkpoint, torch.float32)).couplings


class Kills:
    """What is removed of a block, by what is removed of which linear."""

    def __init__(self, couplings):
        self.couplings = couplings

    def neurons(self, live, n):
        """Columns of the down linear alone: rows that feed them must follow."""
        live[self.couplings[0].mlp.column_linear][1][:n] = False

    def group(self, live, group):
        """Columns of the output linear alone."""
        attention = self.couplings[0].attention
        columns = attention.columns(group)
        live[attention.output][1][columns.start : columns.stop] = False

    def uniform(self, _index, live):
        self.neurons(live, 16)
        self.group(live, 1)

    def width_of_mlp(self, _index, live):
        self.neurons(live, 16)

    def free_widths(self, index, live):
        self.neurons(live, 8 * (index + 1))
        if index == 1:
            self.group(live, 0)

    def dropped_mlp(self, index, live):
        if index == 1:
            self.neurons(live, None)

    def dropped_attention(self, index, live):
        if index in (0, 2):
            live[self.couplings[0].attention.output][1][:] = False

    def rows_and_columns(self, index, live):
        generator = torch.Generator().manual_seed(index)
        for rows, columns in live.values():
            rows &= torch.rand(len(rows), generator=generator) > 0.25
            columns &= torch.rand(len(columns), generator=generator) > 0.25

    def everything(self, index, live):
        self.rows_and_columns(index, live)
        self.dropped_attention(index, live)
        if index == 0:
            self.neurons(live, None)


KILLS = (
    "uniform",
    "width_of_mlp",
    "free_widths",
    "dropped_mlp",
    "dropped_attention",
    "rows_and_columns",
    "everything",
)


def made(family, kill, folder, **options):
    case = tiny_case(family, folder, lambda *_: None, **options)
    kills = Kills(couplings_of(case.checkpoint))
    return case_of(case.checkpoint, getattr(kills, kill))


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_sizes(family, kill, tmp_path):
    case = made(family, kill, tmp_path)
    facts = exported(case, tmp_path / "export")
    is_stock = kill == "width_of_mlp" or (kill == "uniform" and family not in HEADS_TIED)
    assert facts["layout"] == ("stock" if is_stock else "compact"), facts["why_not_stock"]
    assert facts["code"] == (not is_stock)
    expected = masked_logits(case)
    found = logits_by_others(tmp_path / "export", facts)
    assert difference(found["whole"], expected) < EXACT
    assert difference(found["stepwise"], expected) < EXACT
    ours = surgeon.load(tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(ours(PROBE.input_ids, attention_mask=PROBE.attention_mask).logits, found["whole"])
    check_sizes(case, tmp_path / "export", facts)


def check_sizes(case, folder, facts):
    """The files have less by exactly what was removed, and index maps."""
    tensors = load_file(folder / "model.safetensors")
    dense = load_file(case.checkpoint.path / "model.safetensors")
    maps = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
    n_dense, n = (sum(t.numel() for t in found.values() if t.is_floating_point()) for found in (dense, tensors))
    assert (facts["parameters_dense"], facts["parameters"]) == (n_dense, n)
    assert facts["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert facts["bytes_dense"] == 4 * n_dense
    assert facts["index_maps"] == bool(maps)
    assert all(name.endswith((".kept_inputs", ".kept_outputs")) for name in maps)
    linears = {f"{case.path}.{i}.{name}.weight": li for i, block in case.blocks.items() for name, li in block.items()}
    n_linear = sum(linear.n_weights for linear in linears.values())
    left = sum(tensors[name].numel() for name in linears if name in tensors)
    assert facts["weights_gone"] == n_linear - left
    assert facts["weights_zeroed"] == n_linear - sum(linear.n_live_weights for linear in linears.values())
    assert facts["weights_gone"] >= facts["weights_zeroed"] > 0
    # What stays is what it was: no weight that is stored is one that pruning removed, in linears with maps.
    for name, linear in linears.items():
        if name in tensors and f"{name.removesuffix('weight')}kept_inputs" in maps:
            columns = maps[f"{name.removesuffix('weight')}kept_inputs"]
            assert len(columns) == tensors[name].shape[1] <= int(linear.live_columns.sum())


@pytest.mark.parametrize(
    ("family", "kill"), [("llama-gqa-tied", "uniform"), ("opt", "everything"), ("qwen2", "everything")]
)
def test_text_with_and_without_cache(family, kill, tmp_path):
    case = made(family, kill, tmp_path)
    exported(case, tmp_path / "export")
    model, stock = surgeon.load(tmp_path / "export"), case.masked()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    inputs = {"input_ids": PROBE.input_ids, "attention_mask": PROBE.attention_mask}
    texts = [m.generate(**inputs, **settings, use_cache=cache) for m in (model, stock) for cache in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("family", "kill"), [("llama", "uniform"), ("opt", "everything"), ("gpt_neox", "rows_and_columns")]
)
def test_half_precision(family, kill, dtype, tmp_path):
    case = made(family, kill, tmp_path)
    facts = exported(case, tmp_path / "export", dtype)
    torch_dtype = getattr(torch, dtype)
    model = surgeon.load(tmp_path / "export")
    assert model.dtype == torch_dtype
    assert all(
        tensor.dtype in (torch_dtype, torch.int64)
        for tensor in load_file(tmp_path / "export" / "model.safetensors").values()
    )
    found = logits_by_others(tmp_path / "export", facts, dtype)
    assert difference(found["whole"], masked_logits(case, torch_dtype)) < 2e-2
    assert difference(found["stepwise"], masked_logits(case, torch_dtype)) < 2e-2
    assert surgeon.load(tmp_path / "export", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("activation", ["sigmoid", "gelu_new"])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_give_the_activation_of_zero(activation, bias, tmp_path):
    """A removed row of fc1 gives phi(0), which goes into the bias of fc2; without a bias the neuron stays."""

    def kill(_index, live):
        live["fc1"][0][:10] = False
        live["fc2"][1][6:20] = False

    case = tiny_case("opt", tmp_path, kill, activation_function=activation, enable_bias=bias)
    facts = exported(case, tmp_path / "export")
    n_left = 64 - (14 if activation == "sigmoid" and not bias else 20)
    assert (facts["neurons"], facts["layout"]) == ([n_left, n_left], "stock")
    assert difference(logits_by_others(tmp_path / "export", facts)["whole"], masked_logits(case)) < EXACT


@pytest.mark.parametrize("bias", [True, False])
def test_a_gate_that_does_not_give_zero_keeps_its_neurons(bias, tmp_path):
    def kill(_index, live):
        live["mlp.gate_proj"][0][:10] = False
        live["mlp.up_proj"][0][8:20] = False
        live["mlp.gate_proj"][1][:] = False

    case = tiny_case("llama", tmp_path, kill, hidden_act="sigmoid", mlp_bias=bias)
    facts = exported(case, tmp_path / "export")
    assert facts["neurons"] == [36, 36]
    assert difference(logits_by_others(tmp_path / "export", facts)["whole"], masked_logits(case)) < EXACT


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_value_rows_and_output_columns_follow_each_other(family, tmp_path):
    def kill(index, live):
        couplings = couplings_of(checkpoint)[index].attention
        if index == 0:  # value rows of the first group
            name = couplings.value
            start = 2 * couplings.head_dim if family == "gpt_neox" else 0
            live[name][0][start : start + couplings.head_dim] = False
        if index == 1:  # a channel of the last head
            live[couplings.output][1][-1] = False
        if index == 2:  # all inputs of the value rows: with a bias they still give it
            live[couplings.value][1][:] = False

    checkpoint = tiny_case(family, tmp_path, lambda *_: None).checkpoint
    case = case_of(checkpoint, kill)
    facts = exported(case, tmp_path / "export")
    described = json.loads((tmp_path / "export" / "config.json").read_text())["pruned"]["layers"]
    n_last = 0 if family == "llama" else 4
    assert [layer["heads"][1] for layer in described] == [3, 4, n_last]
    assert difference(logits_by_others(tmp_path / "export", facts)["stepwise"], masked_logits(case)) < EXACT


def test_an_unknown_family_gets_index_maps_and_nothing_more(checkpoint_of, tmp_path):
    case = case_of(checkpoint_of("falcon"), Kills(None).rows_and_columns)
    facts = exported(case, tmp_path / "export")
    assert (facts["layout"], facts["neurons"], facts["index_maps"]) == ("compact", None, True)
    assert facts["weights_gone"] == facts["weights_zeroed"]
    assert "not known which rows" in facts["why_not_stock"]
    assert difference(logits_by_others(tmp_path / "export", facts)["stepwise"], masked_logits(case)) < EXACT


@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied"])
def test_a_llama_with_heads_that_do_not_divide_the_width(family, tmp_path):
    """It becomes a Mistral; every setting that the two have in common stays."""
    options = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, "rms_norm_eps": 1e-5}
    case = tiny_case(family, tmp_path, lambda *_: None, num_attention_heads=8, num_key_value_heads=4, **options)
    kills = Kills(couplings_of(case.checkpoint))
    case = case_of(case.checkpoint, kills.uniform)
    facts = exported(case, tmp_path / "export")
    before, after = (AutoConfig.from_pretrained(path) for path in (case.checkpoint.path, tmp_path / "export"))
    assert (after.model_type, after.num_attention_heads, after.num_key_value_heads) == ("mistral", 6, 3)
    assert (after.head_dim, after.sliding_window, after.architectures) == (4, None, ["MistralForCausalLM"])
    for name in (
        "rope_parameters",
        "rms_norm_eps",
        "tie_word_embeddings",
        "eos_token_id",
        "hidden_act",
        "max_position_embeddings",
    ):
        assert getattr(after, name) == getattr(before, name), name
    assert difference(logits_by_others(tmp_path / "export", facts)["stepwise"], masked_logits(case)) < EXACT


def test_asked_for_another_form(tmp_path):
    case = made("llama", "uniform", tmp_path)
    for layout in ("compact", "dense"):
        facts = exported(case, tmp_path / layout, layout=ExportLayout(layout))
        assert facts["layout"] == layout
        assert (facts["bytes"] == facts["bytes_dense"]) == (layout == "dense")
        assert difference(logits_by_others(tmp_path / layout, facts)["stepwise"], masked_logits(case)) < EXACT


@pytest.mark.parametrize(
    ("family", "kill", "why"),
    [
        ("opt", "uniform", "opt ties the number of heads to the width, and 3 heads are left"),
        ("llama", "free_widths", "block 1 keeps 32 MLP neurons and block 0 keeps 40"),
        ("llama", "dropped_attention", "block 0 has no attention any more"),
        ("mistral", "rows_and_columns", r"block 0, linear self_attn.q_proj keeps \d+ of 32 rows"),
    ],
)
def test_stock_where_it_is_impossible(family, kill, why, tmp_path):
    case = made(family, kill, tmp_path)
    with pytest.raises(ParameterError, match=f"export.layout: no configuration of stock .*: {why}"):
        plan_export(case.pruned, "float32", ExportLayout.STOCK)


def test_nothing_removed_is_dense(tmp_path):
    case = tiny_case("llama", tmp_path, lambda *_: None)
    assert case.plan().form is ExportLayout.DENSE


def test_maps_that_cost_more_than_they_save(tmp_path):
    def one_column(_index, live):
        live["mlp.up_proj"][1][:1] = False

    case = tiny_case("llama", tmp_path, one_column)
    assert case.plan("float32").form is ExportLayout.DENSE
    assert "would not be smaller" in case.plan("float32").why_not_stock


def test_shards_without_tensors_are_left_out(tmp_path):
    case = made("opt", "everything", tmp_path, max_shard_size="6KB")
    facts = exported(case, tmp_path / "export")
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "export").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) < len(list(case.checkpoint.path.glob("*.safetensors")))
    assert index["metadata"]["total_size"] == facts["bytes"]
    assert difference(logits_by_others(tmp_path / "export", facts)["whole"], masked_logits(case)) < EXACT


@pytest.mark.parametrize("ours", [False, True])
def test_saved_again_by_transformers(ours, tmp_path):
    """The configuration names the modelling file, so without it nothing could load the model again."""
    case = made("llama", "everything", tmp_path)
    facts = exported(case, tmp_path / "export")
    with quiet_transformers():
        if ours:
            model = surgeon.load(tmp_path / "export")
        else:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
        model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_pruned.py").read_bytes() == (
        tmp_path / "export" / "modeling_pruned.py"
    ).read_bytes()
    assert difference(logits_by_others(tmp_path / "again", facts)["stepwise"], masked_logits(case)) < EXACT


@pytest.mark.parametrize("kill", ["free_widths", "rows_and_columns", "everything"])
def test_this_package_opens_it_block_wise_without_its_code(kill, tmp_path):
    case = made("qwen2", kill, tmp_path)
    exported(case, tmp_path / "export")
    (tmp_path / "export" / "modeling_pruned.py").write_text("raise SystemExit('this must not run')")
    model = BlockwiseModel(opened(tmp_path / "export"))
    assert difference(expected_logits(model, PROBE), masked_logits(case)) < EXACT
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    assert max(tokenizer("the hill").input_ids) < VOCABULARY


def test_pruned_and_exported_again(tmp_path):
    """A compact model without index maps is a model with other widths: it can lose more, and its blocks differ."""
    first = made("llama", "free_widths", tmp_path)
    exported(first, tmp_path / "first")
    checkpoint = opened(tmp_path / "first")
    assert [c.attention.n_kv_heads for c in couplings_of(checkpoint)] == [4, 3, 4]
    model = BlockwiseModel(checkpoint)

    def kill(index, live):
        n_left = 24 - 8 * (index == 1)
        live["mlp.down_proj"][1][n_left:] = False
        output = live["self_attn.o_proj"][1]
        output[: len(output) - 16] = False

    again = case_of(checkpoint, kill)
    expected = expected_logits(BlockwiseModel(checkpoint, overrides=again.overrides), PROBE)
    facts = exported(again, tmp_path / "second")
    assert (facts["neurons"], facts["key_value_heads"], facts["layout"]) == ([16, 24], [2, 2], "compact")
    assert difference(logits_by_others(tmp_path / "second", facts)["stepwise"], expected) < EXACT

    def alike(_index, live):
        live["mlp.down_proj"][1][20:] = False
        output = live["self_attn.o_proj"][1]
        output[: len(output) - 16] = False

    uniform = case_of(checkpoint, alike)
    expected = expected_logits(BlockwiseModel(checkpoint, overrides=uniform.overrides), PROBE)
    facts = exported(uniform, tmp_path / "third")
    assert (facts["layout"], facts["code"], facts["neurons"]) == ("stock", False, [20, 20])
    assert not (tmp_path / "third" / "modeling_pruned.py").exists()
    assert difference(logits_by_others(tmp_path / "third", facts)["stepwise"], expected) < EXACT
    assert model.n_blocks == 3


def test_attention_is_that_of_the_dense_model_and_can_be_chosen(tmp_path):
    case = made("llama", "everything", tmp_path)
    exported(case, tmp_path / "export")
    model, inputs = surgeon.load(tmp_path / "export"), {"attention_mask": PROBE.attention_mask}
    assert model.config._attn_implementation == load_stock(case.checkpoint.path).config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert difference(model(PROBE.input_ids, **inputs).logits, masked_logits(case)) < EXACT
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts = [
        model.generate(PROBE.input_ids, **inputs, **settings, **cache)
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True})
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "qwen3"])
def test_a_model_without_some_attentions_and_mlps_is_pruned_again(family, tmp_path):
    """Its couplings are not known any more, so what goes now goes by index maps; constants stay."""

    def drop(index, live):
        kills.dropped_attention(index, live)
        kills.dropped_mlp(index, live)

    dense = tiny_case(family, tmp_path, lambda *_: None)
    kills = Kills(couplings_of(dense.checkpoint))
    exported(case_of(dense.checkpoint, drop), tmp_path / "first")
    checkpoint = opened(tmp_path / "first")
    assert discover(build_skeleton(checkpoint, torch.float32)).couplings is None
    again = case_of(checkpoint, kills.rows_and_columns)
    expected = expected_logits(BlockwiseModel(checkpoint, overrides=again.overrides), PROBE)
    facts = exported(again, tmp_path / "second")
    assert (facts["layout"], facts["index_maps"]) == ("compact", True)
    assert difference(logits_by_others(tmp_path / "second", facts)["stepwise"], expected) < EXACT


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_blocks_are_read_one_after_the_other(max_shard_size, tmp_path):
    """Weights of one block are needed at a time: each is read once for every file it is in."""
    case = made("qwen2", "free_widths", tmp_path, max_shard_size=max_shard_size)
    read = []

    def linears(index):
        read.append(index)
        return case.blocks[index]

    pruned = PrunedModel(case.checkpoint, linears, case.pruned.live)
    export_checkpoint(plan_export(pruned, "bfloat16"), tmp_path / "export", "card", {})
    assert set(read) == set(case.blocks)
    assert len(read) <= (3 if max_shard_size == "1GB" else 3 + len(list((tmp_path / "export").glob("*.safetensors"))))


def test_what_the_card_says(tmp_path):
    case = made("llama", "free_widths", tmp_path)
    facts = exported(case, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"| bytes of weights, same type | {facts['bytes_dense']:,} | {facts['bytes']:,} |" in card
    assert f"pruning set {facts['weights_zeroed']:,} to zero; {facts['weights_gone']:,} are not in the files" in card
    assert "Per block: 24 to 40 MLP neurons, 3 to 4 query heads, 3 to 4 key/value heads." in card
    assert "trust_remote_code=True" in card
    exported(case, tmp_path / "dense", layout=ExportLayout.DENSE)
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "The files are no smaller than those of the dense model in the same type." in card
    assert "trust_remote_code" not in card


def test_layers_of_the_configuration_stay(tmp_path):
    """Settings by layer, and those that depend on a width that is not that of the MLP or the heads."""
    case = made("qwen2", "uniform", tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    facts = exported(case, tmp_path / "export")
    before, after = (AutoConfig.from_pretrained(path) for path in (case.checkpoint.path, tmp_path / "export"))
    assert after.layer_types == before.layer_types
    assert len(set(after.layer_types)) == 2
    assert difference(logits_by_others(tmp_path / "export", facts)["stepwise"], masked_logits(case)) < EXACT
