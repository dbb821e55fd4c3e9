"""Dense and exported model side by side: as a stage of the pipeline, or any two models by the command."""

from typing import Any

from flows.session import Session
from flows.workspace import read_json
from surgeon.benchmarking import BenchmarkSettings, Side, describe_machine
from surgeon.errors import BenchmarkError, InputError
from surgeon.export import read_record
from surgeon.models import Checkpoint, resolve_model
from surgeon.models.checkpoint import CONFIG_NAME
from tasks.benchmark import benchmark_task

_WEIGHTS = ".safetensors"


def measure_export(session: Session, *, if_changed: bool) -> dict[str, Any]:
    """Measures the export of the last run beside the model it was made from.

    Args:
        session: with the parameters of that run.
        if_changed: whether figures of the same export, settings and machine are taken from the last measurement.

    Returns:
        The facts of the stage: `measured` says what was measured with which settings and where, `figures` what came
        out.

    Raises:
        InputError: nothing was exported yet.
    """
    measured = _measured_now(session)
    known = known_figures(session) if if_changed else None
    sides = (_side("dense", session.checkpoint), _own_export(session))
    figures = session.engine.task(benchmark_task, *sides, settings_of(session), session.say, known, name="benchmark")
    return {"measured": measured, "figures": figures}


def known_figures(session: Session) -> dict[str, Any] | None:
    """Figures of the last measurement, if it was of the same export with the same settings on the same machine.

    Raises:
        InputError: nothing was exported yet.
    """
    last = last_benchmark(session)
    if last is None or last["measured"] != _measured_now(session) or last["figures"]["failure"]:
        return None
    figures: dict[str, Any] = last["figures"]
    return figures


def _measured_now(session: Session) -> dict[str, Any]:
    return {
        **exported_now(session),
        "settings": session.params.benchmark.model_dump(mode="json"),
        "machine": describe_machine(session.device),
    }


def measure_models(session: Session, model: str | None, against: str | None) -> dict[str, Any]:
    """Measures two models and writes nothing down.

    Args:
        session: gives the settings, and what is not named.
        model: a model; None is the export of the last run.
        against: a model; None is the dense model of the parameters.

    Returns:
        The figures.
    """

    def side(name: str, source: str) -> Side:
        trust = session.params.model.trust_remote_code
        found = resolve_model(source, session.workspace.models, trust_remote_code=trust, progress=session.say)
        return _side(name, found)

    dense = side("dense", against) if against else _side("dense", session.checkpoint)
    pruned = side("pruned", model) if model else _own_export(session)
    figures: dict[str, Any] = session.stage(
        "benchmark",
        lambda: session.engine.task(benchmark_task, dense, pruned, settings_of(session), session.say, name="benchmark"),
    )
    return figures


def settings_of(session: Session) -> BenchmarkSettings:
    """The settings as the library names them."""
    given = session.params.benchmark
    return BenchmarkSettings(
        batch_sizes=given.batch_sizes,
        prompt=given.prompt,
        new_tokens=given.new_tokens,
        rounds=given.rounds,
        dtype=given.dtype and given.dtype.value,
        device=session.device,
        seed=session.params.seed,
    )


def exported_now(session: Session, other: str = "surgeon benchmark MODEL") -> dict[str, Any]:
    """What the exported weights and the dense model are, by their digests.

    Args:
        session: whose export.
        other: the command that needs none.

    Raises:
        InputError: nothing was exported yet.
    """
    record = read_record(session.workspace.export)
    if record is None:
        raise InputError(
            f"{session.workspace.export} holds no export to measure: run `surgeon export` first (`surgeon run` does "
            f"everything), or name a model: `{other}`"
        )
    files = {name: sha for name, sha in record["files"].items() if name.endswith(_WEIGHTS) or name == CONFIG_NAME}
    return {"export": files, "dense": session.checkpoint.digest}


def last_benchmark(session: Session) -> dict[str, Any] | None:
    """The facts that the stage found last; None if it has not run here."""
    found: dict[str, Any] | None = read_json(session.workspace.stage_file("benchmark"))
    return found and found["facts"]


def current_benchmark(session: Session) -> dict[str, Any] | None:
    """The last figures, if they are of what is exported now."""
    last = last_benchmark(session)
    if last is None:
        return None
    now = exported_now(session)
    return last["figures"] if all(last["measured"][name] == value for name, value in now.items()) else None


def raise_failure(figures: dict[str, Any]) -> None:
    """Fails where a measurement did.

    Raises:
        BenchmarkError: with the reason, and what to change.
    """
    if figures["failure"]:
        raise BenchmarkError(f"benchmark: {figures['failure']}")


def _side(name: str, checkpoint: Checkpoint) -> Side:
    return Side(name, checkpoint.path, checkpoint.trust_remote_code)


def _own_export(session: Session) -> Side:
    exported_now(session)
    return Side("pruned", session.workspace.export, session.params.model.trust_remote_code)
