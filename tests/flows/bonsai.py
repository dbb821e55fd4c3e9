"""Rounds of Bonsai in this process: what they leave, and what was executed for it."""

from pathlib import Path
from typing import Any

from tiny import make_tiny

from flows.bonsai import BonsaiShot
from flows.dry_run import DryEngine, DryRun
from flows.params_bonsai import BonsaiParams
from flows.schedule import shot_target
from flows.session import Session
from flows.shot import Shot
from surgeon.store import PlannedStore
from tests.flows.layers import runs_on
from tests.flows.sessions import Recorder, Runs, StoppedError

N_ROUNDS = 2
FREE = {"widths": "free", "multiple": 1, "heads": True}
"""The published choice of widths."""


def bonsai_runs(root: Path, family: str = "llama-gqa-tied", **run: Any) -> Runs:
    """Runs on a tiny model with a store of their own."""
    return runs_on(make_tiny(family, root / "model"), root / "project", **({"blocks_per_group": 3} | run))


def rounds(session: Session, n_rounds: int = N_ROUNDS, **settings: Any) -> list[Shot]:
    """Rounds one after the other, as `flows.prune` has them."""
    params = BonsaiParams.model_validate({"sub_models": 10} | settings)
    shots: list[Shot] = []
    for number in range(1, n_rounds + 1):
        state = shots[-1].state if shots else session.dense
        target = shot_target(session.goal.fraction, number, n_rounds)
        shots.append(BonsaiShot(session, state, session.calibration(), number, target, params).run())
    return shots


def session_of(runs: Runs, stop_after: int | None = None, **prune: Any) -> Session:
    given = {"method": "bonsai", "structure": "units", "sparsity": 0.3, "multiple": 8}
    return runs.session(given | prune, stop_after)


def pruned(
    runs: Runs, stop_after: int | None = None, prune: dict[str, Any] | None = None, **settings: Any
) -> tuple[list[Shot] | None, list[str]]:
    """Rounds, and the names of the tasks that were executed for them; no rounds if they were stopped."""
    session = session_of(runs, stop_after, **(prune or {}))
    assert isinstance(session.engine, Recorder)
    try:
        return rounds(session, **settings), session.engine.ran
    except StoppedError:
        return None, session.engine.ran


def planned(runs: Runs, prune: dict[str, Any] | None = None, **settings: Any) -> DryRun:
    """What a run is expected to execute."""
    session = session_of(runs, **(prune or {}))
    dry = DryRun(PlannedStore(session.context.store.open()))
    engine = DryEngine(dry)
    other = session.rehearsal(engine, dry.store)
    engine.stage("prune", lambda: rounds(other, **settings))
    return dry
