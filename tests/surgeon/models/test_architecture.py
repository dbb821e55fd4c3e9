"""What is found in a model: blocks, linears, couplings, shared inputs."""

import pytest
import torch
from tiny import FAMILIES, make_tiny
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from surgeon.errors import ModelError
from surgeon.models import AttentionCoupling, MlpCoupling, QkvLayout, discover, shared_inputs
from surgeon.models.quiet import quiet_transformers

LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LLAMA_SHARED = {
    frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
    frozenset({"self_attn.o_proj"}),
    frozenset({"mlp.gate_proj", "mlp.up_proj"}),
    frozenset({"mlp.down_proj"}),
}
LINEARS = {
    "opt": (
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.q_proj",
        "self_attn.out_proj",
        "fc1",
        "fc2",
    ),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
}
SHARED = {
    "opt": {
        frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        frozenset({"self_attn.out_proj"}),
        frozenset({"fc1"}),
        frozenset({"fc2"}),
    },
    # Two norms feed the parallel attention and MLP of GPT-NeoX, one norm feeds both in Phi.
    "gpt_neox": {
        frozenset({"attention.query_key_value"}),
        frozenset({"attention.dense"}),
        frozenset({"mlp.dense_h_to_4h"}),
        frozenset({"mlp.dense_4h_to_h"}),
    },
    "phi": {
        frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"}),
        frozenset({"self_attn.dense"}),
        frozenset({"mlp.fc2"}),
    },
}
BLOCKS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
HEADS = {  # query heads, key/value heads, head width
    "opt": (4, 4, 8),
    "llama": (4, 4, 8),
    "llama-gqa-tied": (4, 2, 8),
    "mistral": (4, 2, 8),
    "qwen2": (4, 2, 8),
    "qwen3": (4, 2, 16),
    "gemma": (4, 2, 16),
    "gpt_neox": (4, 4, 8),
    "phi": (4, 2, 8),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family, tmp_path):
    return load(make_tiny(family, tmp_path / "model"))


def load(path) -> PreTrainedModel:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_blocks_and_linears_are_found(family, model):
    found = discover(model)
    assert found.blocks_path == BLOCKS.get(family, "model.layers")
    assert found.n_blocks == 3
    assert [found.linear_names(index) for index in range(3)] == [LINEARS.get(family, LLAMA_LINEARS)] * 3
    assert found.block_path(2) == f"{found.blocks_path}.2"
    name = found.linear_names(1)[0]
    assert found.linear(model, 1, name) is model.get_submodule(f"{found.blocks_path}.1.{name}")
    assert found.block(model, 1) is model.get_submodule(f"{found.blocks_path}.1")


def test_shared_inputs_are_found_by_running(family, model):
    found = discover(model)
    tokens = torch.arange(3, 20).repeat(2, 1)
    groups = shared_inputs(found.block(model, 1), lambda: model(tokens), found.linear_names(1))
    assert {frozenset(group) for group in groups} == SHARED.get(family, LLAMA_SHARED)
    # In the order of the linears, and no hook is left behind.
    assert [group[0] for group in groups] == [n for n in found.linear_names(1) if n in {g[0] for g in groups}]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_attention_couplings_cover_every_row_and_column_once(family, model):
    found = discover(model)
    for index in range(3):
        attention = found.couplings[index].attention
        assert (attention.n_query_heads, attention.n_kv_heads, attention.head_dim) == HEADS[family]
        groups = range(attention.n_kv_heads)
        for name in attention.input_linears:
            rows = [row for group in groups for row in attention.rows(group)[name]]
            assert rows == list(range(found.linear(model, index, name).out_features))
        columns = [column for group in groups for column in attention.columns(group)]
        assert columns == list(range(found.linear(model, index, attention.output).in_features))


def test_mlp_couplings_have_as_many_rows_as_columns(family, model):
    found = discover(model)
    for index in range(3):
        mlp = found.couplings[index].mlp
        width = found.linear(model, index, mlp.column_linear).in_features
        assert {found.linear(model, index, name).out_features for name in mlp.row_linears} == {width}
        assert set(mlp.row_linears) < set(found.linear_names(index))


def test_zeroing_the_columns_of_a_group_makes_its_rows_irrelevant(family, model):
    """The couplings mean what they say: once nothing reads a group, its own weights do not matter."""
    found = discover(model)
    tokens = torch.arange(3, 40)[None]
    coupling = found.couplings[1]
    with torch.no_grad():
        found.linear(model, 1, coupling.attention.output).weight[:, list(coupling.attention.columns(1))] = 0
        found.linear(model, 1, coupling.mlp.column_linear).weight[:, 5] = 0
        before = model(tokens).logits
        for name, rows in coupling.attention.rows(1).items():
            found.linear(model, 1, name).weight[list(rows)] += 1
        for name in coupling.mlp.row_linears:
            found.linear(model, 1, name).weight[5] += 1
        after = model(tokens).logits
        assert torch.allclose(before, after, atol=1e-5)
        first = coupling.attention.input_linears[0]
        found.linear(model, 1, first).weight[list(coupling.attention.rows(0)[first])] += 1
        assert not torch.allclose(before, model(tokens).logits, atol=1e-3)


def test_layouts():
    grouped = AttentionCoupling("q", "k", "v", "o", n_query_heads=6, n_kv_heads=2, head_dim=4)
    assert grouped.rows(1) == {"q": range(12, 24), "k": range(4, 8), "v": range(4, 8)}
    assert grouped.columns(1) == range(12, 24)
    fused = AttentionCoupling("qkv", "qkv", "qkv", "o", 4, 4, 4, QkvLayout.FUSED_PER_HEAD)
    assert fused.rows(2) == {"qkv": range(24, 36)}
    assert fused.columns(2) == range(8, 12)
    assert fused.input_linears == ("qkv",)
    assert MlpCoupling(("a", "b"), "c").row_linears == ("a", "b")


def test_unknown_family_is_found_without_couplings(tmp_path):
    known = load(make_tiny("llama", tmp_path / "model"))
    known.config.model_type = "unheard-of"
    found = discover(known)
    assert found.linear_names(0) == LLAMA_LINEARS
    assert found.couplings is None
    assert found.family is None


def test_one_list_per_block_is_not_taken_for_the_blocks(tmp_path):
    """Lists of the same length inside blocks, or smaller ones beside them, are not the blocks."""
    model = load(make_tiny("llama", tmp_path / "model"))
    for block in model.model.layers:
        block.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    model.aaa_extra = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert discover(model).blocks_path == "model.layers"


def test_no_blocks(tmp_path):
    model = load(make_tiny("llama", tmp_path / "model"))
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"No decoder blocks found in LlamaForCausalLM.*= 7.*OPT, Llama.*Phi"):
        discover(model)


def test_blocks_without_linears():
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ModelError, match=r"blocks at transformer.h but no nn.Linear.*Conv1D"):
        discover(model)


def test_broken_heads(tmp_path):
    model = load(make_tiny("llama", tmp_path / "model"))
    model.config.head_dim = 7
    with pytest.raises(ModelError, match=r"model.layers.0: 32 query rows .* not whole heads of 7"):
        discover(model)


def test_unknown_linear(tmp_path):
    model = load(make_tiny("llama", tmp_path / "model"))
    with pytest.raises(ModelError, match=r"model.layers.0 has no linear 'mlp.up'. It has: self_attn.q_proj"):
        discover(model).linear(model, 0, "mlp.up")


class Branches(nn.Module):
    """Feeds three linears in a way the test chooses."""

    def __init__(self, prepare) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.prepare = prepare

    def forward(self, x):
        return self.a(x) + self.b(self.prepare(x)) + self.c(x + 0)


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda x: x, (("a", "b"), ("c",))),
        (lambda x: x.view(2, 3, 4), (("a", "b"), ("c",))),
        (lambda x: x.clone(), (("a",), ("b",), ("c",))),
        (lambda x: x.add_(1), (("a",), ("b",), ("c",))),
        (lambda x: x.view(6, 4), (("a",), ("b",), ("c",))),
        (lambda x: x.transpose(0, 1), (("a",), ("b",), ("c",))),
    ],
)
def test_what_counts_as_the_same_input(prepare, expected):
    block = Branches(prepare)
    x = torch.randn(2, 3, 4)
    if expected[0] == ("a",) and prepare(x.clone()).shape != x.shape:
        block.forward = lambda x: (block.a(x), block.b(prepare(x)), block.c(x + 0))
    assert shared_inputs(block, lambda: block(x), ("a", "b", "c")) == expected


def test_a_linear_that_does_not_run_is_alone():
    block = Branches(lambda x: x)
    assert shared_inputs(block, lambda: block.a(torch.ones(1, 4)), ("a", "b", "c")) == (("a",), ("b",), ("c",))


def test_hooks_are_removed_when_the_run_fails():
    block = Branches(lambda x: x)
    with pytest.raises(RuntimeError):
        shared_inputs(block, lambda: block(torch.ones(1, 3)), ("a", "b"))
    assert not block.a._forward_pre_hooks
