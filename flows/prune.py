"""The prune flow: shots one after the other, each on the model that the one before left."""

from flows.bonsai import BonsaiShot
from flows.checks import check_prunable
from flows.curvature_shot import CurvatureShot
from flows.layerchop import LayerChopShot
from flows.schedule import shot_target
from flows.session import Session
from flows.shot import PruningShot, Shot
from surgeon.choices import Keep, Method
from surgeon.curvature.spec import Statistic
from surgeon.pruning.granularity import is_structured
from surgeon.store import Reference
from tasks.context import ModelState
from tasks.costs import COSTS


def prune(session: Session) -> list[Shot]:
    """Runs all shots; returns them in order."""
    check_prunable(session)
    state = session.dense
    shots = []
    for number in range(1, session.n_shots + 1):
        calibration = session.calibration(number)
        target = shot_target(session.goal.fraction, number, session.n_shots)
        shot = shot_of(session, state, calibration, number, target).run()
        shots.append(shot)
        _evict(session, shots)
        state = shot.state
    return shots


def shot_of(session: Session, state: ModelState, calibration: Reference, number: int, target: float) -> PruningShot:
    """A shot by the method of the parameters."""
    shots = {Method.LAYERCHOP: LayerChopShot, Method.BONSAI: BonsaiShot}
    return shots.get(session.recipe.method, CurvatureShot)(session, state, calibration, number, target)


def _evict(session: Session, shots: list[Shot]) -> None:
    """Drops statistics, costs of weights and boundaries of finished shots by policy.

    References stay, so keys above them still hit. Costs of rows and columns are small and stay too.
    """
    policy = session.params.run.keep
    if policy is Keep.ALL:
        return
    store = session.store
    kinds = set(Statistic) if is_structured(session.recipe.granularity) else {*Statistic, COSTS.kind}
    dropped = shots[:-1] if policy is Keep.LAST else shots
    for shot in dropped[1:] if session.keeps_first_shot else dropped:
        large = [ref for ref in shot.references.values() if ref.kind in kinds]
        for reference in (*large, *shot.passed_on):
            if store.has_payload(reference.key):
                store.evict(reference.key)
