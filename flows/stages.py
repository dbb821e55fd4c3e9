"""The stages of the pipeline as flows, and `run` for all.

model → calibrate → evaluate → prune → recovery → export → benchmark → report.

Each stage writes `data/stages/<stage>.json`, which depends on its inputs alone, so that DVC sees a change only where
there is one; how it went (seconds, tasks) goes to `data/timings/<stage>.json`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flows.benchmark import current_benchmark, measure_export
from flows.checks import check_prunable
from flows.destination import require_destination
from flows.findings import files_finding, results_finding, shots_finding
from flows.goal import require_goal
from flows.machine import rates_at_hand
from flows.manifest import read_references
from flows.planning import outline_run, require_fits
from flows.prune import prune
from flows.recovery import check_recovery, recover
from flows.render_plan import plan_line
from flows.report import write_report
from flows.results import build_results, provenance
from flows.session import Session
from flows.spectra import make_spectra
from flows.stage_facts import calibrate_facts, export_wanted, prune_facts, require_same_parameters, stage_facts
from flows.states import final_state, pruned_state, recovery_found
from flows.workspace import read_json, write_json
from surgeon.errors import InputError
from surgeon.peak import process_peak_gib
from surgeon.store import Reference, build_view
from tasks.evaluation import evaluation_task, sample_task
from tasks.export import export_task

STAGES = ("model", "calibrate", "evaluate", "prune", "recovery", "export", "benchmark", "report")


def model(session: Session) -> None:
    """Makes the model a local checkpoint and writes down what it is."""
    spec = session.model
    facts = {
        "source": spec.checkpoint.source,
        "revision": spec.checkpoint.revision,
        "digest": spec.checkpoint.digest,
        "dtype": spec.dtype,
        "blocks": spec.n_blocks,
        "linear_weights": spec.n_weights,
    }
    _finish(session, "model", {}, facts)


def evaluate_other(session: Session) -> dict[str, Any]:
    """Evaluates a model that is not the pipeline's own, without writing anything down but the cached result."""
    return dict(session.stage("evaluate", lambda: dense_evaluation(session)).attributes)


def calibrate(session: Session) -> None:
    """Draws the calibration sequences and cuts the evaluation windows."""
    calibration, windows = session.calibration(), session.windows
    facts = calibrate_facts(session)
    _finish(session, "calibrate", {"calibration/sequences": calibration, "evaluation/windows": windows}, facts)


def evaluate(session: Session) -> None:
    """Evaluates the dense model."""
    dense = dense_evaluation(session)
    _finish(session, "evaluate", {"dense/evaluation": dense}, dict(dense.attributes))


def prune_stage(session: Session) -> None:
    """Runs all shots and looks into the factors of some blocks, then writes the manifest and the view."""
    require_goal(session)
    shots = prune(session)
    references = {
        "calibration/sequences": session.calibration(),
        "evaluation/windows": session.windows,
        "dense/evaluation": dense_evaluation(session),
    }
    for shot in shots:
        references |= {**shot.references, f"{shot.label}/shot": shot.stored}
    if session.block_times is not None:
        references["dense/block-times"] = session.block_times
    references |= make_spectra(session, references, len(shots))
    facts = prune_facts(session, shots)
    write_json(session.workspace.manifest, {name: ref.to_json() for name, ref in sorted(references.items())})
    build_view(session.store, {n: r.key for n, r in references.items()}, session.workspace.view)
    _finish(session, "prune", references, facts)
    session.engine.observer.found(shots_finding(facts["shots"]))


def recovery(session: Session) -> None:
    """Trains the pruned model, if that is wanted, then writes a manifest and a view of its own."""
    require_same_parameters(session)
    recovered = recover(session, pruned_state(session))
    references = recovered.references
    manifest = {name: ref.to_json() for name, ref in sorted(references.items())}
    write_json(session.workspace.recovery_manifest, manifest)
    build_view(session.store, {n: r.key for n, r in references.items()}, session.workspace.recovery_view)
    _finish(session, "recovery", references, recovered.facts)


def export(session: Session) -> None:
    """Writes the pruned checkpoint to the place of the pipeline and loads it back."""
    _finish(session, "export", {}, export_to(session, session.workspace.export))


def export_pruned(session: Session, destination: Path | None, *, overwrite: bool) -> None:
    """The command: the stage of the pipeline, or an export to another directory, which leaves the pipeline as it is."""
    own = session.workspace.export
    place = own if destination is None else destination.absolute()
    is_own = place.resolve() == own.resolve()
    if own.resolve() in place.resolve().parents:
        raise InputError(f"{place} is inside {own}, which every run replaces as a whole; give another destination")
    require_destination(place, is_own=is_own, overwrite=overwrite)
    if is_own:
        run_stage(session, "export", lambda: _finish(session, "export", {}, export_to(session, own, overwrite=True)))
    else:
        session.stage("export", lambda: export_to(session, place, overwrite=True), partial(_make_again, session))


def export_to(session: Session, destination: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the pruned checkpoint and loads it back.

    Args:
        session: with the parameters of the last prune stage.
        destination: directory; the pipeline's own is replaced if it holds nothing but an export.
        overwrite: whether anything at the destination is replaced.

    Returns:
        Facts of the export.
    """
    own = session.workspace.export
    require_destination(destination, is_own=destination.resolve() == own.resolve(), overwrite=overwrite)
    require_same_parameters(session)
    state = final_state(session)
    found = {name: stage_facts(session, name) for name in ("calibrate", "evaluate", "prune")}
    wanted = export_wanted(session, {**found, "recovery": recovery_found(session)})
    facts: dict[str, Any] = session.engine.task(
        export_task, session.context, state, destination, *wanted, name="export"
    )
    return facts


def benchmark(session: Session, *, if_changed: bool = True) -> None:
    """Measures the export beside the dense model, or takes the figures of the same on the same machine."""
    require_same_parameters(session)
    facts = measure_export(session, if_changed=if_changed)
    _finish(session, "benchmark", {}, facts)
    write_json(session.workspace.benchmark, facts["figures"])


def benchmark_again(session: Session) -> None:
    """The stage as a flow, measured whatever is known."""
    run_stage(session, "benchmark", lambda: benchmark(session, if_changed=False))


def report(session: Session) -> None:
    """Continues the prompt with both models."""
    require_same_parameters(session)
    settings = session.params.report
    samples: dict[str, Reference] = {
        name: session.engine.task(
            sample_task, session.context, state, settings.prompt, settings.new_tokens, name, name=f"{name}/sample"
        )
        for name, state in (("dense", session.dense), ("pruned", final_state(session)))
    }
    named = {f"{name}/sample": sample for name, sample in samples.items()}
    facts = {"samples": {name: sample.attributes for name, sample in samples.items()}}
    _finish(session, "report", named, facts)


_BODIES: dict[str, Callable[[Session], None]] = {
    "model": model,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "prune": prune_stage,
    "recovery": recovery,
    "export": export,
    "benchmark": benchmark,
    "report": report,
}


_READERS_OF_PRUNED = ("recovery", "export", "benchmark", "report")


def run_stage(session: Session, name: str, body: Callable[[], None] | None = None) -> None:
    """Runs one stage as a flow.

    Args:
        session: parameters, files and engine.
        name: of the stage.
        body: what it does, where it is not what the stage always does.
    """
    if name == "prune":
        session.healed(lambda: require_fits(session, outline_run(session, whole=False).needs))
    _run_stage(session, name, body)


def _run_stage(session: Session, name: str, body: Callable[[], None] | None = None) -> None:
    session.register()
    repair = partial(_make_again, session, name) if name in _READERS_OF_PRUNED else lambda: None
    session.stage(name, body or partial(_BODIES[name], session), repair)
    write_timing(session, name)


def check_run(session: Session) -> None:
    """Refuses a run that would end badly, beyond what `Session.check` finds.

    Raises:
        InputError: the model cannot be pruned, or what is at the place of the export is not one.
    """
    require_destination(session.workspace.export, is_own=True, overwrite=False, quick=True)
    check_prunable(session)
    check_recovery(session)


def run_all(session: Session) -> dict[str, Any]:
    """Runs all stages as one flow with a sub-flow each; returns the results, as in `data/metrics/run.json`."""
    check_run(session)
    session.healed(partial(_announce, session))

    def body() -> dict[str, Any]:
        for name in STAGES:
            _run_stage(session, name)
            if name == "calibrate":
                session.healed(partial(require_goal, session))
        results = write_results(session)
        session.engine.observer.found(results_finding(results))
        session.engine.observer.found(files_finding(session.workspace))
        return results

    return session.engine.stage("run", body)


def write_results(session: Session) -> dict[str, Any]:
    """Puts the stages' facts and timings together: `data/metrics/run.json`, and the page about it.

    It comes after the last stage, so that the time of that one is in it.
    """
    return session.healed(partial(_write_results, session), partial(_make_again, session))


def _make_again(session: Session, reader: str = "") -> None:
    """Makes what a stage reads without asking for it: what pruning left, and what recovery made of it."""
    prune_stage(session)
    if reader != "recovery":
        recovery(session)


def _announce(session: Session) -> None:
    """Refuses a run that memory or disk are too small for, and says what it will take."""
    outline = outline_run(session)
    require_fits(session, outline.needs)
    if session.engine.observer.is_shown:
        rates, is_measured = rates_at_hand(session)
        plan = outline.timed(rates)
        session.say(plan_line(plan, is_measured=is_measured))
        session.engine.observer.plan(plan.task_seconds)


def _write_results(session: Session) -> dict[str, Any]:
    facts: dict[str, Any] = {n: stage_facts(session, n) for n in STAGES if n not in ("model", "recovery", "benchmark")}
    facts["recovery"] = recovery_found(session)
    facts["benchmark"] = current_benchmark(session)
    # A stage that DVC took from its cache never ran here, as in an experiment or a new clone.
    timings = {name: found for name in STAGES if (found := read_json(session.workspace.timing_file(name)))}
    references = read_references(session.workspace) or {}
    results = build_results(session.store, references, facts, timings, provenance(session))
    write_json(session.workspace.metrics, results)
    curve = [{name: shot[name] for name in ("shot", "sparsity", "perplexity")} for shot in results["shots"]]
    write_json(session.workspace.curve, curve)
    write_report(session, results, references, timings)
    return results


def dense_evaluation(session: Session) -> Reference:
    """The evaluation of the dense model."""
    reference: Reference = session.engine.task(
        evaluation_task, session.context, session.dense, session.windows, "dense", name="dense/evaluation"
    )
    return reference


def _finish(session: Session, name: str, references: dict[str, Reference], facts: dict[str, Any]) -> None:
    value = {"references": {n: [r.key, r.digest] for n, r in sorted(references.items())}, "facts": facts}
    write_json(session.workspace.stage_file(name), value)


def write_timing(session: Session, name: str) -> None:
    """Writes down how a stage went, in `data/timings`."""
    tally = session.engine.tallies[name]
    write_json(
        session.workspace.timing_file(name),
        {
            "executed": tally.executed,
            "cached": tally.cached,
            "seconds": tally.seconds,
            "elapsed_s": tally.elapsed_s,
            "peak_memory_gib": process_peak_gib(),
            "engine": session.engine.name,
        },
    )
