"""lm-eval, as a few calls: open tasks by name, and score a model that is loaded already."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.downstream.definitions import harness_version, local_data, named_data
from surgeon.downstream.quiet import Progress, quiet_harness, seeded
from surgeon.downstream.scores import TaskScores, read_scores
from surgeon.errors import NonFiniteError, SurgeonError, TaskError
from surgeon.text.suggest import did_you_mean

BOOTSTRAPS = 1000
"""Draws for the standard error of metrics that have no formula for it."""
_BAD_TASK = (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, ImportError)


@dataclass(frozen=True)
class ScoringSettings:
    """How tasks are scored.

    Attributes:
        limit: score only so many documents of each task, the first ones; None for all.
        shots: worked examples in each prompt; None for what each task says.
        batch_size: requests at a time.
        seed: of the draw of worked examples, and of whatever else a task draws.
    """

    limit: int | None = None
    shots: int | None = None
    batch_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("shots", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TaskError(f"{name}: {value} is too small; it must be {least} or more")


@dataclass(frozen=True)
class OpenTask:
    """A task or a group of tasks with its data.

    Attributes:
        name: what it was asked for by.
        loaded: what lm-eval's `TaskManager.load` returned.
    """

    name: str
    loaded: dict[str, Any]

    @property
    def means(self) -> dict[str, set[str]]:
        """For each task, its metrics that are means over documents."""
        from lm_eval.api.metrics import mean

        return {
            name: {metric for metric, aggregate in task.aggregation().items() if aggregate is mean}
            for name, task in self.loaded["tasks"].items()
        }


class Harness:
    """All tasks that lm-eval knows, and the user's own.

    Args:
        names: tasks and groups that will be opened.
        include: directory with definitions of the user's own, which win over those of lm-eval; or None.

    Raises:
        TaskError: lm-eval is not installed, or it does not know a name.
    """

    def __init__(self, names: Sequence[str], include: Path | None = None) -> None:
        harness_version()
        with quiet_harness():
            self._manager: Any = _index(names, include)
        if include is not None:
            _find_data(self._manager.task_index, include)
        self.require_known(names)

    def require_known(self, names: Sequence[str]) -> None:
        """Refuses names that stand for nothing.

        Raises:
            TaskError: naming all that are not known, each with what may have been meant.
        """
        known = self._manager.all_tasks
        unknown = [name for name in names if name not in known]
        if unknown:
            listed = "; ".join(f"{name!r} is not one.{did_you_mean(name, known)}" for name in unknown)
            raise TaskError(
                f"tasks: lm-eval {harness_version()} knows {len(known):,} tasks and groups, and {listed} `lm-eval ls "
                "tasks` lists them; --include DIR adds definitions of your own"
            )

    def open(self, name: str, shots: int | None = None) -> OpenTask:
        """Opens a task or a group with its data.

        Args:
            name: as lm-eval knows it.
            shots: worked examples in each prompt; None for what each task says.

        Raises:
            TaskError: its data cannot be had, its definition does not work, or it allows no worked examples.
        """
        self.require_known([name])
        try:
            with quiet_harness(), seeded(0):  # so that a task that shuffles its data always does it in one way
                loaded = self._manager.load([name])
        except OSError as error:  # which connection errors and data sets that are not found are kinds of
            raise TaskError(
                f"tasks: the data of {name!r} cannot be had ({error}). Run it once with a connection and without "
                "HF_DATASETS_OFFLINE, which keeps the data in the cache of the `datasets` package; or give a "
                "definition over local files with --include DIR"
            ) from error
        except _BAD_TASK as error:
            raise TaskError(f"tasks: {name!r} cannot be opened ({type(error).__name__}: {error})") from error
        for task_name, task in loaded["tasks"].items():
            _set_shots(task, task_name, shots)
        return OpenTask(name, loaded)

    def score(
        self,
        task: OpenTask,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ScoringSettings,
        progress: Progress = lambda _done, _total: None,
    ) -> TaskScores:
        """Scores a model on a task.

        Args:
            task: opened with the shots of the settings.
            model: in evaluation mode, on its device.
            tokenizer: the model's.
            settings: how.
            progress: told how many requests to the model are done.

        Raises:
            TaskError: the task does not work on this model, or there is not enough memory for the batch size.
            NonFiniteError: logits or a metric are not finite.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        for one in task.loaded["tasks"].values():
            one.set_fewshot_seed(settings.seed)
        try:
            with quiet_harness(progress), seeded(settings.seed), torch.no_grad(), _finite_logits(model, task.name):
                wrapped: Any = HFLM(
                    pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=settings.batch_size
                )
                found = evaluate(wrapped, task.loaded, limit=settings.limit, bootstrap_iters=BOOTSTRAPS)
        except SurgeonError:
            raise
        except torch.OutOfMemoryError as error:
            raise TaskError(
                f"tasks: {task.name!r}: not enough memory on {model.device} for batches of {settings.batch_size}; "
                "lower run.batch_size"
            ) from error
        except _BAD_TASK as error:
            raise TaskError(f"tasks: {task.name!r} failed in lm-eval ({type(error).__name__}: {error})") from error
        return read_scores(found, task.means, f"tasks: {task.name!r}")


def _index(names: Sequence[str], include: Path | None) -> Any:
    """The definitions: only the user's own where they have all the tasks, as reading thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        kinds = [own.task_index[name].kind.name if name in own.task_index else "" for name in names]
        if all(kind == "TASK" for kind in kinds):
            return own
    return TaskManager(include_path=None if include is None else str(include))


def _set_shots(task: Any, name: str, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if shots is None:
        task.set_config(key="num_fewshot", value=own or 0)
    elif own == 0 and shots > 0:
        raise TaskError(
            f"tasks: {name!r} is defined without worked examples (num_fewshot: 0), so {shots} shots have no effect; "
            "leave --shots out for it"
        )
    else:
        task.set_config(key="num_fewshot", value=shots)


def _find_data(index: dict[str, Any], include: Path) -> None:
    """Lets the user's definitions name data files that lie beside them; lm-eval looks from the current directory."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for entry in index.values():
        path = entry.yaml_path
        if path is None or include.resolve() not in Path(path).resolve().parents:
            continue
        fields = (entry.cfg or {}).get("dataset_kwargs")
        places = {named: local_data(Path(path), named) for named in named_data(fields)}
        if any(place is not None for place in places.values()):
            entry.cfg = load_yaml(path)
            entry.cfg["dataset_kwargs"] = _replaced(fields, places)
            entry.yaml_path = None  # lm-eval reads the file again where there is one


def _replaced(value: Any, places: dict[str, Path | None]) -> Any:
    """The same value with names of data replaced by where they are."""
    if isinstance(value, dict):
        return {name: _replaced(item, places) for name, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, places) for item in value]
    place = places.get(value) if isinstance(value, str) else None
    return value if place is None else str(place.resolve())


@contextmanager
def _finite_logits(model: nn.Module, name: str) -> Iterator[None]:
    """Refuses logits that are not numbers: lm-eval would take the first choice for the best of them."""

    def look(_module: nn.Module, _inputs: object, output: Any) -> None:
        if torch.isnan(output.logits).any():
            raise NonFiniteError(
                f"tasks: {name!r}: the model's logits are not all numbers. Evaluate it with `surgeon evaluate MODEL`, "
                "which names the block"
            )

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
