"""The compare flow: several ways to prune on equal terms, through one engine and one store.

Every run is looked up or made like that of the prune stage, so a comparison that was killed goes on where it was.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from flows.card import describe_settings
from flows.checks import check_pruning
from flows.compare_files import write_comparison
from flows.compare_spec import Run, shots_of
from flows.comparison import Cell, Comparison, Row, Table, Usage
from flows.planning import require_possible
from flows.prune import prune
from flows.recovery import Recovered, check_recovery, recover
from flows.results import provenance
from flows.session import Session
from flows.shot import Shot
from flows.stages import dense_evaluation, write_timing
from surgeon.errors import CorruptObjectError, EvictedError, InputError, SurgeonError
from surgeon.store import Reference, Store

STAGE = "compare"
_COSTS_MASK = ("costs", "mask", "selection")
_UPDATE = ("update", "correction", "dropped")
_RECOVERY = ("training", "recovered")
_NOT_COUNTED = ("evaluation", "shot", "sequences", "windows", "corpus", "recovery")


def compare_all(session: Session, runs: Sequence[Run]) -> Comparison:
    """Fills every cell, and writes tables and plots to `data/compare`.

    Args:
        session: of the first run; the others share what it opens.
        runs: as planned, in the order of tables and rows.

    Raises:
        InputError: something cannot work for all; nothing was pruned yet where it can be known before.
    """
    session.check()
    sessions = [session.sibling(run.params) for run in runs]
    for run, one in zip(runs, sessions, strict=True):
        try:
            check_pruning(one)
            check_recovery(one)
        except InputError as error:
            raise type(error)(f"{run.label} ({run.table}): {error}") from error
    session.register()
    comparison = session.stage(STAGE, lambda: _compare(session, runs, sessions))
    write_timing(session, STAGE)
    write_comparison(session.workspace.comparison, comparison)
    return comparison


def _compare(session: Session, runs: Sequence[Run], sessions: Sequence[Session]) -> Comparison:
    for one in {each.params.seed: each for each in sessions}.values():
        _ = one.windows  # keeps the windows apart from the calibration sequences of every seed
    dense = dense_evaluation(session)
    tables: dict[str, Table] = {}
    rows: dict[tuple[str, str], Row] = {}
    used: dict[tuple[str, str], dict[str, Reference]] = {}
    for number, (run, one) in enumerate(zip(runs, sessions, strict=True), start=1):
        session.say(f"{number}/{len(runs)} {run.label} ({run.table})")
        place = run.table, run.row
        if place not in rows:
            rows[place] = Row(run.row, describe_settings(run.params.prune.resolved()))
            tables.setdefault(run.table, Table(run.table)).rows.append(rows[place])
        cells, references = _run(one, run)
        rows[place].cells.extend(cells)
        used.setdefault(place, {}).update(references)
        rows[place].usage = _usage(session.store, used[place].values())
    shared = [session.calibration(), session.windows, dense]
    return Comparison(
        {name: dense.attributes[name] for name in ("perplexity", "loss")},
        _protocol(session, runs),
        [*tables.values()],
        sorted({ref.key for ref in shared} | {key for references in used.values() for key in references}),
    )


def _run(session: Session, run: Run) -> tuple[list[Cell], dict[str, Reference]]:
    """Makes or finds one run; returns its cells and all results that it used, by key."""
    numbers = shots_of(run)
    try:
        require_possible(session)
        shots = prune(session)
        recovered = {number: recover(session, shots[number - 1].state) for number in numbers}
    except (InputError, CorruptObjectError, EvictedError):
        raise
    except SurgeonError as error:
        message = " ".join(str(error).split())
        session.say(f"failed: {message}")
        cells = zip(run.sparsities, numbers, strict=True)
        return [Cell(sparsity, number, error=message) for sparsity, number in cells], {}
    store = session.store
    cells = [
        _cell(store, sparsity, shots[:number], recovered[number])
        for sparsity, number in zip(run.sparsities, numbers, strict=True)
    ]
    trained = {ref.key: ref for each in recovered.values() for ref in each.references.values()}
    return cells, _references(shots) | trained


def _cell(store: Store, sparsity: float, shots: Sequence[Shot], recovered: Recovered) -> Cell:
    found = shots[-1].evaluation.attributes
    facts = recovered.facts if recovered.references else None
    return Cell(
        sparsity=sparsity,
        shots=len(shots),
        reached=shots[-1].record["sparsity"],
        perplexity=found["perplexity"],
        loss=found["loss"],
        nonzero=found["nonzero"],
        recovered=None if facts is None else facts["after"]["perplexity"],
        tokens=None if facts is None else facts["tokens"],
        accepted=None if facts is None else facts["accepted"],
        usage=_usage(store, [*_references(shots).values(), *recovered.references.values()]),
    )


def _references(shots: Sequence[Shot]) -> dict[str, Reference]:
    return {ref.key: ref for shot in shots for ref in (*shot.references.values(), *shot.passed_on, shot.stored)}


def _usage(store: Store, references: Iterable[Reference]) -> Usage:
    """Seconds and memory from the records of the store, be they of this run or of an earlier one."""
    statistics = costs_mask = update = training = 0.0
    peaks = []
    for reference in references:
        if reference.kind in _NOT_COUNTED:
            continue
        record = store.record(reference.key)
        seconds = float(record.get("seconds") or 0.0)
        if (peak := record.get("peak_memory_gib")) is not None:
            peaks.append(float(peak))
        if reference.kind in _COSTS_MASK:
            costs_mask += seconds
        elif reference.kind in _UPDATE:
            update += seconds
        elif reference.kind in _RECOVERY:
            training += seconds
        else:
            statistics += seconds
    return Usage(statistics, costs_mask, update, training, max(peaks, default=None))


def _protocol(session: Session, runs: Sequence[Run]) -> dict[str, str]:
    """What all rows share."""
    origin = provenance(session)
    calibration, evaluation = session.calibration().attributes, session.windows.attributes
    model = origin["model"]

    def text(facts: dict[str, object], count: str, things: str) -> str:
        n, length = int(str(facts[count])), int(str(facts["length"]))
        split = f", {facts['split']}" if facts["split"] else ""
        source = Path(str(facts["source"]))
        # Of a local file the name is enough: where it lies is nobody else's concern, and the digest names the content.
        name = source.name if source.exists() else facts["source"]
        return f"{name}{split} ({facts['revision']}): {n} {things} of {length} tokens, {n * length:,} in all"

    return {
        "model": f"{model['source']}, revision {model['revision']}, {session.params.model.dtype}",
        "model digest": model["digest"],
        "calibration": text(calibration, "n_sequences", "sequences"),
        "evaluation": text(evaluation, "n_windows", "windows"),
        "seed": ", ".join(map(str, sorted({run.params.seed for run in runs}))),
        "executed on": f"{origin['device']}, {origin['batch_size']} sequences at a time",
        "versions": ", ".join(f"{name} {number}" for name, number in origin["versions"].items()),
    }
