"""What a plan says will run is what runs, task by task and in that order; and nothing is touched by planning."""

from pathlib import Path
from typing import Any

import pytest

from flows.planning import dry_run, outline_run
from flows.prune import prune
from flows.session import Session
from flows.spectra import make_spectra
from flows.stages import dense_evaluation
from flows.work_after import n_windows
from surgeon.choices import Keep
from surgeon.planning import Operation, Rates
from tests.flows.project import slow
from tests.flows.sessions import Recorder, Runs, StoppedError

pytestmark = pytest.mark.usefixtures("in_process")

GROUPED = {"blocks_per_group": 1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows and columns in groups, last kept": ({}, {**GROUPED, "keep": "last"}),
    "shards in groups": ({}, {**GROUPED, "shards": 3, "keep": "last"}),
    "units": ({"structure": "units", "sparsity": 0.2, "multiple": 4}, {"keep": "none"}),
    "weights by ekfac in groups": ({"structure": "weights", "curvature": "ekfac"}, {**GROUPED, "keep": "none"}),
    "several terms, draws, newton": (
        {"curvature": "kronecker-sum", "targets": "sampled", "draws": 2, "correction": "newton"},
        {**GROUPED, "keep": "last"},
    ),
    "adapters and fresh texts": ({"correction": "adapters", "fresh_calibration": True}, {}),
    "no statistics": ({"structure": "weights", "method": "magnitude"}, {"keep": "none"}),
    "a speed-up": (
        {"structure": "units", "sparsity": None, "speedup": 1.05, "multiple": 1, "widths": "free"},
        {"keep": "last"},
    ),
    "no mask": ({"structure": "2:4", "method": "sparsegpt"}, {**GROUPED, "keep": "last"}),
}


def planned(session: Session) -> list[str]:
    return [step.name for step in dry_run(session, whole=False)[0].steps]


def ran(session: Session) -> list[str]:
    """Runs everything up to the last shot, or until the recorder stops it."""
    assert isinstance(session.engine, Recorder)
    try:
        _ = session.windows
        dense_evaluation(session)
        shots = prune(session)
        make_spectra(session, {name: ref for shot in shots for name, ref in shot.references.items()}, len(shots))
    except StoppedError:
        pass
    return session.engine.ran


def files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (root / "data").rglob("*") if path.is_file()}


@pytest.fixture
def runs(small: dict[str, Any], tmp_path: Path) -> Runs:
    return Runs(small, tmp_path)


def test_workers_share_the_time_of_what_runs_side_by_side(runs: Runs) -> None:
    """Computing, not the mask, nor what the store gives."""
    rates = Rates(dict.fromkeys(set(Operation) - {Operation.SECONDS}, 1e6))
    plans = [outline_run(runs.session({"shots": 1}, shards=2, workers=n, threads=1)).timed(rates) for n in (1, 2)]
    alone, shared = ({stage.name: stage for stage in plan.stages} for plan in plans)
    for row in ("prune: curvature", "prune: costs", "prune: update"):
        assert alone[row].work.amounts == shared[row].work.amounts
        assert 0.5 * alone[row].seconds < shared[row].seconds < 0.95 * alone[row].seconds
    assert shared["prune: mask"].seconds == pytest.approx(alone["prune: mask"].seconds)


@pytest.mark.parametrize("case", [name if number < 4 else slow(name) for number, name in enumerate(CASES)])
def test_what_is_planned_is_what_runs_however_often_it_is_stopped(case: str, runs: Runs) -> None:
    settings, run = CASES[case]
    settings = {"shots": 2, "sparsity": 0.3} | settings
    everything = planned(runs.session(settings, **run))
    left = everything
    while left:
        session = runs.session(settings, stop_after=7, **run)
        before = files(runs.root)
        assert planned(session) == left
        assert files(runs.root) == before
        done = ran(session)
        assert done == left[: len(done)]
        assert done, "a run that is not finished goes on"
        left = planned(runs.session(settings, **run))
    dry = dry_run(runs.session(settings, **run), whole=False)[0]
    found = {name for names in dry.found.values() for name in names}
    assert found >= {name for name in everything if name.rpartition("/")[2] not in ("boundary", "correction")}


@pytest.mark.parametrize("keep", [Keep.LAST, slow(Keep.ALL), slow(Keep.NONE)])
def test_statistics_that_were_dropped_are_planned_again_for_another_damping(keep: Keep, runs: Runs) -> None:
    run = {**GROUPED, "keep": keep.value}
    settings = {"shots": 2, "sparsity": 0.3, "structure": "weights"}
    ran(runs.session(settings, **run))
    session = runs.session({**settings, "damping": 0.3}, **run)
    names = planned(session)
    assert ("shot-01/block-00/curvature" in names) == (keep is not Keep.ALL)
    assert ran(session) == names


def test_what_turns_out_as_it_was_is_not_run_although_it_was_planned(runs: Runs) -> None:
    """A mask for a target close by leaves some blocks as they were, which only making it can tell."""
    ran(runs.session({"shots": 1, "sparsity": 0.3}))
    session = runs.session({"shots": 1, "sparsity": 0.3001})
    names = planned(session)
    assert set(ran(session)) <= set(names)
    assert {"shot-01/mask", "shot-01/block-00/update"} <= set(names)


def test_estimates_grow_with_every_cause(runs: Runs) -> None:
    def needs(params: dict[str, Any] | None = None, **settings: Any) -> tuple[float, float, int]:
        outline = outline_run(Runs(runs.params | (params or {}), runs.root).session({"shots": 2, **settings}))
        return (
            sum(work.flops for _, work in outline.steps),
            outline.needs.memory.own,
            outline.needs.disk[0].n_bytes,
        )

    base = needs()
    calibrate = runs.params["calibrate"]
    more_text = needs({"calibrate": calibrate | {"sequences": 12}})
    assert more_text[0] > base[0]
    larger_batch = needs({"run": runs.params["run"] | {"batch_size": 6}})
    assert larger_batch[1] > base[1]
    more_shots = needs(shots=4)
    assert more_shots[0] > base[0]
    assert more_shots[2] > base[2]
    kept = needs({"run": runs.params["run"] | {"keep": "none"}})
    assert kept[2] < base[2]
    single_weights = needs(structure="weights")
    assert single_weights[2] > base[2]


def test_disk_is_what_the_store_grows_by(runs: Runs) -> None:
    settings = {"shots": 2, "sparsity": 0.4}
    session = runs.session(settings)
    expected = outline_run(session, whole=False).needs.disk[0].n_bytes
    ran(session)
    taken = sum(path.stat().st_blocks * 512 for path in (runs.root / "data" / "store" / "objects").rglob("*"))
    assert expected == pytest.approx(taken, rel=0.25)


def test_windows_of_a_whole_text_are_guessed(runs: Runs) -> None:
    params = runs.params | {"evaluate": runs.params["evaluate"] | {"windows": None}}
    session = Runs(params, runs.root).session({})
    assert n_windows(session) == pytest.approx(session.windows.attributes["n_windows"], rel=0.05)
    assert n_windows(runs.session({})) == 4


def test_planning_runs_no_task_of_the_session(runs: Runs) -> None:
    session = runs.session({"shots": 1})
    ran(session)
    tallies = {stage: (tally.executed, tally.cached) for stage, tally in session.engine.tallies.items()}
    assert [step.name for step in dry_run(session, whole=True)[0].steps] == [
        *("export", "benchmark", "dense/sample", "pruned/sample")
    ]
    assert tallies == {stage: (tally.executed, tally.cached) for stage, tally in session.engine.tallies.items()}
