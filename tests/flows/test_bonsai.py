"""Bonsai as shots: what goes, what is computed, and that a run goes on at the next sub-model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.needs import memory_needs
from flows.params import Params
from flows.params_bonsai import BonsaiParams
from flows.work import WorkModel
from surgeon.errors import MemoryShortageError, ParameterError
from surgeon.pruning.units import SubLayerKind
from tasks import bonsai, bonsai_round
from tasks.bonsai_round import live_parts
from tasks.stage import read_arrays
from tests.flows.bonsai import FREE, bonsai_runs, planned, pruned, rounds, session_of
from tests.flows.sessions import Runs

pytestmark = pytest.mark.usefixtures("in_process")
N_SUB_MODELS = 10


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return bonsai_runs(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that share a store."""
    return bonsai_runs(tmp_path_factory.mktemp("shared"))


def kinds(ran: list[str]) -> list[str]:
    """Kinds of tasks of rounds, each run of equal ones once."""
    found = [name.rpartition("/")[2].partition("-0")[0] for name in ran if name.startswith("shot-")]
    return [kind for i, kind in enumerate(found) if i == 0 or found[i - 1] != kind]


ROUND = ["prior", "sub-model", "ranking", "mask", "update", "evaluation"]


@pytest.mark.parametrize("prune", [{}, FREE, {"heads": True}, FREE | {"allocation": "per-layer"}], ids=str)
def test_rounds_reach_their_targets(prune: dict[str, Any], shared: Runs) -> None:
    shots, ran = pruned(shared, prune=prune)
    assert shots is not None
    by_round = [kinds([name for name in ran if name.startswith(f"shot-0{k}")]) for k in (1, 2)]
    assert by_round[0] in (ROUND, ROUND[1:]) and by_round[1] == ROUND  # the prior of the dense model is shared
    context = session_of(shared).context
    step = 0.16 if "allocation" in prune else 0.11  # per layer, each attention loses one of its two groups at once
    for shot, target in zip(shots, (0.15, 0.3), strict=True):
        assert target <= shot.record["sparsity"] < target + step
        assert shot.evaluation.attributes["linear_nonzero"] == round(23040 * (1 - shot.record["sparsity"]))
        kept = [part.units.size for part in live_parts(context, shot.state) if part.sub.kind is SubLayerKind.MLP]
        assert kept == [k for k in shot.record["kept"]["mlp"] if k]
        if prune.get("widths") != "free":
            assert len(set(kept)) == 1 and kept[0] % 8 == 0
    if prune == FREE:  # to the unit: the largest is a key/value group of a thirtieth of the weights
        assert shots[1].record["sparsity"] < 0.3 + 1536 / 23040


def test_what_lives_shrinks_round_by_round(shared: Runs) -> None:
    shots, _ = pruned(shared, prune=FREE)
    assert shots is not None
    context = session_of(shared).context
    first, second = (
        {(p.block, p.sub.kind): set(p.units.tolist()) for p in live_parts(context, shot.state)} for shot in shots
    )
    assert first != second
    assert all(second[part] <= first[part] for part in second)


def test_frozen_units_stay_and_candidates_go_in_order(shared: Runs) -> None:
    shots, _ = pruned(shared, prune=FREE, n_rounds=1)
    assert shots is not None
    session = session_of(shared)
    ranking = shots[0].references["shot-01/ranking"]
    arrays, facts = read_arrays(session.context, ranking.key), ranking.attributes
    after = {(p.block, p.sub.kind.value): set(p.units.tolist()) for p in live_parts(session.context, shots[0].state)}
    ends = np.cumsum(facts["n_live"])[:-1]
    split = zip(np.split(arrays["order"], ends), np.split(arrays["costs"], ends), strict=True)
    for part, n_frozen, (order, costs) in zip(facts["parts"], facts["n_frozen"], split, strict=True):
        assert np.isinf(costs).sum() == n_frozen and np.all(np.diff(costs[np.isfinite(costs)]) >= 0)
        left = after.get(tuple(part), set())
        assert len(left) >= n_frozen
        assert left == set(order[order.size - len(left) :].tolist())


def test_what_is_planned_is_what_runs(runs: Runs) -> None:
    dry = planned(runs)
    shots, ran = pruned(runs)
    assert shots is not None
    assert [step.name for step in dry.steps] == ran
    assert planned(runs).steps == []
    assert pruned(runs)[1] == []
    session = session_of(runs)
    rows = memory_needs(session, dry.steps).by_stage
    assert rows["prune: sub-model"] == rows["prune: prior"] > 0
    works = {step.name: WorkModel(session).of(step) for step in dry.steps}
    first, later = (works[f"shot-0{k}/sub-model-0003"] for k in (1, 2))
    assert first != later, "later rounds run a smaller model"


@pytest.mark.parametrize("stop_after", [3, 9, 16])
def test_a_run_that_was_stopped_runs_missing_sub_models_only(stop_after: int, runs: Runs, tmp_path: Path) -> None:
    stopped, first = pruned(runs, stop_after)
    assert stopped is None and len(first) == stop_after
    finished, second = pruned(runs)
    undisturbed, everything = pruned(bonsai_runs(tmp_path / "other"))
    assert finished is not None and undisturbed is not None
    assert first + second == everything
    assert [shot.state.digest for shot in finished] == [shot.state.digest for shot in undisturbed]


def test_what_is_found_is_counted(runs: Runs) -> None:
    from flows.bonsai import BonsaiShot

    def found() -> dict[str, tuple[int, int]]:
        session = session_of(runs)
        settings = BonsaiParams(sub_models=N_SUB_MODELS)
        return BonsaiShot(session, session.dense, session.calibration(), 1, 0.15, settings).found()

    nothing = {"prior": (0, 1), "sub-model": (0, 10), "ranking": (0, 1), "mask": (0, 1), "update": (0, 3)}
    assert found() == nothing
    pruned(runs, 5)
    assert found() == nothing | {"prior": (1, 1), "sub-model": (4, 10)}
    pruned(runs)
    assert found() == {kind: (total, total) for kind, (_, total) in nothing.items()}


def test_settings_share_what_they_have_in_common(runs: Runs) -> None:
    assert kinds(pruned(runs, n_rounds=1)[1]) == ROUND
    ranked = ["ranking", "mask", "update", "evaluation"]
    for settings in ({"solver": "adam"}, {"scope": "per-layer"}, {"utility": "negative-perplexity"}):
        again = kinds(pruned(runs, n_rounds=1, **settings)[1])
        assert again[0] == "ranking" and set(again) <= set(ranked)
    more = pruned(runs, n_rounds=1, sub_models=12)[1]
    assert [name for name in more if "sub-model" in name] == ["shot-01/sub-model-0010", "shot-01/sub-model-0011"]
    assert "sub-model" in kinds(pruned(runs, n_rounds=1, prior="fluctuation")[1])
    assert "prior" not in kinds(pruned(runs, n_rounds=1, sub_models=0)[1])
    assert "sub-model" in kinds(pruned(runs, n_rounds=1, sequences=3)[1])


def test_the_model_is_opened_once_a_round_and_closed_after_it(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    open_ = bonsai_round._open
    monkeypatch.setattr(bonsai_round, "_open", lambda *args: opened.append(1) or open_(*args))
    pruned(runs)
    assert len(opened) == 2
    assert bonsai_round._Resident.opened is None


def test_a_round_runs_on_the_smaller_model(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    loss = bonsai.sub_model_loss

    def look(model: torch.nn.Module, *args: Any) -> float:
        sizes.append(sum(p.numel() for p in model.parameters()))
        assert not torch.is_inference_mode_enabled()
        return loss(model, *args)

    monkeypatch.setattr(bonsai, "sub_model_loss", look)
    shots, _ = pruned(runs)
    assert shots is not None
    dense, smaller = sizes[0], sizes[-1]
    assert dense - smaller == round(23040 * shots[0].record["sparsity"])


def test_memory_that_is_not_there_says_what_to_lower(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = bonsai.sub_model_loss, []

    def fail(*args: Any) -> float:
        calls.append(1)
        if len(calls) > N_SUB_MODELS + 4:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return loss(*args)

    monkeypatch.setattr(bonsai, "sub_model_loss", fail)
    with pytest.raises(MemoryShortageError, match=r"shot-02: .*allocate memory.*Lower run.batch_size.*are kept"):
        pruned(runs)
    assert bonsai_round._Resident.opened is None
    monkeypatch.undo()
    _, ran = pruned(runs)
    assert ran[0] == "shot-02/sub-model-0004"


def test_a_round_with_nothing_to_remove_changes_nothing(runs: Runs) -> None:
    """With widths in steps the round before may have done it all."""
    shots, _ = pruned(runs, prune={"multiple": 24, "sparsity": 0.28})
    assert shots is not None
    assert shots[0].record["sparsity"] > 0.28
    assert shots[1].state.digest == shots[0].state.digest or shots[1].record["n_removed"] == 0
    assert shots[1].evaluation.attributes["loss"] == shots[0].evaluation.attributes["loss"]


def test_the_prior_alone(runs: Runs) -> None:
    """Without sub-models the units with the lowest prior go, in each sub-layer."""
    shots, ran = pruned(runs, prune=FREE | {"allocation": "per-layer"}, sub_models=0, n_rounds=1)
    assert shots is not None
    assert kinds(ran) == ["prior", "ranking", "mask", "update", "evaluation"]
    context = session_of(runs).context
    scores = read_arrays(context, shots[0].references["shot-01/prior"].key)["scores"]
    start = 0
    before = live_parts(context, session_of(runs).dense)
    after = {(p.block, p.sub.kind): p.units.tolist() for p in live_parts(context, shots[0].state)}
    for part in before:
        own = scores[start : start + part.units.size]
        start += part.units.size
        left = after.get((part.block, part.sub.kind), [])
        assert set(left) == set(np.argsort(own)[part.units.size - len(left) :].tolist())


@pytest.mark.parametrize(
    ("settings", "prune", "message"),
    [
        ({"sub_models": 0}, FREE, r"sub_models: 0 leaves the prior alone.*allocation: per-layer, widths: uniform"),
        ({"sub_models": 0}, {"heads": True}, r"between neurons and key/value groups; use heads: false"),
        ({"sequences": 7}, {}, r"sequences: got 7, but calibrate.sequences is 6"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    settings: dict[str, Any], prune: dict[str, Any], message: str, shared: Runs
) -> None:
    with pytest.raises(ParameterError, match=message):
        rounds(session_of(shared, **prune), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sub_models": 8}, r"bonsai.sub_models: got 8; .*at least 10 of them \(5 pairs\)"),
        ({"sub_models": 33}, r"bonsai.sub_models: got 33; .*even number from 10"),
        ({"sub_models": 0, "solver": "ridge"}, r"bonsai.solver has no effect with sub_models: 0"),
        ({"penalty": "l2"}, r"bonsai.penalty has no effect with solver: ridge"),
        ({"penalty": "l2", "solver": "ridge"}, r"bonsai.penalty has no effect with solver: ridge"),
        ({"sequences": 0}, r"greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BonsaiParams.model_validate(settings)


def test_defaults() -> None:
    settings = BonsaiParams().settings(seed=3)
    assert (settings.sub_models, settings.prior, settings.utility) == (64, "wanda", "negative-loss")
    assert (settings.solver, settings.scope, settings.penalty, settings.seed) == ("ridge", "global", "l1", 3)
    assert Params.model_validate({"prune": {"method": "bonsai", "sparsity": 0.21}}).prune.n_shots(0.21) == 5
