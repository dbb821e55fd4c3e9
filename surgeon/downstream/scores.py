"""What a model scored on a task: each metric with its standard error, and its value for each document."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import NonFiniteError

FloatArray = NDArray[np.float64]
NO_FILTER = "none"


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: name of the task, or of a group of tasks.
        metric: such as "acc".
        filter: what the answers went through before they were scored; "none" if nothing.
        value: the metric over all documents.
        error: standard error of the value, or None where lm-eval gives none.
        higher_is_better: None if lm-eval does not say.
        documents: how many were scored.
        shots: worked examples in each prompt; None for a group whose tasks differ.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    higher_is_better: bool | None
    documents: int
    shots: int | None

    @property
    def name(self) -> str:
        """The metric, with the filter where there is one."""
        return self.metric if self.filter == NO_FILTER else f"{self.metric} ({self.filter})"


@dataclass(frozen=True)
class TaskScores:
    """All that a model scored on what one name stands for: a task, or a group of tasks.

    Attributes:
        scores: metrics, in the order of lm-eval.
        values: by the index of a score, its value for each document, `[documents]` float64; only where the metric is
            the mean of them.
    """

    scores: tuple[Score, ...]
    values: Mapping[int, FloatArray] = field(default_factory=dict)


def paired_error(dense: FloatArray, pruned: FloatArray) -> float | None:
    """Standard error of the difference of two means over the same documents.

    With `d_i` the difference at document `i` of `n`: `sqrt(sum (d_i - mean d)^2 / (n (n - 1)))`. Both models answer the
    same questions, so this is smaller than what two independent errors would give.

    Args:
        dense: `[n]`, value for each document.
        pruned: `[n]`, the same documents in the same order.

    Returns:
        The error, or None for fewer than two documents.

    Reference:
        Miller 2024, Adding Error Bars to Evals (arXiv 2411.00640), section 4.2.
    """
    if dense.shape != pruned.shape:
        raise ValueError(f"{len(dense)} and {len(pruned)} documents: both models must have scored the same")
    n = len(dense)
    return float(np.std(pruned - dense, ddof=1) / math.sqrt(n)) if n > 1 else None


def read_scores(found: Mapping[str, Any], means: Mapping[str, set[str]], label: str) -> TaskScores:
    """Takes scores out of what lm-eval returns.

    Args:
        found: result of `lm_eval.evaluator.evaluate` with samples.
        means: for each task, the metrics that are means over documents.
        label: which model and task, for messages.

    Raises:
        NonFiniteError: a metric is not finite.
    """
    scores: list[Score] = []
    values: dict[int, FloatArray] = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, chain = key.rpartition(",")
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not comma or metric.endswith("_stderr") or not is_number:
                continue
            error = metrics.get(f"{metric}_stderr,{chain}")
            score = Score(
                task=task,
                metric=metric,
                filter=chain,
                value=_finite(float(value), f"{label}: {metric} of {task}"),
                error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                documents=int(metrics["sample_len"]),
                shots=found["n-shot"].get(task),
            )
            by_document = _values(found["samples"].get(task, ()), score)
            if metric in means.get(task, ()) and by_document is not None:
                values[len(scores)] = by_document
            scores.append(score)
    return TaskScores(tuple(scores), values)


def _values(samples: Any, score: Score) -> FloatArray | None:
    """The metric of each document, if every document has one number."""
    found = [sample.get(score.metric) for sample in samples if sample["filter"] == score.filter]
    if len(found) != score.documents or not all(isinstance(value, int | float | np.number) for value in found):
        return None
    return np.array(found, dtype=np.float64)


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{where} is {value}: the model gives a document no probability at all, or its logits are not finite. "
            "Evaluate it with `surgeon evaluate MODEL`, which names the block"
        )
    return value
