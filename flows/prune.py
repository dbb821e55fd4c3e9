"""The prune flow: shots one after the other, each on the model that the one before left."""

from flows.checks import check_prunable
from flows.goal import require_goal
from flows.session import Session
from flows.shot import Shot, ShotRun
from surgeon.choices import Keep
from surgeon.curvature.spec import Statistic
from surgeon.pruning.granularity import is_structured
from surgeon.store import Store
from tasks.context import ModelState
from tasks.costs import COSTS


def shot_target(fraction: float, number: int, shots: int) -> float:
    """Linear schedule: ``number / shots`` of what is to go.

    Reference: van der Ouderaa et al. 2024 (LLM Surgeon), section 3.4.
    """
    # Rounded, so that a third of 0.3 is 0.1 and shots of different schedules with equal targets are the same work.
    return round(fraction * number / shots, 12)


def require_possible(session: Session) -> None:
    """Refuses to start shots that cannot reach the target, or whose results will not fit on the disk.

    Raises:
        ParameterError: no widths reach the target.
        StoreError: naming path, needed and free space.
    """
    pruning, model = session.params.prune, session.model
    require_goal(session)
    state: ModelState | None = session.dense
    finished = 0
    while state is not None and finished < pruning.shots:
        target = shot_target(session.goal.fraction, finished + 1, pruning.shots)
        state = ShotRun(session, state, session.calibration(finished + 1), finished + 1, target).finished_state()
        finished += state is not None
    missing = pruning.shots - finished
    kept = missing if session.params.run.keep is Keep.ALL else min(missing, 2)
    large = model.statistic_bytes(session.recipe.curvature, session.measured_linears)
    if not is_structured(session.recipe.granularity):
        large += model.update_bytes  # costs of all weights
    Store(session.context.store).free_space_check(kept * large + (missing + 1) * model.update_bytes)


def prune(session: Session) -> list[Shot]:
    """Runs all shots; returns them in order."""
    check_prunable(session)
    pruning = session.params.prune
    state = session.dense
    shots = []
    for number in range(1, pruning.shots + 1):
        calibration = session.calibration(number)
        target = shot_target(session.goal.fraction, number, pruning.shots)
        shot = ShotRun(session, state, calibration, number, target).run()
        shots.append(shot)
        _evict(session, shots)
        state = shot.state
    return shots


def _evict(session: Session, shots: list[Shot]) -> None:
    """Drops statistics, costs of weights and boundaries of finished shots by policy.

    References stay, so keys above them still hit. Costs of rows and columns are small and stay too.
    """
    policy = session.params.run.keep
    if policy is Keep.ALL:
        return
    store = Store(session.context.store)
    kinds = set(Statistic) if is_structured(session.recipe.granularity) else {*Statistic, COSTS.kind}
    dropped = shots[:-1] if policy is Keep.LAST else shots
    for shot in dropped[1:] if session.keeps_first_shot else dropped:
        large = [ref for ref in shot.references.values() if ref.kind in kinds]
        for reference in (*large, *shot.passed_on):
            if store.has_payload(reference.key):
                store.evict(reference.key)
