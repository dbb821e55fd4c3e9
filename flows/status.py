"""What is in the store for some parameters, and what a run would still do."""

from typing import Any

from flows.prune import shot_of
from flows.recovery import segments_found
from flows.schedule import shot_target
from flows.session import Session
from flows.shot import shot_label
from surgeon.choices import Recovery
from surgeon.store import Reference
from tasks.calibration import sequences_request, windows_request
from tasks.context import ModelState
from tasks.evaluation import evaluation_request
from tasks.stage import Request


def status_of(session: Session) -> list[dict[str, Any]]:
    """One line a stage: what was found, and what would run. Nothing of the pipeline is computed.

    What comes after a missing result depends on it, so from there on everything counts as to be run.
    """
    context = session.context
    store = session.store

    def look(stage: str, request: Request | None, action: str) -> Reference | None:
        found = store.lookup(request.key(context)) if request is not None else None
        lines.append(_line(stage, "yes" if found else "no", "" if found else action))
        return found

    lines: list[dict[str, Any]] = []
    calibration = look("calibration sequences", sequences_request(context, session.sequence_spec()), "draw sequences")
    windows = look("evaluation windows", windows_request(context, session.window_spec()), "cut windows")
    look("dense evaluation", evaluation_request(context, session.dense, windows, "") if windows else None, "evaluate")
    state: ModelState | None = session.dense
    pruning = session.params.prune
    for number in range(1, session.n_shots + 1):
        if number > 1 and pruning.fresh_calibration:
            calibration = store.lookup(sequences_request(context, session.sequence_spec(number)).key(context))
        target = shot_target(session.goal.fraction, number, session.n_shots)
        label = f"{shot_label(number)} (to {target:.1%})"
        if state is None or calibration is None:
            lines.append(_line(label, "not known before the shot above", "the whole shot"))
            continue
        shot = shot_of(session, state, calibration, number, target)
        state = shot.finished_state()
        if state is not None:
            lines.append(_line(label, "finished", ""))
            evaluation = evaluation_request(context, state, windows, "") if windows else None
            look(f"{shot_label(number)} evaluation", evaluation, "evaluate")
        else:
            found = shot.found()
            text = ", ".join(f"{kind} {n}/{total}" for kind, (n, total) in found.items())
            missing = [kind for kind, (n, total) in found.items() if n < total]
            lines.append(_line(label, text, ", ".join(missing) or "its record"))
    if session.params.recovery.method is not Recovery.NONE:
        lines.append(_recovery_line(session, state, windows))
    return lines


def _recovery_line(session: Session, state: ModelState | None, windows: Reference | None) -> dict[str, Any]:
    if state is None or windows is None:
        return _line("recovery", "not known before the shot above", "all of it")
    n_found, total = segments_found(session, state, windows)
    return _line("recovery", f"segments {n_found}/{total}", "segments" if n_found < total else "")


def _line(stage: str, found: str, would_run: str) -> dict[str, Any]:
    return {"stage": stage, "found": found, "would_run": would_run}
