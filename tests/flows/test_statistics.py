"""Statistics by block: shared between kinds of curvature, the same for every grouping, made again when dropped."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.engine import InlineEngine
from flows.params import Params
from flows.session import Session
from flows.statistics import BlockStatistics
from flows.workspace import Workspace
from surgeon.choices import Curvature, Targets
from surgeon.curvature.spec import CurvatureSpec, Statistic
from surgeon.store import Store
from tasks.curvature import read_statistics

KFAC = CurvatureSpec(Curvature.KFAC)
EKFAC = CurvatureSpec(Curvature.EKFAC)
ACTIVATIONS = CurvatureSpec(Curvature.ACTIVATIONS)
NEAREST = CurvatureSpec(Curvature.NEAREST_KRONECKER, iterations=2)
SUM = CurvatureSpec(Curvature.KRONECKER_SUM, rank=2, iterations=2)
SAMPLED = CurvatureSpec(Curvature.KFAC, Targets.SAMPLED, draws=2, seed=5)
DIAGONAL = CurvatureSpec(Curvature.DIAGONAL)
GROUPINGS = (1, 2, 3)


class Names(InlineEngine):
    """Notes the tasks that were executed, found, and counted as reused."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []
        self.reused: list[str] = []

    def task(self, body: Any, *args: Any, name: str) -> Any:
        executed = self.tally.executed
        value = super().task(body, *args, name=name)
        assert self.tally.executed == executed + 1, f"{name} was asked for although it was there"
        self.ran.append(name)
        return value

    def reuse(self, names: list[str]) -> None:
        super().reuse(names)
        self.reused += names


class Case:
    """A store with calibration sequences, and statistics on it with some number of blocks at a time."""

    def __init__(self, params: dict[str, Any], root: Path) -> None:
        self.params, self.root = params, root
        self.store = Store(root / "data" / "store")
        self.engine = Names()

    def statistics(
        self, spec: CurvatureSpec, blocks_per_group: int = 3, loss_gradient: bool = False, batch_size: int = 3
    ) -> BlockStatistics:
        run = {"engine": "inline", "batch_size": batch_size, "blocks_per_group": blocks_per_group}
        sections = self.params | {"prune": {"structure": "rows-and-columns"}, "run": run}
        session = Session(Params.model_validate(sections), Workspace(self.root), InlineEngine())
        session.check()
        calibration = session.calibration()
        session.engine = self.engine = Names()
        return BlockStatistics(session, session.dense, calibration, "shot-01", spec, loss_gradient)

    def ran(self) -> list[str]:
        return [name.removeprefix("shot-01/") for name in self.engine.ran]


@pytest.fixture
def case(params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    for name in ("SURGEON_STORE", "SURGEON_MODELS"):
        monkeypatch.delenv(name, raising=False)
    assert "run" in params
    return Case({k: params[k] for k in ("model", "calibrate", "evaluate")}, tmp_path)


def digests(statistics: BlockStatistics) -> dict[str, str]:
    return {name: ref.digest for block in range(3) for name, ref in statistics.references(block).items()}


@pytest.mark.parametrize(
    ("spec", "loss_gradient"), [(EKFAC, True), (SUM, False), (SAMPLED, True), (ACTIVATIONS, False), (DIAGONAL, False)]
)
def test_grouping_changes_no_digest(spec: CurvatureSpec, loss_gradient: bool, case: Case, tmp_path: Path) -> None:
    found = {}
    for blocks_per_group in GROUPINGS:
        shutil.rmtree(tmp_path / "data" / "store", ignore_errors=True)
        statistics = case.statistics(spec, blocks_per_group, loss_gradient)
        assert statistics.lookup(1) is None
        statistics.ensure({0, 1, 2}, first=True)
        looked_up = [statistics.lookup(block) for block in range(3)]
        assert [tuple(each or ()) for each in looked_up] == [statistics.wanted] * 3
        found[blocks_per_group] = digests(statistics)
        assert (statistics.passed_on() == []) == (blocks_per_group == 3)
        assert set(statistics.task_names()) <= set(case.engine.ran)
        extra = set(case.engine.ran) - set(statistics.task_names())
        assert all(name.endswith("/boundary") for name in extra)
        assert case.engine.reused == []
    assert found[1] == found[2] == found[3]
    assert found[1].keys() >= {f"shot-01/block-02/{s}" for s in statistics.wanted}


def test_a_finished_kind_runs_nothing_and_counts_what_it_reuses(case: Case) -> None:
    case.statistics(EKFAC, 2).ensure({0, 1, 2})
    again = case.statistics(EKFAC, 2)
    again.ensure({0, 1, 2}, first=True)
    assert case.ran() == []
    assert sorted(case.engine.reused) == sorted(again.task_names())
    assert sorted(again.task_names()) == [
        f"shot-01/block-{block}/{kind}" for block in ("00", "02") for kind in ("curvature", "moments")
    ]


def test_methods_share_what_they_have_in_common(case: Case) -> None:
    case.statistics(KFAC).ensure({0, 1, 2})
    assert case.ran() == ["block-00/curvature"]
    for spec in (ACTIVATIONS, KFAC):
        case.statistics(spec).ensure({0, 1, 2})
        assert case.ran() == []
    case.statistics(EKFAC).ensure({0, 1, 2})
    assert case.ran() == ["block-00/moments"]
    case.statistics(NEAREST).ensure({0, 1, 2})
    assert case.ran() == ["block-00/kronecker-terms"]
    case.statistics(SAMPLED).ensure({0, 1, 2})
    kinds = [reference.kind for reference in case.store.entries()]
    assert kinds.count("input-factors") == 3, "those do not depend on targets"
    assert kinds.count("output-factors") == 6
    case.statistics(SAMPLED).ensure({0, 1, 2})
    assert case.ran() == []
    case.statistics(CurvatureSpec(Curvature.KFAC, Targets.SAMPLED, draws=2, seed=6)).ensure({0, 1, 2})
    assert case.ran() == ["block-00/curvature"]


def test_activations_first_then_kfac(case: Case) -> None:
    first = case.statistics(ACTIVATIONS, 1)
    first.ensure({0, 1, 2})
    assert "gradient" not in {reference.kind for reference in case.store.entries()}
    assert sorted(case.ran()) == sorted(
        [f"block-0{b}/curvature" for b in range(3)] + [f"block-0{b}/boundary" for b in (1, 2)]
    )
    inputs = digests(first)
    second = case.statistics(KFAC, 1)
    second.ensure({0, 1, 2})
    assert case.ran() == [f"block-0{b}/curvature" for b in (2, 1, 0)]
    assert digests(second).items() > inputs.items()
    shutil.rmtree(case.store.root)
    alone = case.statistics(KFAC, 1)
    alone.ensure({0, 1, 2})
    assert digests(alone) == digests(second), "A of a forward-only pass has the bits of the full pass"


def test_without_statistics_everything_is_there(case: Case) -> None:
    statistics = case.statistics(CurvatureSpec(Curvature.IDENTITY))
    statistics.ensure({0, 1, 2}, first=True)
    assert (case.ran(), case.engine.reused) == ([], [])
    assert (statistics.wanted, statistics.task_names(), statistics.passed_on()) == ((), [], [])
    assert (statistics.lookup(0), statistics.references(0)) == ({}, {})


@pytest.mark.parametrize("spec", [KFAC, EKFAC, NEAREST, SAMPLED], ids=lambda spec: f"{spec.kind}-{spec.targets}")
def test_what_was_dropped_comes_back_for_the_blocks_asked_for(spec: CurvatureSpec, case: Case) -> None:
    statistics = case.statistics(spec, 1)
    statistics.ensure({0, 1, 2})
    before = digests(statistics)
    for reference in case.store.entries():
        if reference.kind != "sequences":
            case.store.evict(reference.key)
    again = case.statistics(spec, 1)
    assert [tuple(again.lookup(block) or ()) for block in range(3)] == [again.wanted] * 3, "they are known"
    again.ensure({1})
    there = {reference.label for reference in case.store.entries() if case.store.has_payload(reference.key)}
    assert there >= {f"shot-01/block-01/{statistic}" for statistic in again.wanted}
    others = {f"shot-01/block-{block}/{statistic}" for block in ("00", "02") for statistic in Statistic}
    assert there.isdisjoint(others)
    assert digests(again) == before
    case.statistics(spec, 1).ensure({1})
    assert case.ran() == []


def test_only_what_is_missing_of_a_group_is_made(case: Case) -> None:
    statistics = case.statistics(KFAC)
    statistics.ensure({0, 1, 2})
    times = {path: path.stat().st_mtime_ns for path in case.store.root.rglob("record.json")}
    (dropped,) = [r for r in case.store.entries() if r.label == "shot-01/block-01/output-factors"]
    case.store.evict(dropped.key)
    case.statistics(KFAC).ensure({0, 1, 2})
    assert case.ran() == ["block-00/curvature"]
    changed = {path.parent.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed <= {dropped.key}
    assert case.store.has_payload(dropped.key)


def test_terms_need_no_factors_once_they_are_there(case: Case) -> None:
    case.statistics(NEAREST).ensure({0, 1, 2})
    for reference in case.store.entries():
        if reference.kind.endswith("factors"):
            case.store.evict(reference.key)
    case.statistics(NEAREST).ensure({0, 1, 2})
    assert case.ran() == []


def test_the_gradient_of_the_loss_is_that_of_the_text_whatever_the_targets(case: Case) -> None:
    plain = case.statistics(KFAC, 2, loss_gradient=True)
    plain.ensure({0, 1, 2})
    expected = plain.lookup(0)
    sampled = case.statistics(SAMPLED, 2, loss_gradient=True)
    sampled.ensure({0, 1, 2}, first=True)
    found = sampled.lookup(0)
    assert expected is not None
    assert found is not None
    assert found[Statistic.LOSS_GRADIENT] == expected[Statistic.LOSS_GRADIENT]
    assert found[Statistic.OUTPUT_FACTORS] != expected[Statistic.OUTPUT_FACTORS]
    assert case.ran() == ["block-02/curvature", "block-00/curvature"]
    assert sorted(case.engine.reused) == ["shot-01/block-00/loss-gradient", "shot-01/block-02/loss-gradient"]


@pytest.mark.parametrize("spec", [EKFAC, SUM], ids=lambda spec: spec.kind)
def test_keys_hold_the_factors_and_settings_behind_a_statistic(spec: CurvatureSpec, case: Case) -> None:
    keys = set()
    for batch_size in (2, 3):
        statistics = case.statistics(spec, batch_size=batch_size)
        statistics.ensure({0})
        keys |= {ref.key for ref in (statistics.lookup(0) or {}).values()}
    assert len(keys) == 2 * len(statistics.wanted)
    more = CurvatureSpec(Curvature.KRONECKER_SUM, rank=2, iterations=3)
    assert case.statistics(more).lookup(0) is None


def test_reading_back(case: Case) -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    found: dict[str, Any] = {}
    for spec in (EKFAC, SUM, DIAGONAL):
        statistics = case.statistics(spec, loss_gradient=spec.kind is Curvature.DIAGONAL)
        statistics.ensure({1})
        references = statistics.lookup(1)
        assert references is not None
        factors = dict(read_statistics(statistics.context, references, names))
        assert tuple(factors) == names
        for name, each in factors.items():
            found.setdefault(name, {}).update({k: v for k, v in vars(each).items() if v is not None})
    q, k, down = (found[name] for name in names)
    assert len(q) == 7
    assert q["activations"] is k["activations"]
    assert q["moments"].basis_in is k["moments"].basis_in
    for each in (q, k, down):
        n_out, n_in = each["diagonal"].shape
        assert each["activations"].shape == (n_in, n_in)
        assert torch.equal(each["activations"], each["activations"].T)
        assert each["gradients"].shape == (n_out, n_out)
        assert torch.equal(each["gradients"], each["gradients"].T)
        assert each["moments"].moments.shape == (n_out, n_in)
        assert each["terms"].activations.shape == (2, n_in, n_in)
        assert each["terms"].gradients.shape == (2, n_out, n_out)
        assert each["diagonal"].sum() == pytest.approx(float(each["moments"].moments.sum()), rel=1e-4)
        assert each["loss_gradient"].shape == (n_out, n_in)


def test_moments_are_of_what_lives(case: Case, inputs: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][3] = 0.0
    tensors[name][:, 5:7] = 0.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    case.params["model"] = {"source": str(model)}
    statistics = case.statistics(EKFAC)
    statistics.ensure({1})
    references = statistics.lookup(1)
    assert references is not None
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    gate, up, down = (each.moments for _, each in read_statistics(statistics.context, references, names))
    assert gate is not None
    assert up is not None
    assert down is not None
    assert gate.moments.shape == (47, 32), "its gradient through the dead row is always zero"
    assert up.moments.shape == (47, 30)
    assert down.moments.shape == (32, 47), "its input from the dead row is always zero"
    assert gate.basis_in.shape == (32, 32), "not shared: other columns live"
