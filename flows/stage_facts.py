"""What stages find, as written to `data/stages/*.json` and as read from there."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.card import model_card
from flows.recovery import Recovered
from flows.session import Session
from flows.shot import Shot
from flows.workspace import read_json
from surgeon.errors import InputError
from surgeon.export import is_exported
from surgeon.store import Reference
from tasks.calibration import overlap
from tasks.export import export_record


def calibrate_facts(session: Session) -> dict[str, Any]:
    """Where the texts come from, and what they have in common."""
    calibration, windows = session.calibration(), session.windows
    return {
        "calibration": calibration.attributes,
        "evaluation": windows.attributes,
        "overlap": overlap(session.context, calibration, windows),
    }


def prune_facts(session: Session, shots: Sequence[Shot]) -> dict[str, Any]:
    """What the shots reached, and where the pruned weights are."""
    last = shots[-1]
    return {
        "shots": [_shot_facts(shot) for shot in shots],
        "pruned": {**last.evaluation.attributes, "sparsity": last.record["sparsity"]},
        "parameters": _result_parameters(session),
        "weights_digest": last.state.digest,
        "model_digest": session.checkpoint.digest,
        "state": last.state.to_json(),
    }


def export_wanted(session: Session, found: Mapping[str, Any]) -> tuple[str, str, str]:
    """Dtype, layout and model card of the export, from the facts of the stages before, by their name."""
    settings = session.params.export
    card = model_card(session, found)
    return str(settings.dtype or session.params.model.dtype), str(settings.layout), card


def has_export(session: Session, dense: Reference, shots: Sequence[Shot], recovered: Recovered) -> bool:
    """Whether the export of finished shots and recovery is in the place of the pipeline, as it would be written."""
    found = {
        "evaluate": dict(dense.attributes),
        "prune": prune_facts(session, shots),
        "recovery": recovered.facts,
        "calibrate": calibrate_facts(session),
    }
    return is_exported(session.workspace.export, export_record(recovered.state, *export_wanted(session, found)))


def _shot_facts(shot: Shot) -> dict[str, Any]:
    names = ("threshold", "n_removed", "kept", "predicted_cost", "sparsity", "convergence")
    return {
        "shot": shot.number,
        "target": shot.target,
        **{name: shot.record[name] for name in names},
        "layerchop": shot.record.get("layerchop"),
        "perplexity": shot.evaluation.attributes["perplexity"],
        "loss": shot.evaluation.attributes["loss"],
    }


def _result_parameters(session: Session) -> dict[str, Any]:
    """Parameters that a pruned model is the result of."""
    given = session.params.model_dump(mode="json", include={"seed", "model", "calibrate", "evaluate"})
    return {**given, "prune": session.params.prune.resolved()}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name → value, for all leaves."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def require_same_parameters(session: Session) -> None:
    """Refuses to describe the last pruned model with parameters it was not made with."""
    made, now = _flatten(stage_facts(session, "prune")["parameters"]), _flatten(_result_parameters(session))
    changed = [f"{name} {made.get(name)!r}, now {now[name]!r}" for name in now if made.get(name) != now[name]]
    if changed:
        raise InputError(
            f"the last prune stage ran with other parameters ({'; '.join(changed)}): run `surgeon prune` first, or "
            "give the same -S options"
        )


def stage_facts(session: Session, name: str) -> dict[str, Any]:
    """What a stage found last here.

    Raises:
        InputError: it has not run here.
    """
    found = read_json(session.workspace.stage_file(name))
    if found is None:
        raise InputError(
            f"{session.workspace.stage_file(name)} is missing: the stage {name!r} has not run here yet. "
            f"Run `surgeon {name}` first, or `surgeon run` for everything."
        )
    facts: dict[str, Any] = found["facts"]
    return facts
