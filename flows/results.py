"""`data/metrics/run.json`: what scripts can rely on (documented in docs/results.md)."""

import platform
from collections import defaultdict
from importlib.metadata import version
from typing import Any

from flows.recovery import RECOVERY
from flows.session import Session
from flows.shot import SHOT
from surgeon import __version__
from surgeon.store import Reference, Store
from tasks.spectra import SPECTRA
from tasks.training import TRAINING

_SIZES = ("perplexity", "parameters", "nonzero", "bytes", "linear_weights", "linear_nonzero")
_PACKAGES = ("torch", "transformers", "zarr", "prefect", "dvc", "numpy")


def provenance(session: Session) -> dict[str, Any]:
    """Where a result comes from: model, texts, seed, parameters, versions."""
    return {
        "model": {
            "source": session.checkpoint.source,
            "revision": session.checkpoint.revision,
            "digest": session.checkpoint.digest,
        },
        "parameters": {
            **session.params.model_dump(mode="json", exclude={"run"}),
            "prune": session.params.prune.resolved(),
        },
        "seed": session.params.seed,
        "device": session.context.device,
        "batch_size": session.context.batch_size,
        "batch_size_asked": session.params.run.batch_size,
        "precision": session.context.precision.value,
        "versions": {
            "surgeon": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def build_results(
    store: Store,
    references: dict[str, Reference],
    facts: dict[str, Any],
    timings: dict[str, Any],
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Puts the results of a run together.

    Args:
        store: gives the seconds each result took when it was computed, be it in this run or an earlier one.
        references: of the manifest, by readable name.
        facts: of each stage.
        timings: of each stage's last run.
        origin: see `provenance`.
    """
    seconds: dict[str, float] = defaultdict(float)
    by_shot: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, reference in references.items():
        if reference.kind in (SHOT.kind, RECOVERY.kind):
            continue  # made of the others
        spent = float(store.record(reference.key).get("seconds") or 0.0)
        seconds[reference.kind] += spent
        if name.startswith("shot-") and reference.kind != SPECTRA.kind:  # these are looked at, not part of the shot
            by_shot[name.split("/")[0]][reference.kind] += spent
    shots = [{**shot, "seconds": dict(by_shot[f"shot-{shot['shot']:02d}"])} for shot in facts["prune"]["shots"]]
    recovery = facts["recovery"]
    pruned = {**facts["prune"]["pruned"], **(recovery["after"] if recovery["accepted"] else {})}
    return {
        "dense": {name: facts["evaluate"][name] for name in _SIZES},
        "pruned": {**{name: pruned[name] for name in _SIZES}, "sparsity": pruned["sparsity"]},
        "window_length": facts["evaluate"]["length"],
        "windows": facts["evaluate"]["n_windows"],
        "overlap": facts["calibrate"]["overlap"],
        "shots": shots,
        "recovery": {**{n: v for n, v in recovery.items() if n != "state"}, **_speed(store, references, recovery)},
        "export": facts["export"],
        "benchmark": facts["benchmark"],
        "samples": facts["report"]["samples"],
        "seconds": {**seconds, "total": sum(seconds.values())},
        "elapsed_s": sum(t.get("elapsed_s", 0.0) for t in timings.values()),
        "peak_memory_gib": max((t.get("peak_memory_gib", 0.0) for t in timings.values()), default=0.0),
        "tasks": {
            "executed": sum(t.get("executed", 0) for t in timings.values()),
            "cached": sum(t.get("cached", 0) for t in timings.values()),
        },
        "weights_digest": recovery["weights_digest"],
        "provenance": {
            **origin,
            "calibration": facts["calibrate"]["calibration"],
            "evaluation": facts["calibrate"]["evaluation"],
        },
    }


def _speed(store: Store, references: dict[str, Reference], recovery: dict[str, Any]) -> dict[str, Any]:
    """Seconds, tokens a second and memory of recovery training, when it was computed."""
    records = [store.record(reference.key) for reference in references.values() if reference.kind == TRAINING.kind]
    seconds = sum(float(record.get("seconds") or 0.0) for record in records)
    if not seconds or "tokens" not in recovery:
        return {}
    peaks = [float(record.get("peak_memory_gib") or 0.0) for record in records]
    return {"seconds": seconds, "tokens_per_s": recovery["tokens"] / seconds, "peak_memory_gib": max(peaks)}
