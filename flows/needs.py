"""Memory and disk that a run needs, and what to lower where they are not there."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.dry_run import DryRun, Step
from flows.needs_gpu import Split, largest_solve_gib, split_by_body
from flows.params import EngineName
from flows.pool import Runner
from flows.session import Session
from flows.work import WorkModel
from flows.work_after import exported_bytes
from flows.work_recovery import recovery_gib
from surgeon.choices import Device
from surgeon.correction.adapters import AdapterSettings
from surgeon.errors import ParameterError, StoreError
from surgeon.memory import available_bytes, loads_by_block
from tasks.benchmark import benchmark_task
from tasks.block_times import block_times_task
from tasks.bonsai import prior_task, sub_model_task
from tasks.correction import correction_task
from tasks.costs import cost_task
from tasks.evaluation import evaluation_task, sample_task
from tasks.export import export_task
from tasks.layer_costs import block_cost_task
from tasks.layers import losses_task, similarity_task, sub_layer_task
from tasks.measuring import boundary_task, curvature_task
from tasks.recovery import recovered_task
from tasks.reducing import reduction_task
from tasks.refining import kronecker_terms_task, moments_task
from tasks.selection import dropped_task
from tasks.training import training_task
from tasks.update import update_task

GIB = 2**30
_OWN_GIB = {EngineName.PREFECT: 0.58, EngineName.INLINE: 0.48}
"""Resident memory of a process that has imported what a run needs (measured)."""
_CHILD_GIB = 0.36
"""That of a process with torch and transformers alone (measured)."""
_KEY_VALUE_COPIES = 2
"""Keys and values of a batch while a cache grows: before and after a token is added."""
_SIDE_BY_SIDE = (
    *(boundary_task, curvature_task, reduction_task, cost_task, update_task),
    *(sub_model_task, block_cost_task),
)
"""Tasks that workers run at the same time."""
_FLOAT32 = 4
_EXPORTED_COPIES = 2
"""A block while it is exported: as it was stored in float32, and cut to what is written."""
_PASSES = (curvature_task, moments_task, kronecker_terms_task)


@dataclass(frozen=True)
class MemoryNeeds:
    """Peak resident memory, GiB.

    Attributes:
        idle: of the run's own process before it does anything.
        by_stage: of the run's own process, by row of the plan.
        children: of the processes it starts, by what for: all that run at the same time together.
        on_gpu: memory of a GPU, by row of the plan; empty where none is used.
    """

    idle: float
    by_stage: Mapping[str, float]
    children: Mapping[str, float]
    on_gpu: Mapping[str, float] = field(default_factory=dict)

    @property
    def own(self) -> float:
        """The most that the run's own process takes."""
        return max(self.by_stage.values(), default=self.idle)


@dataclass(frozen=True)
class DiskNeed:
    """Room that must be free somewhere.

    Attributes:
        path: directory on the file system in question.
        what: for people.
        n_bytes: most that are taken at any time beyond what is taken now.
    """

    path: Path
    what: str
    n_bytes: int


@dataclass(frozen=True)
class Needs:
    """What a run needs."""

    memory: MemoryNeeds
    disk: tuple[DiskNeed, ...]

    def to_json(self) -> dict[str, Any]:
        """For scripts (docs/planning.md)."""
        return {
            "memory_gib": {"own": self.memory.own, **self.memory.children, **self._gpu()},
            "disk_gib": {need.what: need.n_bytes / GIB for need in self.disk},
        }

    def _gpu(self) -> dict[str, float]:
        return {"gpu": max(self.memory.on_gpu.values())} if self.memory.on_gpu else {}


def memory_needs(session: Session, steps: Sequence[Step]) -> MemoryNeeds:
    """The peak of each row of the plan, and of the processes that are started."""
    by_stage: dict[str, float] = {}
    children: dict[str, float] = {}
    on_gpu: dict[str, float] = {}
    needs, export_bytes = _by_body(session), exported_bytes(session)
    splits, is_gpu = split_by_body(session), session.device == Device.CUDA
    idle = _OWN_GIB[session.params.run.engine]
    for step in steps:
        row, whole = step.row, needs.get(step.body, lambda: 0.0)()
        split = splits[step.body]() if step.body in splits else Split(whole, whole if is_gpu else 0.0)
        run = session.params.run
        at_once = run.workers if step.body in _SIDE_BY_SIDE and run.runner is Runner.THREADS else 1
        elsewhere = step.body in _SIDE_BY_SIDE and run.runner is not Runner.THREADS
        by_stage[row] = max(by_stage.get(row, 0.0), idle + (0.0 if elsewhere else at_once * split.host))
        if elsewhere and run.cluster is None:
            children["workers"] = max(children.get("workers", 0.0), run.workers * (_CHILD_GIB + split.host))
        if split.gpu:
            on_gpu[row] = max(on_gpu.get(row, 0.0), split.gpu)
        if step.body is export_task:
            children["load back"] = _CHILD_GIB + _loaded_back_gib(session, export_bytes)
        if step.body is benchmark_task and session.params.benchmark.rounds:
            children["benchmark"] = _benchmark_gib(session, export_bytes)
    return MemoryNeeds(idle, by_stage, children, on_gpu)


def _by_body(session: Session) -> dict[Any, Callable[[], float]]:
    estimate = session.memory_estimate(session.context.blocks_per_group)
    model = session.model
    whole = model.n_parameters * model.torch_dtype.itemsize / GIB
    solve = largest_solve_gib(session)
    return {
        **dict.fromkeys(_PASSES, lambda: estimate.total_gib),
        correction_task: lambda: session.memory_estimate(model.n_blocks).total_gib + _adapters_gib(session),
        evaluation_task: lambda: estimate.evaluation_gib,
        cost_task: lambda: solve,
        update_task: lambda: solve,
        prior_task: lambda: _whole_pass_gib(session),
        sub_model_task: lambda: _whole_pass_gib(session),
        similarity_task: lambda: estimate.evaluation_gib + _last_states_gib(session),
        sub_layer_task: lambda: estimate.evaluation_gib,
        losses_task: lambda: estimate.evaluation_gib + _branches_gib(session),
        block_cost_task: lambda: solve,
        dropped_task: lambda: solve,
        sample_task: lambda: whole,
        block_times_task: lambda: estimate.evaluation_gib,
        training_task: lambda: recovery_gib(session),
        recovered_task: lambda: recovery_gib(session),
        export_task: lambda: estimate.trunk / GIB + _EXPORTED_COPIES * _FLOAT32 * _largest_block(session) / GIB,
    }


def _largest_block(session: Session) -> int:
    """Weights of the largest block."""
    return max(sum(s.n_weights for s in block) for block in session.model.blocks)


def _whole_pass_gib(session: Session) -> float:
    """A forward pass with all of the model in memory."""
    return session.memory_estimate(session.model.n_blocks).evaluation_gib


def _last_states_gib(session: Session) -> float:
    """The hidden state of every sequence's last token at every block, twice, in float64."""
    model = session.model
    return 2 * 8 * session.params.calibrate.sequences * (model.n_blocks + 1) * model.width / GIB


def _branches_gib(session: Session) -> float:
    """Hidden states of all sequences once for each block of a group, as they enter and leave the groups after it."""
    model, given, groups = session.model, session.params.calibrate, session.context.groups
    if len(groups) == 1:
        return 0.0
    return 2 * 4 * len(groups[0]) * given.sequences * given.length * model.width / GIB


def _adapters_gib(session: Session) -> float:
    """Corrected weights of all linears in float32, a mask of each, and adapters with two moments and a gradient."""
    model, given = session.model, session.adapters
    rank = given.rank if isinstance(given, AdapterSettings) else 0
    sides = sum(s.n_out + s.n_in for block in model.blocks for s in block)
    return (5 * model.n_weights + 16 * rank * sides) / GIB


def _loaded_back_gib(session: Session, export_bytes: int) -> float:
    """The export, or what is outside its blocks and the largest of them where it is large beside the memory."""
    if not loads_by_block(export_bytes):
        return export_bytes / GIB
    model = session.model
    return export_bytes / GIB * (model.n_parameters - model.n_weights + _largest_block(session)) / model.n_parameters


def _benchmark_gib(session: Session, export_bytes: int) -> float:
    """Both models in processes of their own, and what the largest batch takes in the dense one."""
    model, given = session.model, session.params.benchmark
    itemsize = model.torch_dtype.itemsize
    largest = max(given.batch_sizes)
    tokens = largest * (given.prompt + given.new_tokens)
    keys = 0
    for block in model.blocks:
        narrow = sorted(s.n_out for s in block)
        keys += _KEY_VALUE_COPIES * 2 * narrow[0] if narrow else 0
    widest = max((s.n_out for block in model.blocks for s in block), default=0)
    batch = tokens * (keys + 4 * widest) * itemsize + 4 * largest * model.n_vocabulary
    return 2 * _CHILD_GIB + (model.n_parameters * itemsize + export_bytes + 2 * batch) / GIB


def disk_needs(model: WorkModel, dry: DryRun) -> tuple[DiskNeed, ...]:
    """The most that the store grows at any time of the run, and the export."""
    store, now, most = dry.store, 0, 0
    for change in dry.store.changes:
        block = int(change.label.partition("block-")[2][:2] or 0) if "block-" in change.label else 0
        size = model.object_bytes(change.kind, block)
        now += size if change.is_written else -size
        most = max(most, now)
    session = model.session
    needs = [DiskNeed(store.root, "results", most)]
    if any(step.body is export_task for step in dry.steps):
        needs.append(DiskNeed(session.workspace.data, "export", exported_bytes(session)))
    return tuple(needs)


def require_memory(session: Session, needs: MemoryNeeds, available_gib: float | None = None) -> None:
    """Refuses a run that takes more memory than there is.

    Args:
        session: `run.memory_gib` of its parameters, if given, is the limit of what runs block by block, of the GPU's
            memory where there is one; it also says how much of that is free.
        needs: of the run.
        available_gib: what is available; None asks the system.

    Raises:
        ParameterError: naming what needs how much, and what to lower.
    """
    given = session.params.run.memory_gib
    if needs.on_gpu:
        _require_gpu_memory(needs, given, session.free_bytes(session.device) / GIB)
        given = None
    available = _available_gib() if available_gib is None else available_gib
    here = f"{available:.1f} GiB are available"
    for stage, need in needs.by_stage.items():
        bound = given is not None and stage in _ADVICE
        limit = given if bound and given is not None else available
        if need - needs.idle > limit:
            raise ParameterError(
                f"run.memory_gib: {stage} needs about {_gib(need - needs.idle)} GiB, but "
                f"{f'the budget is {given:g} GiB' if bound else here}. {(_ADVICE | _WHOLE_ADVICE).get(stage, _WHOLE)}"
            )
    for name, need in needs.children.items():
        if need > available:
            raise ParameterError(f"{name} needs about {_gib(need)} GiB, but {here}. {_CHILD_ADVICE[name]}")


def _require_gpu_memory(needs: MemoryNeeds, given: float | None, free_gib: float) -> None:
    for stage, need in needs.on_gpu.items():
        bound = given is not None and stage in _ADVICE
        limit = given if bound and given is not None else free_gib
        if need > limit:
            there = f"the budget is {limit:g} GiB" if bound else f"{limit:.1f} GiB of it are free"
            raise ParameterError(
                f"run.memory_gib: {stage} needs about {_gib(need)} GiB of the GPU's memory, but {there}. "
                f"{(_ADVICE | _WHOLE_ADVICE).get(stage, _WHOLE)}"
            )


def _gib(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _available_gib() -> float:
    return available_bytes() / GIB


_SOLVED = "The largest linear of a block is solved as a whole: give more memory."
_BATCH = "Lower run.batch_size or {}.length, or give more memory."
_ADVICE = {
    "evaluate": _BATCH.format("evaluate"),
    "prune: curvature": _BATCH.format("calibrate"),
    "prune: costs": _SOLVED,
    "prune: update": _SOLVED,
    "prune: evaluation": _BATCH.format("evaluate"),
    "prune: prior": _BATCH.format("calibrate"),
    "prune: sub-model": _BATCH.format("calibrate"),
    "prune: similarity": _BATCH.format("calibrate"),
    "prune: sub-layer-similarity": _BATCH.format("calibrate"),
    "prune: removal-losses": _BATCH.format("calibrate"),
    "prune: block-cost": _SOLVED,
}
_WHOLE_ADVICE = {
    "recovery": "The whole model is in memory there with its gradients and two moments: lower recovery.micro_batch or "
    "recovery.length, use recovery.method=lora, which has few moments, or drop terms that need the dense model, or "
    "give more memory."
}
"""Of what does not run block by block, so that run.memory_gib does not bound it."""
_WHOLE = "The whole model is in memory there: use model.dtype=bfloat16 or prune.correction=none, or give more memory."
_CHILD_ADVICE = {
    "workers": "Each of run.workers holds a group of blocks: lower run.workers or run.blocks_per_group, or give more "
    "memory.",
    "load back": "The export is loaded whole to be checked: use export.dtype=bfloat16, or give more memory.",
    "benchmark": "Both models are held at once: lower benchmark.batch_sizes or benchmark.prompt, or leave the "
    "measurement out with benchmark.rounds=0.",
}


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that a path is or will be on."""
    return shutil.disk_usage(_existing(path)).free


def require_disk(needs: Iterable[DiskNeed], free: Callable[[Path], int] = free_bytes) -> None:
    """Refuses a run whose results will not fit.

    Args:
        needs: of the run; those on one file system are added up.
        free: free bytes of the file system of a path.

    Raises:
        StoreError: naming path, needed and free space, and what to lower.
    """
    by_device: dict[int, list[DiskNeed]] = {}
    for need in needs:
        by_device.setdefault(_existing(need.path).stat().st_dev, []).append(need)
    for group in by_device.values():
        path = group[0].path
        needed, there = sum(need.n_bytes for need in group), free(path)
        if needed > there:
            parts = ", ".join(f"{need.what} {need.n_bytes / GIB:.2f}" for need in group)
            raise StoreError(
                f"{path} needs {needed / GIB:.2f} GiB ({parts}), but only {there / GIB:.2f} GiB are free. Keep less "
                "(run.keep=none, fewer prune.shots), put the results on a larger disk (run.store), or free some space."
            )


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
