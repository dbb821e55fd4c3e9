"""The corrected blocks of a state: what is stored, and that they can take the place of updates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_tiny

from surgeon.correction.adapters import AdapterSettings
from surgeon.models import resolve_model
from surgeon.passes.evaluation import evaluate_perplexity
from surgeon.store import StorePlace
from tasks.context import Context, ModelState, describe_model
from tasks.correction import correction_requests, correction_task
from tasks.evaluation import evaluation_task
from tasks.stage import Product, Request, Stage, commit, read_arrays
from tasks.weights import open_model, read_linears
from tests.tasks.correction_states import SEQUENCES, pruned_state

SETTINGS = AdapterSettings(rank=4, learning_rate=1e-2, epochs=3, batch_size=2, seed=(3, 1))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def specs(tmp_path_factory):
    """Family → layout of its tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    return {family: model_spec(folder, family) for family in ("opt", "llama-gqa-tied")}


def model_spec(folder, family):
    checkpoint = resolve_model(str(make_tiny(family, folder / family)), folder / "cache")
    return describe_model(checkpoint, "float32")


@pytest.fixture(params=[("opt", False), ("opt", True), ("llama-gqa-tied", True)], ids=str)
def start(request, specs, tmp_path):
    """A context, a pruned state in its store and calibration sequences."""
    family, single_weights = request.param
    context = Context(StorePlace(tmp_path / "store"), specs[family], "cpu", batch_size=2, blocks_per_group=2)
    calibration = commit(
        context, Request(Stage("sequences", 1, ()), {}, {}, "calibration"), Product({"tokens": SEQUENCES}), 0.0
    ).value
    return context, pruned_state(context, single_weights), calibration


def test_the_state_of_the_corrected_blocks_evaluates_to_the_loss_after(start):
    context, state, calibration = start
    outcome = correction_task(context, state, calibration, SETTINGS, "shot-01")
    corrected = state.after(outcome.value)
    facts = [reference.attributes["correction"] for reference in outcome.value]
    assert facts[1:] == facts[:-1]
    assert facts[0]["accepted"]
    assert (facts[0]["steps"], facts[0]["n_sequences"]) == (9, 6)
    assert not outcome.cached
    assert outcome.seconds > 0.0
    before = evaluation_task(context, state, calibration, "before").value.attributes
    after = evaluation_task(context, corrected, calibration, "after").value.attributes
    assert after["loss"] == pytest.approx(facts[0]["loss_after"], rel=1e-9)
    assert before["loss"] == pytest.approx(facts[0]["loss_before"], rel=1e-9)
    assert after["loss"] < before["loss"] - 0.02
    assert after["linear_nonzero"] <= before["linear_nonzero"]
    again = correction_task(context, state, calibration, SETTINGS, "shot-01")
    assert again.cached
    assert again.value == outcome.value


def test_objects_are_those_of_the_update_but_for_live_weights(start):
    context, state, calibration = start
    outcome = correction_task(context, state, calibration, SETTINGS, "shot-01")
    for block, reference in enumerate(outcome.value):
        old = read_arrays(context, state.updates[block].key)
        new = read_arrays(context, reference.key)
        assert old.keys() == new.keys()
        for name in old:
            assert new[name].dtype == old[name].dtype
            if not name.endswith("/weight"):
                assert new[name].tobytes() == old[name].tobytes(), name
            else:
                live = old[name] != 0.0  # random weights: only what was removed is zero
                assert (new[name][~live].view(np.int32) == 0).all()
                assert (new[name] != old[name])[live].mean() > 0.9
        assert reference.label == f"shot-01/block-{block:02d}/correction"
        attributes = context.store.open().open(state.updates[block].key).attributes
        assert reference.attributes["whole"] == attributes["whole"]
        for name, facts in reference.attributes["linears"].items():
            before, after = (arrays[f"{name}/weight"].astype(np.float64) for arrays in (old, new))
            size = np.sqrt(((after - before) ** 2).sum() / (before**2).sum())
            assert facts == {"n_live": 1, "correction_size": pytest.approx(size, rel=1e-12)}
            assert size > 1e-4
        linears = read_linears(context, state.after(outcome.value), block)
        assert [name for name, linear in linears.items() if linear.live_rows.all()] == attributes["whole"]


def test_dead_structures_stay_dead(start):
    context, state, calibration = start
    corrected = state.after(correction_task(context, state, calibration, SETTINGS, "shot-01").value)
    for block in range(context.model.n_blocks):
        for linear in read_linears(context, corrected, block).values():
            assert (linear.weight[~linear.live_rows] == 0).all()
            assert (linear.weight[:, ~linear.live_columns] == 0).all()
            assert linear.bias is None or (linear.bias[~linear.live_rows] == 0).all()


def test_a_correction_that_does_not_help_leaves_every_weight(start):
    context, state, _ = start
    likely = commit(
        context,
        Request(Stage("sequences", 1, ()), {"likely": True}, {}, "calibration"),
        Product({"tokens": likely_tokens(context, state)}),
        0.0,
    ).value
    harmful = AdapterSettings(learning_rate=30.0, batch_size=6, seed=0)
    outcome = correction_task(context, state, likely, harmful, "shot-01")
    for block, reference in enumerate(outcome.value):
        facts = reference.attributes["correction"]
        assert not facts["accepted"]
        assert facts["loss_after"] > facts["loss_before"]
        old, new = (read_arrays(context, key) for key in (state.updates[block].key, reference.key))
        assert all(np.array_equal(old[name], new[name]) for name in old)
        assert {linear["correction_size"] for linear in reference.attributes["linears"].values()} == {0.0}
    after = evaluate_perplexity(
        open_model(context, state.after(outcome.value)), read_arrays(context, likely.key)["tokens"], context.groups, 6
    )
    assert after.loss == pytest.approx(outcome.value[0].attributes["correction"]["loss_before"], rel=1e-9)


def likely_tokens(context, state):
    """What the model of the state goes on with by itself: a long step can only harm there."""
    model, tokens = open_model(context, state), torch.from_numpy(SEQUENCES[:, :1])
    with model.loaded(range(model.n_blocks)), torch.no_grad():
        for _ in range(11):
            following = model.model(tokens, use_cache=False).logits[:, -1:].argmax(dim=-1)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens.numpy()


def test_a_missing_block_is_made_again_with_the_same_content(start):
    context, state, calibration = start
    first = correction_task(context, state, calibration, SETTINGS, "shot-01").value
    context.store.open().evict(first[1].key)
    second = correction_task(context, state, calibration, SETTINGS, "shot-01")
    assert not second.cached
    assert [ref.digest for ref in second.value] == [ref.digest for ref in first]
    assert context.store.open().has_payload(first[1].key)


def test_keys_depend_on_all_that_is_read(start):
    context, state, calibration = start

    def keys(state=state, calibration=calibration, **changes):
        settings = replace(SETTINGS, **changes)
        return [r.key(context) for r in correction_requests(context, state, calibration, settings, "any")]

    usual = keys()
    assert len(set(usual)) == context.model.n_blocks
    assert keys(seed=(3, 1)) == usual
    last_changed = ModelState(
        state.checkpoint_digest, (*state.updates[:-1], replace(state.updates[-1], digest="0" * 64))
    )
    others = [
        keys(state=last_changed),
        keys(calibration=replace(calibration, digest="1" * 64)),
        *[keys(**{name: 7}) for name in ("rank", "epochs", "batch_size", "seed")],
        keys(learning_rate=0.5),
        keys(fraction=0.5),
    ]
    assert all(not set(other) & set(usual) for other in others)
    assert len({key for other in others for key in other}) == len(others) * context.model.n_blocks
    assert keys(seed=7) == keys(seed=(7,))


def test_a_dense_state_is_refused(start):
    context, state, calibration = start
    with pytest.raises(ValueError, match="a state without updates has nothing to correct"):
        correction_task(context, ModelState(state.checkpoint_digest), calibration, SETTINGS, "shot-01")
