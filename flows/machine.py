"""Rates of this machine, measured once and kept in `data/machine.json`."""

import os
import platform
from dataclasses import replace
from typing import Any

from flows.session import Session
from flows.work_after import block_shapes
from flows.workspace import read_json, write_json
from surgeon.benchmarking import describe_machine
from surgeon.planning import Rates, guess_rates, measure_rates
from surgeon.planning.rates import Sample

_STEP_TOKENS = 32
"""Sequences that tokens are added to one by one, at most: more would show no other rate."""
_GUESSED_SIDE = 768
"""Matrices of a guess are no larger, so that it takes about a second."""


def measured_rates(session: Session, *, again: bool = False) -> Rates:
    """Rates for this model and batch: those that were measured, or measured now, which takes some ten seconds.

    Args:
        session: of the run.
        again: measures whatever is known.
    """
    known = None if again else _known(session).get(_name(session))
    if known is not None:
        return known
    session.say("measuring how fast this machine is: about 10 seconds, once for a model and a batch")
    rates = measure_rates(_sample(session), session.workspace.data)
    _keep(session, _name(session), rates)
    return rates


def rates_at_hand(session: Session) -> tuple[Rates, bool]:
    """Rates without a long measurement, and whether they were measured on this model.

    Those of another model on this machine are taken before a guess, which takes about a second.
    """
    known = _known(session)
    if (mine := known.get(_name(session))) is not None:
        return mine, True
    if known:
        return next(iter(known.values())), False
    sample = _sample(session)
    small = replace(sample, sides=(min(_GUESSED_SIDE, max(sample.sides)),))
    rates = guess_rates(small, session.workspace.data)
    _keep(session, "guess", rates)
    return rates, False


def _sample(session: Session) -> Sample:
    model, params = session.model, session.params
    sides = {side for block in model.shapes() for shape in block for side in shape}
    return Sample(
        checkpoint=session.checkpoint,
        dtype=model.torch_dtype,
        device=session.context.device,
        batch_size=session.batch_size,
        length=params.calibrate.length,
        blocks=block_shapes(session),
        sides=tuple(sorted(sides)) or (1,),
        step_tokens=min(_STEP_TOKENS, max(params.benchmark.batch_sizes)),
        n_head=model.width * model.n_vocabulary,
    )


def _name(session: Session) -> str:
    """What rates depend on beside the machine, as far as it changes them much."""
    sample = _sample(session)
    shapes = sorted({(block.n_weights, block.query_width) for block in sample.blocks})
    head = session.model.n_vocabulary, session.model.width
    return f"{shapes}, head {head}, {sample.dtype}, batch {sample.batch_size} x {sample.length}"


def _machine(session: Session) -> dict[str, Any]:
    return {**describe_machine(session.context.device), "host": platform.node(), "cpus": os.cpu_count()}


def _known(session: Session) -> dict[str, Rates]:
    """Rates by what they were measured on, those of models before a guess; none if the machine is another."""
    stored = read_json(session.workspace.machine)
    if stored is None or stored["machine"] != _machine(session):
        return {}
    found = {name: Rates.from_json(value) for name, value in stored["rates"].items()}
    usable = {name: rates for name, rates in found.items() if rates is not None}
    return dict(sorted(usable.items(), key=lambda item: item[0] == "guess"))


def _keep(session: Session, name: str, rates: Rates) -> None:
    known = {**_known(session), name: rates}
    value = {"machine": _machine(session), "rates": {n: r.to_json() for n, r in known.items()}}
    write_json(session.workspace.machine, value)
