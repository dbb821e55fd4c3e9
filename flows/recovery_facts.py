"""What the recovery stage found: the learning curve, before and after, and what it took."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flows.session import Session
from surgeon.choices import Recovery
from surgeon.recovery.memory import TrainingMemory
from surgeon.store import Reference
from tasks.context import ModelState
from tasks.recovery import kept_blocks
from tasks.training import TRAINING, RecoveryWork

CURVE_POINTS = 400
"""Points of a learning curve at most; those of longer training are means over steps."""
_SIZES = ("perplexity", "loss", "parameters", "nonzero", "bytes", "linear_weights", "linear_nonzero")


def recovery_facts(
    session: Session, work: RecoveryWork, stored: Reference, references: Mapping[str, Reference]
) -> dict[str, Any]:
    """Facts of a finished recovery; the same bytes whenever it is found again.

    Args:
        session: its parameters.
        work: what was trained.
        stored: the record.
        references: of all results by readable name.
    """
    segments = [reference.attributes for _, reference in sorted(references.items()) if reference.kind == TRAINING.kind]
    best, settings = stored.attributes["best"], work.settings
    stop = int(segments[-1]["stop"])
    given = session.params
    return {
        "method": settings.method.value,
        "accepted": best is not None,
        "parameters": given.recovery.resolved(batch_size=session.training_batch, seed=given.seed),
        "steps": stop,
        "stopped_early": stop < settings.steps,
        "best_step": 0 if best is None else segments[best]["stop"],
        "tokens": stop * settings.batch_tokens,
        "corpus": work.corpus.attributes,
        "curve": thinned([loss for segment in segments for loss in segment["losses"]]),
        "terms": {
            term: thinned([loss for segment in segments for loss in segment["terms"][term]])
            for term in segments[0]["terms"]
        },
        "validation": [
            {"step": 0, "loss": segments[0]["validation_before"]},
            *({"step": segment["stop"], "loss": segment["validation_loss"]} for segment in segments),
        ],
        "n_parameters": segments[0]["n_parameters"],
        "n_trained": segments[0]["n_trained"],
        "memory": _memory(session, work, segments[0]).to_json(),
        "before": _sizes(references["recovery/before/evaluation"]),
        "after": _sizes(references["recovery/after/evaluation"]),
        "state": stored.attributes["state"],
        "pruned_digest": work.state.digest,
        "weights_digest": ModelState.from_json(work.state.checkpoint_digest, stored.attributes["state"]).digest,
    }


def untouched_facts(session: Session, state: ModelState) -> dict[str, Any]:
    """Facts where nothing is trained."""
    given = session.params
    return {
        "method": Recovery.NONE.value,
        "accepted": None,
        "parameters": given.recovery.resolved(batch_size=session.training_batch, seed=given.seed),
        "state": state.to_json(),
        "pruned_digest": state.digest,
        "weights_digest": state.digest,
    }


def thinned(losses: list[float]) -> list[dict[str, float]]:
    """Losses with their steps; means over steps that follow each other where there are many."""
    n_points = min(len(losses), CURVE_POINTS)
    parts = np.array_split(np.arange(len(losses)), n_points) if n_points else []
    values = np.asarray(losses, dtype=np.float64)
    return [{"step": float(part.mean()), "loss": float(values[part].mean())} for part in parts]


def _memory(session: Session, work: RecoveryWork, sizes: Mapping[str, Any]) -> TrainingMemory:
    """What training takes, from the sizes of what was trained."""
    model = session.model
    kept = kept_blocks(session.context, work.state)
    return TrainingMemory.of(
        [[(shape.n_out, shape.n_in) for shape in model.blocks[block]] for block in kept],
        n_parameters=sizes["n_parameters"],
        n_trained=sizes["n_trained"],
        n_vocabulary=model.n_vocabulary,
        micro_tokens=min(work.settings.micro_batch, work.settings.rows_per_step) * work.settings.length,
        n_teacher=sizes["n_teacher"],
    )


def _sizes(evaluation: Reference) -> dict[str, Any]:
    return {name: evaluation.attributes[name] for name in _SIZES}
