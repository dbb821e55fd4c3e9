"""A run without its work: the flows themselves go through the store, and what they would execute is noted.

Results that are not there are promised. Everything made from a promise counts as missing, so the tasks that a run
executes are known exactly but where a result turns out the same as one that is there (a mask of another target, say,
that leaves some blocks as they were): then fewer are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flows.engine import Engine
from surgeon.curvature.spec import Statistic
from surgeon.store import PlannedStore, promised_digest
from tasks.block_times import block_times_request, block_times_task
from tasks.bonsai import (
    SUB_MODEL,
    prior_request,
    prior_task,
    ranked_mask_request,
    ranked_mask_task,
    ranking_request,
    ranking_task,
    sub_model_request,
    sub_model_task,
)
from tasks.calibration import sequences_request, sequences_task, windows_request, windows_task
from tasks.context import Context
from tasks.corpus import corpus_request, corpus_task
from tasks.correction import correction_requests, correction_task
from tasks.costs import cost_request, cost_task
from tasks.curvature import boundary_request
from tasks.evaluation import evaluation_request, evaluation_task, sample_request, sample_task
from tasks.layer_costs import BLOCK_COST, block_cost_request, block_cost_task
from tasks.layers import (
    REMOVAL_LOSSES,
    losses_request,
    losses_task,
    similarity_request,
    similarity_task,
    sub_layer_request,
    sub_layer_task,
)
from tasks.mask import MASK, mask_request, mask_task
from tasks.measuring import boundary_task, curvature_requests, curvature_task
from tasks.recovery import recovered_requests, recovered_task
from tasks.reducing import reduction_requests, reduction_task
from tasks.refining import kronecker_terms_task, moments_task, refining_requests
from tasks.selection import (
    DROPPED,
    SELECTION,
    dropped_requests,
    dropped_task,
    promised_selection,
    selection_request,
    selection_task,
)
from tasks.spectra import Here, spectrum_request, spectrum_task
from tasks.stage import Outcome, Request, Site, readable
from tasks.training import training_request, training_task
from tasks.update import UPDATE, update_request, update_task

T = TypeVar("T")
Requests = Callable[..., Iterable[Request]]


@dataclass(frozen=True)
class Step:
    """A task that a run will execute.

    Attributes:
        name: of the task.
        stage: of the pipeline.
        body: the task.
        arguments: what it is called with, after the context; results it reads may be promises.
    """

    name: str
    stage: str
    body: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def row(self) -> str:
        """The row of a plan that it belongs to."""
        return row_of(self.stage, self.name)


def row_of(stage: str, name: str) -> str:
    """The row of a plan that a task belongs to: its stage, and of `prune` the kind of task."""
    if stage != "prune":
        return stage
    kind = name.rpartition("/")[2]
    kind = SUB_MODEL.kind if kind.startswith(f"{SUB_MODEL.kind}-") else kind
    return f"prune: {'curvature' if kind in _PASSES else kind}"


_PASSES = ("boundary", "reduction", "moments", "kronecker-terms", "loss-gradient")


@dataclass
class DryRun:
    """What a run will do.

    Attributes:
        store: the store as the run will leave it.
        steps: tasks that it executes, in order.
        found: names of tasks whose results are there, by stage.
    """

    store: PlannedStore
    steps: list[Step] = field(default_factory=list)
    found: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(
        self, stage: str, name: str, body: Callable[..., Any], arguments: tuple[Any, ...], *, missing: bool
    ) -> None:
        """Notes a task."""
        if missing:
            self.steps.append(Step(name, stage, body, arguments))
        elif not any(step.name == name for step in self.steps):
            self.found.setdefault(stage, {})[name] = None


class DryEngine(Engine):
    """Looks results up, and promises those that are missing."""

    name = "dry"

    def __init__(self, dry: DryRun) -> None:
        super().__init__()
        self.dry = dry

    def task(self, body: Callable[..., Outcome[T]], *args: Any, name: str) -> Any:
        """Notes whether a task has anything to do; returns the references it will return."""
        context: Site = Here(args[0]) if body is spectrum_task else args[0]
        single, requests = _requests(self.dry.store, body, args)
        references = []
        missing = False
        for request in requests:
            key = request.key(context)
            found = readable(self.dry.store, key)
            missing |= found is None
            references.append(
                found or self.dry.store.promise(key, request.stage.kind, _attributes(request, context), request.label)
            )
        self.dry.add(self._stages[-1], name, body, args[1:], missing=missing)
        return references[0] if single else references

    def reuse(self, names: list[str]) -> None:
        """Notes tasks that a finished result stands for."""
        for name in names:
            self.dry.found.setdefault(self._stages[-1], {})[name] = None

    def _run_stage(self, name: str, body: Callable[[], T]) -> T:  # noqa: ARG002
        return body()

    def _run_task(self, body: Callable[..., Outcome[T]], args: tuple[Any, ...], name: str) -> Outcome[T]:
        raise NotImplementedError(f"{name}: nothing is computed in a dry run")


_SINGLE: Mapping[Callable[..., Any], Callable[..., Request]] = {
    sequences_task: sequences_request,
    windows_task: lambda context, spec, _calibration: windows_request(context, spec),
    block_times_task: block_times_request,
    boundary_task: lambda context, measured, group: boundary_request(context, measured, group.stop),
    cost_task: lambda _context, work: cost_request(work),
    mask_task: lambda _context, costs, rule, label: mask_request(costs, rule, label),
    update_task: lambda _context, work, removal: update_request(work, removal),
    evaluation_task: evaluation_request,
    sample_task: sample_request,
    spectrum_task: lambda _store, work: spectrum_request(work),
    similarity_task: similarity_request,
    sub_layer_task: sub_layer_request,
    losses_task: losses_request,
    block_cost_task: lambda _context, work: block_cost_request(work),
    corpus_task: corpus_request,
    prior_task: prior_request,
    sub_model_task: sub_model_request,
    ranking_task: ranking_request,
    ranked_mask_task: lambda _context, work, ranking: ranked_mask_request(work, ranking),
    training_task: training_request,
    selection_task: lambda _context, rule, measured, label: selection_request(rule, measured, label),
}
"""Tasks of one result, and the request for it from the same arguments."""


def _requests(store: PlannedStore, body: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, list[Request]]:
    """Whether a task has one result, and what it will ask the store for."""
    if body in _SINGLE:
        return True, [_SINGLE[body](*args)]
    if body is curvature_task:
        return False, list(curvature_requests(*args).values())
    if body is reduction_task:
        return False, list(reduction_requests(*args).values())
    if body is correction_task:
        return False, correction_requests(*args)
    if body is recovered_task:
        return False, list(recovered_requests(*args).values())
    if body is dropped_task:
        return False, dropped_requests(*args[1:])
    second = {moments_task: Statistic.MOMENTS, kronecker_terms_task: Statistic.KRONECKER_TERMS}
    context, measured, work = args
    return False, list(refining_requests(context, measured, second[body], work.blocks, store).values())


def _attributes(request: Request, context: Site) -> dict[str, Any]:
    """What flows read of a result before another task does."""
    if request.stage is MASK and isinstance(context, Context):
        blocks = [promised_digest(f"{request.key(context)}-{block}") for block in range(context.model.n_blocks)]
        return {"blocks": blocks, "n_removed": 0, "threshold": None}
    if request.stage is SELECTION:
        return promised_selection(request.parameters)
    if request.stage is REMOVAL_LOSSES and isinstance(context, Context):
        return {"losses": [0.0] * context.model.n_blocks}
    if request.stage is BLOCK_COST:
        return {"score": 0.0}
    return {"linears": {}} if request.stage in (UPDATE, DROPPED) else {}
