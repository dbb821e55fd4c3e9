"""Downstream tasks: the dense model and the exported one side by side, or any one model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.benchmark import exported_now
from flows.session import Session
from flows.stage_facts import require_same_parameters
from flows.workspace import write_json
from surgeon.downstream import Score, ScoringSettings, TaskScores, definition_digest, harness_version, paired_error
from surgeon.errors import TaskError
from surgeon.models import resolve_model
from surgeon.store import Reference
from surgeon.text.suggest import did_you_mean
from tasks.downstream import ScoredModel, WantedScores, scores_task, stored_scores

LABEL = "tasks"


def wanted_scores(
    session: Session, tasks: str, include: Path | None = None, limit: int | None = None, shots: int | None = None
) -> WantedScores:
    """What the command line asks for.

    Args:
        session: gives batch size and seed.
        tasks: names, separated by commas.
        include: directory with definitions of the user's own.
        limit: documents of each task at most.
        shots: worked examples in each prompt.

    Raises:
        TaskError: there is no name, one is there twice, the directory holds no definitions, or lm-eval is missing.
    """
    names = tuple(name for part in tasks.split(",") if (name := part.strip()))
    if not names:
        raise TaskError(f"--tasks: {tasks!r} names no task; give names separated by commas, such as arc_easy,hellaswag")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskError(f"--tasks: {', '.join(twice)} is there twice; give each task once")
    if include is not None and not include.is_dir():
        near = [path.name for path in include.parent.iterdir() if path.is_dir()] if include.parent.is_dir() else []
        raise TaskError(f"--include: {include} is not a directory.{did_you_mean(include.name, near)}")
    definition_digest(include)
    settings = ScoringSettings(limit, shots, session.training_batch, session.params.seed)
    return WantedScores(names, include and include.resolve(), settings)


def score_pair(session: Session, wanted: WantedScores) -> dict[str, Any]:
    """Scores the model of the parameters and the export of the last run, and writes both to `data/metrics/tasks.json`.

    Raises:
        InputError: nothing was exported yet, or with other parameters.
    """
    exported_now(session, "surgeon evaluate MODEL --tasks ...")
    require_same_parameters(session)
    trust = session.params.model.trust_remote_code
    export = resolve_model(
        str(session.workspace.export), session.workspace.models, trust_remote_code=trust, progress=session.say
    )
    session.register()
    models = (ScoredModel("dense", session.checkpoint), ScoredModel("pruned", export))
    found = _score(session, models, wanted)
    write_json(session.workspace.task_scores, found)
    return found


def score_model(session: Session, wanted: WantedScores) -> dict[str, Any]:
    """Scores the model of the parameters alone; nothing is written down but the stored result."""
    return _score(session, (ScoredModel("model", session.checkpoint),), wanted)


def _score(session: Session, models: Sequence[ScoredModel], wanted: WantedScores) -> dict[str, Any]:
    def body() -> dict[str, Any]:
        references = session.engine.task(scores_task, session.context, models, wanted, name=LABEL)
        by_model = [
            references[start : start + len(wanted.tasks)] for start in range(0, len(references), len(wanted.tasks))
        ]
        rows = [
            row
            for found in zip(*by_model, strict=True)
            for row in _rows([model.label for model in models], [stored_scores(session.context, ref) for ref in found])
        ]
        return {**_facts(session, models, wanted, references), "rows": rows}

    return session.stage("evaluate", body)


def _facts(
    session: Session, models: Sequence[ScoredModel], wanted: WantedScores, references: Sequence[Reference]
) -> dict[str, Any]:
    """What was scored, and how."""
    settings = wanted.settings
    return {
        "models": {
            model.label: {"source": m.source, "digest": m.digest} for model in models if (m := model.checkpoint)
        },
        "tasks": list(wanted.tasks),
        "limit": settings.limit,
        "shots": settings.shots,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "dtype": session.context.dtype,
        "device": session.context.device,
        "lm_eval": harness_version(),
        "results": [reference.key for reference in references],
    }


def _rows(labels: Sequence[str], found: Sequence[TaskScores]) -> list[dict[str, Any]]:
    """One row for each metric: the value and error of each model and, of two models, the difference and its error."""
    rows = []
    for index, scores in enumerate(zip(*(one.scores for one in found), strict=True)):
        first: Score = scores[0]
        row: dict[str, Any] = {
            "task": first.task,
            "metric": first.name,
            "higher_is_better": first.higher_is_better,
            "documents": first.documents,
            "shots": first.shots,
        }
        for label, score in zip(labels, scores, strict=True):
            row |= {label: score.value, f"{label}_stderr": score.error}
        if len(found) == 2:
            values = [one.values.get(index) for one in found]
            row["difference"] = scores[1].value - first.value
            row["stderr"] = None if values[0] is None or values[1] is None else paired_error(values[0], values[1])
        rows.append(row)
    return rows
