"""LayerChop as a shot: planted useless layers are found, greedy removal is greedy, nothing is computed twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.needs import disk_needs, memory_needs
from flows.planning import dry_run
from flows.work import WorkModel
from surgeon.choices import Selector
from surgeon.errors import ParameterError
from surgeon.layers.spec import SPECS
from tasks.stage import read_arrays
from tasks.weights import open_model, read_linears
from tests.flows.layers import (
    N_BLOCKS,
    chop,
    own_text,
    planned,
    planted_model,
    runs_on,
    session_of,
    shot_of,
    stock_loss,
    stored_tokens,
)
from tests.flows.sessions import Runs
from tests.surgeon.conftest import make_falcon

USELESS = (2, 3)
ALL = {"protect_first": 0, "protect_last": 0}
SCORED = [selector for selector, spec in SPECS.items() if not spec.is_pattern]

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_model(tmp_path_factory.mktemp("planted") / "model", USELESS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_model(tmp_path_factory.mktemp("plain") / "model", ())


@pytest.fixture(scope="module")
def shared(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs on the planted model that share a store."""
    return runs_on(planted, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def runs(plain: Path, tmp_path: Path) -> Runs:
    """Runs on a model without useless blocks, with a store of their own."""
    return runs_on(plain, tmp_path)


@pytest.mark.parametrize("selector", [s for s in SCORED if s is not Selector.LLM_DROP])
def test_planted_useless_blocks_are_found(selector: Selector, planted: Path, tmp_path: Path) -> None:
    runs = runs_on(planted, tmp_path)
    calibration = stored_tokens(runs.session({}).store, own_text(planted))
    for n in (1, 2):
        made = shot_of(session_of(runs, selector=selector, blocks=n, **ALL), calibration).run()
        assert set(made.state.removed) <= set(USELESS)
        assert len(made.state.removed) == n
    assert made.state.updates == ()
    assert made.record["sparsity"] == pytest.approx(2 / N_BLOCKS)
    assert made.record["n_removed"] == 2
    assert made.record["layerchop"]["selector"] == selector.value
    assert sorted(made.record["layerchop"]["order"]) == list(USELESS)


def test_useless_sub_layers_are_found(tmp_path: Path) -> None:
    model = planted_model(tmp_path / "model", (4,), attention_only=(1,))
    runs = runs_on(model, tmp_path / "runs")
    made, _ = chop(runs, selector="llm-drop", blocks=2)
    assert made is not None
    assert made.record["layerchop"]["dropped"] == [[1, "attention"], [4, "attention"]]
    assert made.state.removed == ()
    context = runs.session({}).context
    for block in range(N_BLOCKS):
        for name, linear in read_linears(context, made.state, block).items():
            gone = block in (1, 4) and "self_attn" in name
            assert bool(linear.live_rows.any()) == bool(linear.live_columns.any()) == (not gone)
            assert bool(linear.weight.any()) == (not gone)
    windows = read_arrays(context, runs.session({}).windows.key)["tokens"]
    silent = [f"model.layers.{block}.self_attn.o_proj" for block in (1, 4)]
    assert made.evaluation.attributes["loss"] == pytest.approx(stock_loss(model, windows, silent=silent), rel=1e-5)


def test_attentions_then_mlps_and_a_block_without_both_is_gone(runs: Runs) -> None:
    made, _ = chop(runs, selector="llm-drop", blocks=N_BLOCKS + 2)
    assert made is not None
    scores = made.record["layerchop"]["scores"]["mlp"]
    whole = sorted(np.argsort(scores)[:2].tolist())
    assert list(made.state.removed) == whole
    assert made.record["layerchop"]["dropped"] == [[b, "attention"] for b in range(N_BLOCKS) if b not in whole]
    assert [made.state.update_of(b) is None for b in range(N_BLOCKS)] == [b in whole for b in range(N_BLOCKS)]
    attention, mlp = (sum(s.n_weights for s in shapes) for shapes in _halves(runs))
    expected = (N_BLOCKS * attention + 2 * mlp) / (N_BLOCKS * (attention + mlp))
    assert made.record["sparsity"] == pytest.approx(expected)


def _halves(runs: Runs) -> tuple[list[Any], list[Any]]:
    block = runs.session({}).model.blocks[0]
    return [s for s in block if "self_attn" in s.name], [s for s in block if "mlp" in s.name]


@pytest.mark.parametrize(
    ("selector", "target"),
    [*((s, 0.3) for s in Selector), *((s, t) for s in ("max-gap", "angular", "llm-drop") for t in (0.05, 0.5))],
)
def test_at_least_the_target_and_no_block_more(selector: str, target: float, shared: Runs) -> None:
    made, _ = chop(shared, target, selector=selector, protect_first=None if selector in _FROM_THE_END else 0)
    assert made is not None
    sparsity = made.record["sparsity"]
    assert sparsity >= target
    assert sparsity < target + 1 / N_BLOCKS
    windows = read_arrays(shared.session({}).context, shared.session({}).windows.key)["tokens"]
    if made.state.updates == ():
        expected = stock_loss(Path(shared.params["model"]["source"]), windows, made.state.removed)
        assert made.evaluation.attributes["loss"] == pytest.approx(expected, rel=1e-5)


_FROM_THE_END = (Selector.OUTPUT, Selector.DEEPEST)


def test_greedy_removal_is_greedy(plain: Path, runs: Runs) -> None:
    made, _ = chop(runs, selector="sleb", blocks=3)
    assert made is not None
    tokens = read_arrays(runs.session({}).context, runs.session({}).calibration().key)["tokens"]
    gone: list[int] = []
    for _ in range(3):
        losses = {b: stock_loss(plain, tokens, [*gone, b]) for b in range(1, N_BLOCKS - 1) if b not in gone}
        gone.append(min(losses, key=lambda block: losses[block]))
        found = made.record["layerchop"]["scores"]["block"][gone[-1]]
        assert found == pytest.approx(losses[gone[-1]], rel=1e-5)
    assert made.record["layerchop"]["order"] == gone
    single, _ = chop(runs, selector="perplexity", blocks=3, protect_first=1, protect_last=1)
    assert single is not None
    alone = {b: stock_loss(plain, tokens, [b]) for b in range(1, N_BLOCKS - 1)}
    assert single.record["layerchop"]["order"] == sorted(alone, key=lambda block: alone[block])[:3]


def test_costs_by_curvature_are_the_dense_answer(plain: Path, runs: Runs) -> None:
    """Against explicit Kronecker products of factors taken from the stock model."""
    from tests.surgeon.passes.stock import stock_curvature, stock_tokens

    tokens = read_arrays(runs.session({}).context, runs.session({}).calibration().key)["tokens"]
    factors = stock_curvature(plain, tokens, "model.layers")
    gradients = stock_tokens(plain, tokens, "model.layers")[2]
    made, _ = chop(runs, selector="curvature", blocks=1)
    assert made is not None
    context = runs.session({}).context
    for block in range(N_BLOCKS):
        expected = 0.0
        for name, linear in read_linears(context, runs.session({}).dense, block).items():
            full = f"model.layers.{block}.{name}"
            w = linear.weight.double().reshape(-1)
            expected += 0.5 * float(w @ torch.kron(factors.gradients[full], factors.activations[full]) @ w)
            expected -= float((gradients[full][0] / tokens.size).reshape(-1) @ w)
        assert made.record["layerchop"]["scores"]["block"][block] == pytest.approx(expected, rel=1e-4)


def test_selectors_and_amounts_share_what_is_measured(runs: Runs) -> None:
    assert _kinds(chop(runs, selector="block-influence", blocks=1)[1]) == ["similarity", "selection"]
    assert _kinds(chop(runs, selector="block-influence", blocks=2)[1]) == ["selection"]
    assert _kinds(chop(runs, selector="angular", blocks=2)[1]) == ["selection"]
    assert _kinds(chop(runs, selector="perplexity", blocks=2)[1]) == ["removal-losses", "selection"]
    assert _kinds(chop(runs, selector="sleb", blocks=2)[1]) == ["removal-losses", "selection"]
    assert _kinds(chop(runs, selector="sleb", blocks=3)[1]) == ["removal-losses", "selection"]
    assert _kinds(chop(runs, selector="curvature", blocks=1)[1]) == ["curvature", *["block-cost"] * 6, "selection"]
    assert _kinds(chop(runs, selector="taylor", blocks=1, **ALL)[1]) == [*["block-cost"] * 6, "selection"]
    assert _kinds(chop(runs, selector="sleb", blocks=3)[1]) == []


def _kinds(ran: list[str]) -> list[str]:
    """Kinds of tasks without what every run needs anyway."""
    others = ("sequences", "windows", "evaluation", "spectra")
    return [kind for name in ran if (kind := name.rpartition("/")[2]) not in others]


@pytest.mark.parametrize(
    ("selector", "groups"),
    [
        ("sleb", 2),
        ("llm-drop", N_BLOCKS),
        ("angular", 2),
        ("max-gap", N_BLOCKS),
        *(pytest.param(selector, 2, marks=pytest.mark.slow) for selector in ("curvature", "taylor")),
    ],
)
def test_what_is_planned_is_what_runs_however_often_it_is_stopped(
    selector: str, groups: int, plain: Path, tmp_path: Path
) -> None:
    runs = runs_on(plain, tmp_path, blocks_per_group=groups)
    settings = {"selector": selector, "blocks": 3, **(ALL if selector == "taylor" else {})}
    left = planned(runs, **settings)
    everything = list(left)
    while left:
        made, ran = chop(runs, stop_after=3, **settings)
        assert ran == left[: len(ran)]
        assert ran, "a run that is not finished goes on"
        left = planned(runs, **settings)
    undisturbed = runs_on(plain, tmp_path / "other", blocks_per_group=N_BLOCKS)
    other, ran = chop(undisturbed, **settings)
    made, again = chop(runs, **settings)
    assert again == []
    assert made is not None and other is not None
    assert made.state.digest == other.state.digest
    assert made.stored.attributes["layerchop"] == other.stored.attributes["layerchop"]
    assert set(made.references) == set(other.references)
    if selector not in ("curvature", "taylor"):  # whose passes go by groups
        assert ran == everything


def test_a_plan_does_not_take_what_another_selector_removed_for_its_own(runs: Runs) -> None:
    made, _ = chop(runs, selector="input", blocks=2)
    assert made is not None
    assert planned(runs, selector="sleb", blocks=2)[-2:] == ["shot-01/selection", "shot-01/evaluation"]
    assert planned(runs, selector="both", blocks=2) == ["shot-01/selection", "shot-01/evaluation"]
    chop(runs, selector="output", blocks=2)
    assert planned(runs, selector="deepest", blocks=2) == ["shot-01/selection"], "the same blocks"


@pytest.mark.parametrize("selector", ["sleb", "llm-drop", "angular", "curvature", "magnitude"])
def test_a_plan_knows_work_memory_and_disk(selector: str, runs: Runs) -> None:
    settings: dict[str, Any] = {"selector": selector, "blocks": 3, **(ALL if selector == "magnitude" else {})}
    session = session_of(runs, **settings)
    dry = dry_run(session, whole=False)[0]
    model = WorkModel(session)
    assert all(model.of(step).amounts for step in dry.steps)
    needs = memory_needs(session, dry.steps)
    assert needs.by_stage.keys() == {step.row for step in dry.steps}
    measured = {"sleb": "removal-losses", "llm-drop": "sub-layer-similarity", "angular": "similarity"}
    assert needs.by_stage[f"prune: {measured.get(selector, 'block-cost')}"] > needs.idle
    made, _ = chop(runs, **settings)
    assert made is not None
    taken = sum(path.stat().st_blocks * 512 for path in (runs.root / "data" / "store" / "objects").rglob("*"))
    # Sequences and windows are counted with as many arrays as a block has linears.
    assert 0.7 * taken < disk_needs(model, dry)[0].n_bytes < 1.3 * taken + 300_000


def test_losses_are_more_work_with_more_blocks(runs: Runs) -> None:
    session = session_of(runs, selector="sleb", blocks=3)
    steps = {step.name: step for step in dry_run(session, whole=False)[0].steps}
    works = [WorkModel(session).of(steps[f"shot-01/step-0{k}/removal-losses"]).flops for k in (1, 2, 3)]
    assert works == sorted(works, reverse=True)
    assert works[0] > works[2] > 0


def test_greedy_removal_goes_on_at_the_next_step(runs: Runs) -> None:
    stopped, ran = chop(runs, stop_after=5, selector="sleb", blocks=3)
    assert stopped is None
    assert ran[3:] == ["shot-01/step-01/removal-losses", "shot-01/step-02/removal-losses"]
    found = shot_of(session_of(runs, selector="sleb", blocks=3)).found()
    assert found == {"removal-losses": (2, 3), "selection": (0, 1)}
    finished, ran = chop(runs, selector="sleb", blocks=3)
    assert finished is not None
    assert ran == ["shot-01/step-03/removal-losses", "shot-01/selection", "shot-01/evaluation"]


def test_what_is_found_is_counted(runs: Runs) -> None:
    for selector, counts in {
        "max-gap": {"selection": (1, 1)},
        "angular": {"similarity": (1, 1), "selection": (1, 1)},
        "llm-drop": {"sub-layer-similarity": (1, 1), "selection": (1, 1)},
        "magnitude": {"block-cost": (6, 6), "selection": (1, 1)},
        "curvature": {"statistics": (6, 6), "block-cost": (6, 6), "selection": (1, 1)},
    }.items():
        settings: dict[str, Any] = {"selector": selector, "blocks": 1, **(ALL if selector == "magnitude" else {})}
        before = shot_of(session_of(runs, **settings))
        assert before.found() == {kind: (0, total) for kind, (_, total) in counts.items()}
        assert before.finished_state() is None
        made, _ = chop(runs, **settings)
        after = shot_of(session_of(runs, **settings))
        assert after.found() == counts
        assert made is not None
        assert after.finished_state() == made.state


def test_statistics_that_were_dropped_are_not_made_again_for_another_amount(runs: Runs) -> None:
    made, _ = chop(runs, selector="curvature", blocks=1)
    assert made is not None
    session = runs.session({})
    for reference in made.references.values():
        if reference.kind in ("input-factors", "output-factors", "loss-gradient"):
            session.store.evict(reference.key)
    assert _kinds(chop(runs, selector="curvature", blocks=2)[1]) == ["selection"]
    assert "curvature" in _kinds(chop(runs, selector="curvature", blocks=2, gradient=False)[1])


def test_a_removed_block_passes_hidden_states_on(runs: Runs) -> None:
    made, _ = chop(runs, selector="both", blocks=3)
    assert made is not None
    assert made.state.removed == (1, 2, 4)
    model = open_model(runs.session({}).context, made.state)
    hidden = torch.randn(1, 4, 32)
    call = model.embed(torch.zeros(1, 4, dtype=torch.long)).calls[1]
    assert torch.equal(model.run_block(1, hidden, call), hidden)


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({"blocks": 6}, 0.3, r"6 of 6 blocks would go, and nothing is left of the model; remove at most 5"),
        ({}, 0.95, r"6 of 6 blocks would go"),
        (
            {"blocks": 5, "selector": "max-gap"},
            0.3,
            r"5 blocks shall go, but of 6 the first 1 and the last 1 are protected, so 4 may",
        ),
        ({"selector": "taylor", "blocks": 1}, 0.3, r"the first 4 and the last 2 are protected, so 0 may"),
        ({"selector": "llm-drop", "blocks": 13}, 0.3, r"got 13 sub-layers, allowed: 1 to 12"),
        ({"selector": "llm-drop", "blocks": 12}, 0.3, r"attention and MLP of all 6 blocks would go"),
        ({"selector": "llm-drop", "protect_first": 5}, 0.3, r"weights shall go, but the sub-layers that may go have"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    settings: dict[str, Any], target: float, message: str, runs: Runs
) -> None:
    with pytest.raises(ParameterError, match=message):
        session_of(runs, target, **settings)  # which checks


def test_sub_layers_of_an_unknown_family_are_refused(tmp_path: Path) -> None:
    runs = runs_on(make_falcon("falcon", tmp_path / "model"), tmp_path / "runs", blocks_per_group=3)
    with pytest.raises(
        ParameterError, match=r"layerchop.selector: llm-drop takes attention and MLP apart, but what bel"
    ):
        session_of(runs, selector="llm-drop")
    made, _ = chop(runs, selector="block-influence", blocks=1)
    assert made is not None
    assert len(made.state.removed) == 1
