"""The work and the memory of recovery, from the shapes of the dense model and the parameters."""

from collections.abc import Callable
from typing import Any

from flows.session import Session
from flows.work_after import block_shapes, kept_share
from surgeon.choices import Recovery
from surgeon.planning.passes import backward_work, forward_work, head_backward_work, head_work
from surgeon.planning.work import Work
from surgeon.recovery.memory import TrainingMemory
from surgeon.recovery.settings import RecoverySettings
from tasks.context import ModelState
from tasks.corpus import corpus_task
from tasks.recovery import recovered_task
from tasks.training import RecoveryWork, training_task

_TEXT_S = 1.0
"""Reading a text, tokenising it and looking for the evaluation windows in it."""
_STEP_BYTES = 40
"""Bytes moved for each weight that is trained: gradients added and clipped, two moments, the weight."""
_STATE_BYTES = 12
"""Bytes stored for each weight that is trained: itself and two moments."""


def recovery_works(session: Session) -> dict[Callable[..., Any], Callable[..., Work]]:
    """Work of each task, from what it is called with after the context."""
    return {
        corpus_task: lambda *_: Work.of(seconds=_TEXT_S),
        training_task: lambda work, index, _previous: _segment(session, work, index),
        recovered_task: lambda work, _best: _recovered(session, work),
    }


def recovery_gib(session: Session) -> float:
    """What training holds at its peak, and the arrays of a segment while they are stored."""
    given = session.params
    settings = given.recovery.settings(batch_size=session.training_batch, seed=given.seed)
    n_trained = _n_trained(session, settings)
    memory = TrainingMemory.of(
        session.model.shapes(),
        n_parameters=_n_left(session),
        n_trained=n_trained,
        n_vocabulary=session.model.n_vocabulary,
        micro_tokens=min(settings.micro_batch, settings.rows_per_step) * settings.length,
        n_teacher=session.model.n_parameters if settings.needs_teacher else 0,
    )
    return memory.total_gib + _STATE_BYTES * n_trained / 2**30


def recovery_bytes(session: Session, kind: str) -> int:
    """Bytes of a stored result of recovery whose size depends on the settings; 0 of any other."""
    given = session.params
    if kind not in ("training", "corpus"):
        return 0
    settings = given.recovery.settings(batch_size=session.training_batch, seed=given.seed)
    if kind == "training":
        return _STATE_BYTES * _n_trained(session, settings)
    rows = settings.steps * settings.rows_per_step + settings.validation_rows
    return 8 * rows * settings.length


def _segment(session: Session, work: RecoveryWork, index: int) -> Work:
    """Opening, the steps, and the validation after them (and before, in the first)."""
    settings, steps = work.settings, work.settings.segments[index]
    tokens = len(steps) * settings.batch_tokens
    n_trained = _n_trained(session, settings)
    validation = settings.validation_rows * settings.length * (2 if index == 0 else 1)
    total = Work.of(openings=1, copies=_STEP_BYTES * n_trained * len(steps)) + _reads(session, work.state)
    total += _forward(session, work, tokens + validation) + _backward(session, work, tokens)
    if settings.needs_teacher:
        total += _forward(session, work, tokens) + Work.of(loads=4 * session.model.n_parameters)
    if index:
        total += Work.of(reads=_STATE_BYTES * n_trained)
    return total + Work.of(writes=_STATE_BYTES * n_trained, arrays=3 * sum(map(len, session.model.blocks)))


def _recovered(session: Session, work: RecoveryWork) -> Work:
    n_bytes = session.model.update_bytes
    total = Work.of(openings=1, reads=n_bytes + _STATE_BYTES * _n_trained(session, work.settings))
    return total + 2 * _reads(session, work.state) + Work.of(writes=n_bytes)


def _reads(session: Session, state: ModelState) -> Work:
    """The pruned weights brought into memory."""
    n_bytes = session.model.update_bytes
    return Work.of(reads=n_bytes) if any(state.updates) else Work.of(loads=n_bytes)


def _forward(session: Session, work: RecoveryWork, tokens: int) -> Work:
    blocks = [shape for index, shape in enumerate(block_shapes(session)) if index not in work.state.removed]
    length = work.settings.length
    return kept_share(session) * forward_work(blocks, tokens, length) + head_work(_n_head(session), tokens)


def _backward(session: Session, work: RecoveryWork, tokens: int) -> Work:
    """Gradients of activations and, of all but adapters, as much again of weights."""
    blocks = [shape for index, shape in enumerate(block_shapes(session)) if index not in work.state.removed]
    times = 1 if work.settings.method is Recovery.LORA else 2
    body = kept_share(session) * backward_work(blocks, tokens, work.settings.length)
    return times * (body + head_backward_work(_n_head(session), tokens))


def _n_head(session: Session) -> int:
    return session.model.width * session.model.n_vocabulary


def _n_left(session: Session) -> int:
    model = session.model
    return int(model.n_parameters - (1.0 - kept_share(session)) * model.n_weights)


def _n_trained(session: Session, settings: RecoverySettings) -> int:
    if settings.method is not Recovery.LORA:
        return _n_left(session)
    return settings.rank * sum(shape.n_out + shape.n_in for block in session.model.blocks for shape in block)
