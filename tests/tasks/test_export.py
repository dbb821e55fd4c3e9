"""The export of a state from the store: blocks that are gone or as in the checkpoint, other norms and embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny

from surgeon.errors import ExportError
from surgeon.export import CARD_FACTS, load_back
from surgeon.loading import load
from surgeon.models import resolve_model
from surgeon.store import StorePlace
from tasks.context import Context, ModelState, StoredBlock, describe_model
from tasks.export import export_task
from tasks.stage import Product, Request, Stage, commit, read_arrays
from tasks.weights import OTHER, open_model
from tests.flows.project import logits_here
from tests.tasks.correction_states import pruned_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def context(tmp_path, monkeypatch):
    monkeypatch.setattr(load_back, "fresh_logits", logits_here)
    checkpoint = resolve_model(str(make_tiny("llama-gqa-tied", tmp_path / "model")), tmp_path / "cache")
    return Context(
        StorePlace(tmp_path / "store"), describe_model(checkpoint, "float32"), "cpu", batch_size=2, blocks_per_group=3
    )


def stored(context, arrays, label, facts=None):
    request = Request(Stage("update", 1, ()), {"by": "hand", "of": label}, {}, label)
    reference = commit(context, request, Product(arrays, facts or {}), 0.0).value
    return StoredBlock(reference.key, reference.digest)


def recovered(context):
    """A pruned state of which block 1 is gone, block 2 is dense, and norms and embeddings were trained."""
    draw = np.random.default_rng(3)
    state = pruned_state(context, single_weights=False)
    first = state.update_of(0)
    norm = draw.uniform(0.5, 1.5, 32).astype(np.float32)
    arrays = {**read_arrays(context, first.key), f"{OTHER}input_layernorm.weight": norm}
    facts = {"linears": {shape.name: {"n_live": 1} for shape in context.model.blocks[0]}}
    block = stored(context, arrays, "block-00/recovered", facts)
    trunk = {
        "model.embed_tokens.weight": draw.normal(0, 0.2, (272, 32)).astype(np.float32),
        "model.norm.weight": draw.uniform(0.5, 1.5, 32).astype(np.float32),
    }
    state = replace(state, updates=(block, state.update_of(1), None), trunk=stored(context, trunk, "trunk"))
    return state.without([1]), norm, trunk


def test_a_state_with_all_of_it(context, tmp_path):
    state, norm, trunk = recovered(context)
    facts = export_task(context, state, tmp_path / "export", "float32", "auto", CARD_FACTS).value
    assert facts["blocks_removed"] == [1]
    assert facts["largest_logit_difference"] < 1e-5
    tensors, dense = (load_file(path / "model.safetensors") for path in (tmp_path / "export", tmp_path / "model"))
    np.testing.assert_array_equal(tensors["model.layers.0.input_layernorm.weight"], norm)
    for name, value in trunk.items():
        np.testing.assert_array_equal(tensors[name], value)
    for name in ("mlp.up_proj.weight", "self_attn.o_proj.weight", "input_layernorm.weight"):
        assert torch.equal(tensors[f"model.layers.1.{name}"], dense[f"model.layers.2.{name}"])
    assert not any("layers.2." in name for name in tensors)
    tokens = torch.arange(4, 44).view(2, 20)
    model = open_model(context, state)
    with model.loaded(range(3)), torch.no_grad():
        expected = model.model(tokens).logits
        found = load(tmp_path / "export")(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert export_task(context, state, tmp_path / "export", "float32", "auto", CARD_FACTS).cached


@pytest.mark.parametrize("change", ["removed", "trunk"])
def test_any_change_makes_another_export(context, tmp_path, change):
    state, _, _ = recovered(context)
    export_task(context, state, tmp_path / "export", "float32", "auto", CARD_FACTS)
    other = replace(state, removed=(2,)) if change == "removed" else replace(state, trunk=None)
    assert not export_task(context, other, tmp_path / "export", "float32", "auto", CARD_FACTS).cached


def test_blocks_alone(context, tmp_path):
    state = ModelState(context.model.checkpoint.digest).without([0, 2])
    facts = export_task(context, state, tmp_path / "export", "float32", "auto", CARD_FACTS).value
    assert (facts["layout"], facts["blocks_removed"], facts["trust_remote_code"]) == ("stock", [0, 2], False)


def test_nothing_removed_and_nothing_changed(context, tmp_path):
    with pytest.raises(ExportError, match="nothing has been pruned yet, so there is nothing to export"):
        export_task(context, ModelState(context.model.checkpoint.digest), tmp_path / "e", "float32", "auto", "")
