"""The work of a round of Bonsai."""

from collections.abc import Callable, Sequence
from typing import Any

from flows.session import Session
from flows.work_after import block_shapes
from surgeon.choices import Prior, Solver
from surgeon.planning.passes import forward_work, head_work
from surgeon.planning.work import NOTHING, Work
from surgeon.store import Reference
from tasks.bonsai import prior_task, ranked_mask_task, ranking_task, sub_model_task
from tasks.bonsai_round import Round
from tasks.sizes import n_arrays

_STATISTICS = 40
"""Bytes moved for each input of an output linear: turned to float64, averaged, squared, summed."""
_RANKING_S = 0.1
_ADAM_STEPS = 181 * 50 * 3
"""Steps of the published solver: fits, epochs, batches of about a third of the sub-models."""
_ADAM_BYTES = 150
"""Bytes moved by a step for each candidate."""
_MASK_S = 0.1


def bonsai_works(session: Session) -> dict[Callable[..., Any], Callable[..., Work]]:
    """Work of each task, from what it is called with after the context."""
    return {
        prior_task: lambda work: _prior(session, work),
        sub_model_task: lambda work, _prior, index: _sub_model(session, work, index),
        ranking_task: lambda work, _prior, sub_models: _ranking(session, work, sub_models),
        ranked_mask_task: lambda *_: Work.of(seconds=_MASK_S, arrays=3),
    }


def _tokens(session: Session, work: Round) -> tuple[int, int]:
    given = session.params.calibrate
    return min(work.settings.sequences or given.sequences, given.sequences) * given.length, given.length


def _pass(session: Session, work: Round) -> Work:
    """One forward pass through what the rounds before are expected to have left."""
    tokens, length = _tokens(session, work)
    model = session.model
    left = 1.0 - session.goal.fraction * (work.number - 1) / session.n_shots
    return left * forward_work(block_shapes(session), tokens, length) + head_work(
        model.width * model.n_vocabulary, tokens
    )


def _opening(session: Session, work: Round) -> Work:
    """The model opened and loaded."""
    model, n_weights = session.model, session.model.n_weights
    total = Work.of(openings=1, loads=model.n_parameters * model.torch_dtype.itemsize)
    if any(work.state.updates):
        opened = sum(n_arrays(model, "update", block, session.recipe, None) for block in range(model.n_blocks))
        total += Work.of(reads=4 * n_weights, copies=2 * n_weights * model.torch_dtype.itemsize, opened=3 * opened)
    return total


def _prior(session: Session, work: Round) -> Work:
    if work.settings.prior is Prior.RANDOM:
        return Work.of(arrays=2)
    tokens, _ = _tokens(session, work)
    names = session.measured_linears
    columns = sum(s.n_in for block in session.model.blocks for s in block if names is None or s.name in names)
    return _opening(session, work) + _pass(session, work) + Work.of(copies=_STATISTICS * tokens * columns, arrays=2)


def _sub_model(session: Session, work: Round, index: int) -> Work:
    opens = index == 0 and work.settings.prior is Prior.RANDOM
    return (_opening(session, work) if opens else NOTHING) + _pass(session, work) + Work.of(arrays=1)


def _ranking(session: Session, work: Round, sub_models: Sequence[Reference]) -> Work:
    total = Work.of(seconds=_RANKING_S, opened=len(sub_models) + len(session.model.blocks), arrays=3)
    if sub_models and work.settings.solver is Solver.ADAM:
        columns = sum(max((s.n_in for s in block), default=0) for block in session.model.blocks)
        share = min(1.0, 2.0 * session.goal.fraction / session.n_shots)
        total += Work.of(copies=_ADAM_STEPS * _ADAM_BYTES * share * columns)
    return total
