"""What a model scores on downstream tasks, by lm-eval."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from surgeon.choices import Precision
from surgeon.devices import place_of
from surgeon.downstream import Harness, OpenTask, Score, ScoringSettings, TaskScores, definition_digest
from surgeon.downstream.scores import FloatArray
from surgeon.loading import load_checkpoint
from surgeon.models import Checkpoint
from surgeon.precision import float32_products, precision_of
from surgeon.store import Reference
from tasks.calibration import load_tokenizer
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Site, Stage, produce_all, read_arrays

SCORES = Stage(
    "task-scores",
    1,
    (
        "surgeon.downstream.definitions",
        "surgeon.downstream.harness",
        "surgeon.downstream.quiet",
        "surgeon.downstream.scores",
        "surgeon.loading",
    ),
)


@dataclass(frozen=True)
class ScoredModel:
    """A model that is scored: what it is called in labels, and where it is."""

    label: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class WantedScores:
    """Tasks, and how to score them.

    Attributes:
        tasks: names of tasks and groups, as lm-eval knows them.
        include: directory with definitions of the user's own, or None.
        settings: how.
    """

    tasks: tuple[str, ...]
    include: Path | None
    settings: ScoringSettings


_Place = tuple[int, str]
"""A model by its number, and a task."""


def scores_request(model: ScoredModel, task: str, wanted: WantedScores, definitions: str) -> Request:
    """The request for the scores of a model on a task; `definitions` is what `definition_digest` says."""
    parameters = {"task": task, **asdict(wanted.settings)}
    inputs = {"weights": model.checkpoint.digest, "definitions": definitions}
    return Request(SCORES, parameters, inputs, f"{model.label}/tasks/{task}")


def scores_task(site: Site, models: Sequence[ScoredModel], wanted: WantedScores) -> Outcome[list[Reference]]:
    """Scores of several models on several tasks: for each model in turn, one for each task, in the order given.

    What is missing is scored; each task of a model is stored as soon as it is done.
    """
    definitions = definition_digest(wanted.include)
    requests = {
        (number, task): scores_request(model, task, wanted, definitions)
        for number, model in enumerate(models)
        for task in wanted.tasks
    }
    lock = requests[0, wanted.tasks[0]].key(site)
    return produce_all(site, requests, lock, partial(_makers, site, models, wanted))


def stored_scores(site: Site, reference: Reference) -> TaskScores:
    """Scores as they were stored."""
    scores = tuple(Score(**fields) for fields in reference.attributes["scores"])
    values: dict[int, FloatArray] = {int(name.removeprefix("values/")): a for name, a in _arrays(site, reference)}
    return TaskScores(scores, values)


def _arrays(site: Site, reference: Reference) -> list[tuple[str, FloatArray]]:
    return list(read_arrays(site, reference.key).items())


def _makers(
    site: Site, models: Sequence[ScoredModel], wanted: WantedScores, missing: Collection[_Place]
) -> dict[_Place, Callable[[], Product]]:
    """How to make each of the scores that are missing. All tasks are opened first, so that bad ones are found early."""
    names = list(dict.fromkeys(task for _, task in missing))
    report("opening the tasks", 0, len(names))
    harness = Harness(names, wanted.include)
    opened: dict[str, OpenTask] = {}
    for done, name in enumerate(names, start=1):
        opened[name] = harness.open(name, wanted.settings.shots)
        report("opening the tasks", done, len(names))
    loaded = _Loaded(site)

    def score(number: int, task: str) -> Product:
        model = models[number]
        progress = partial(report, f"{model.label}: {task}")
        tokenizer = load_tokenizer(model.checkpoint)
        lm = loaded.model(model.checkpoint)
        with float32_products(precision_of(site.dtype)):
            found = harness.score(opened[task], lm, tokenizer, wanted.settings, progress)
        values = {f"values/{index}": values for index, values in found.values.items()}
        return Product(values, {"task": task, "scores": [asdict(score) for score in found.scores]})

    return {(number, task): partial(score, number, task) for number, task in missing}


class _Loaded:
    """Holds one model at a time, the one that was asked for last."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._digest = ""
        self._model: PreTrainedModel | None = None

    def model(self, checkpoint: Checkpoint) -> PreTrainedModel:
        if checkpoint.digest != self._digest:
            self._model = None
            self._model = load_checkpoint(
                checkpoint.path,
                getattr(torch, "float32" if self._site.dtype == Precision.TF32 else self._site.dtype),
                place_of(self._site.device),
                trust_remote_code=checkpoint.trust_remote_code,
            )
            self._digest = checkpoint.digest
        assert self._model is not None
        return self._model
