"""Downstream tasks by lm-eval: questions with choices, continuations and texts, scored for one or two models.

lm-eval is an optional package (`pip install "surgeon[tasks]"`), so nothing here imports it before it is needed.
"""

from surgeon.downstream.definitions import definition_digest, harness_version
from surgeon.downstream.harness import Harness, OpenTask, ScoringSettings
from surgeon.downstream.scores import Score, TaskScores, paired_error

__all__ = [
    "Harness",
    "OpenTask",
    "Score",
    "ScoringSettings",
    "TaskScores",
    "definition_digest",
    "harness_version",
    "paired_error",
]
