"""One shot: curvature → costs → mask → update → evaluation.

Everything is asked for by key, and only what a missing result needs is computed: a finished shot is one look-up; in an
unfinished one, factors that were dropped are made again only for blocks whose costs or update are missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flows.session import Session
from surgeon.pruning.damped import Damping
from surgeon.store import Reference, Store
from tasks.context import Context, ModelState, StoredBlock
from tasks.curvature import BOUNDARY, GRADIENT
from tasks.curvature import INPUT_FACTORS as FACTORS
from tasks.curvature import statistic_request as pass_request
from tasks.evaluation import evaluation_task
from tasks.measuring import boundary_task, curvature_task
from tasks.pruning import (
    COSTS,
    MASK,
    UPDATE,
    MaskRule,
    cost_request,
    cost_task,
    mask_request,
    mask_task,
    update_request,
    update_task,
)
from tasks.stage import Outcome, Product, Request, Stage, produce, readable

SHOT = Stage("shot", 1, ())
"""A finished shot: which updates it ended with. It lets a finished shot be found with one look-up."""


@dataclass(frozen=True)
class Shot:
    """A finished shot.

    Attributes:
        number: 1 for the first.
        target: sparsity asked for after this shot.
        state: the model after it.
        references: all its results; the same however blocks were grouped.
        passed_on: hidden states and gradients that groups of blocks handed to each other.
        record: facts (sparsity, predicted cost, number of structures removed).
        evaluation: perplexity and counts.
    """

    number: int
    target: float
    state: ModelState
    references: dict[str, Reference]
    passed_on: list[Reference]
    record: dict[str, Any]
    evaluation: Reference

    @property
    def label(self) -> str:
        """How the shot is called in labels and in the view."""
        return shot_label(self.number)


def shot_label(number: int) -> str:
    """Readable name of a shot."""
    return f"shot-{number:02d}"


class ShotRun:
    """One shot on one state: holds what its steps share.

    Args:
        session: parameters and engine.
        state: the model before the shot.
        calibration: its sequences.
        number: of the shot, from 1.
        target: sparsity asked for after it.
    """

    def __init__(self, session: Session, state: ModelState, calibration: Reference, number: int, target: float) -> None:
        pruning = session.params.prune
        self.session = session
        self.context: Context = session.context
        self.store = Store(session.context.store)
        self.state = state
        self.calibration = calibration
        self.number = number
        self.label = shot_label(number)
        self.damping = Damping(pruning.damping.activations, pruning.damping.gradients)
        self.rule = MaskRule(target, pruning.structure, pruning.ranking)
        self.blocks = range(self.context.model.n_blocks)

    def run(self) -> Shot:
        """Looks the whole shot up, or runs what is missing of it; then evaluates it."""
        record = self._finished()
        if record is not None:
            references = {name: ref for name, key in record["names"].items() if (ref := self.store.lookup(key))}
            self.session.engine.reuse(self._task_names())
        else:
            references, record = self._run_tasks()
        state = self.state.after([references[f"{self.label}/block-{b:02d}/update"] for b in self.blocks])
        evaluation = self._task(
            evaluation_task, self.context, state, self.session.windows, self.label, name=f"{self.label}/evaluation"
        )
        references[f"{self.label}/evaluation"] = evaluation
        return Shot(self.number, self.rule.target, state, references, self._passed_on(), record, evaluation)

    def curvature(self) -> list[Reference]:
        """Factors of all blocks, computed where they are missing."""
        return self._factors(set(self.blocks))

    def finished_state(self) -> ModelState | None:
        """The state after the shot if it is finished, without running anything."""
        record = self._finished()
        if record is None:
            return None
        return ModelState(self.state.checkpoint_digest, tuple(StoredBlock(*update) for update in record["updates"]))

    def found(self) -> dict[str, tuple[int, int]]:
        """For each kind of task, how many results are there and how many there will be; runs nothing."""
        n = len(self.blocks)
        counts = {"factors": (0, n), "costs": (0, n), "mask": (0, 1), "update": (0, n)}
        factors = [self._lookup_factors(b) for b in self.blocks]
        counts["factors"] = (sum(ref is not None for ref in factors), n)
        costs = [self._lookup(self._cost_request(b, ref)) if ref else None for b, ref in enumerate(factors)]
        counts["costs"] = (sum(ref is not None for ref in costs), n)
        if any(ref is None for ref in costs):
            return counts
        mask = self._lookup(mask_request([ref for ref in costs if ref], self.rule, self.label))
        if mask is None:
            return counts
        updates = [self._lookup(self._update_request(b, ref, mask)) for b, ref in enumerate(factors) if ref]
        return counts | {"mask": (1, 1), "update": (sum(ref is not None for ref in updates), n)}

    def _finished(self) -> dict[str, Any] | None:
        """The record of the shot if it is there and its weights can be read."""
        found = self._lookup(self._request())
        if found is None or not all(self.store.has_payload(key) for key, _ in found.attributes["updates"]):
            return None
        return dict(found.attributes)

    def _lookup(self, request: Request) -> Reference | None:
        return self.store.lookup(request.key(self.context))

    def _cost_request(self, block: int, factors: Reference) -> Request:
        cost = self.session.params.prune.cost
        return cost_request(self.state, block, factors, self.damping, cost, self.label)

    def _update_request(self, block: int, factors: Reference, mask: Reference) -> Request:
        rule = self.session.params.prune.update
        return update_request(self.state, block, factors, mask, self.damping, rule, self.label)

    def _request(self) -> Request:
        parameters = {
            **self.session.params.prune.model_dump(exclude={"shots", "sparsity", "fresh_calibration"}),
            "target": self.rule.target,
            "batch_size": self.context.batch_size,
            "versions": [stage.version for stage in (FACTORS, COSTS, MASK, UPDATE)],
        }
        inputs = {"weights": self.state.digest, "calibration": self.calibration.digest}
        return Request(SHOT, parameters, inputs, f"{self.label}/shot")

    def _run_tasks(self) -> tuple[dict[str, Reference], dict[str, Any]]:
        factors = self._factors({b for b in self.blocks if self._lookup_factors(b) is None}, first=True)
        pruning = self.session.params.prune
        self._factors(self._missing([self._cost_request(b, factors[b]) for b in self.blocks]))
        costs = [
            self._task(
                cost_task,
                self.context,
                self.state,
                b,
                factors[b],
                self.damping,
                pruning.cost,
                self.label,
                name=f"{self.label}/block-{b:02d}/costs",
            )
            for b in self.blocks
        ]
        mask = self._task(mask_task, self.context, costs, self.rule, self.label, name=f"{self.label}/mask")
        self._factors(self._missing([self._update_request(b, factors[b], mask) for b in self.blocks]))
        updates = [
            self._task(
                update_task,
                self.context,
                self.state,
                b,
                factors[b],
                mask,
                self.damping,
                pruning.update,
                self.label,
                name=f"{self.label}/block-{b:02d}/update",
            )
            for b in self.blocks
        ]
        names = {f"{self.label}/mask": mask}
        for b in self.blocks:
            place = f"{self.label}/block-{b:02d}"
            names |= {f"{place}/factors": factors[b], f"{place}/costs": costs[b], f"{place}/update": updates[b]}
        record = {
            "names": {name: ref.key for name, ref in names.items()},
            "updates": [[ref.key, ref.digest] for ref in updates],
            **{name: mask.attributes[name] for name in ("sparsity", "threshold", "n_removed")},
            "predicted_cost": sum(
                linear["predicted_cost"] for ref in updates for linear in ref.attributes["linears"].values()
            ),
        }
        produce(self.context, self._request(), lambda: Product({}, record))
        return names, record

    def _task_names(self) -> list[str]:
        """Names of all tasks of the shot but its evaluation, as far as they always run."""
        groups = [f"{self.label}/block-{group.start:02d}/curvature" for group in self.context.groups]
        blocks = [f"{self.label}/block-{b:02d}/{kind}" for kind in ("costs", "update") for b in self.blocks]
        return [*groups, *blocks, f"{self.label}/mask"]

    def _lookup_factors(self, block: int) -> Reference | None:
        return self._lookup(pass_request(self.context, FACTORS, self.state, self.calibration, block, self.label))

    def _missing(self, requests: list[Request]) -> set[int]:
        """Blocks whose result has to be computed, so that they need their factors' payload."""
        return {b for b, request in enumerate(requests) if readable(self.store, request.key(self.context)) is None}

    def _factors(self, needed: set[int], first: bool = False) -> list[Reference]:
        """Makes sure that the factors of some blocks can be read; returns the references of all that exist."""
        for group in reversed(self.context.groups):
            if all(self._has(FACTORS, b) for b in group if b in needed):
                if first:
                    self.session.engine.reuse([f"{self.label}/block-{group.start:02d}/curvature"])
            else:
                self._curvature(group)
        return [ref for b in self.blocks if (ref := self._lookup_factors(b)) is not None]

    def _passed_on(self) -> list[Reference]:
        """Hidden states and gradients that groups have handed to each other."""
        requests = [
            pass_request(self.context, stage, self.state, self.calibration, group.start, self.label)
            for stage in (BOUNDARY, GRADIENT)
            for group in self.context.groups[1:]
        ]
        return [reference for request in requests if (reference := self._lookup(request)) is not None]

    def _curvature(self, group: range) -> None:
        """Runs the curvature pass of one group, after whatever leads there and is missing."""
        groups = self.context.groups
        if group.start:
            self._boundary(groups[groups.index(group) - 1])
        if group.stop < len(self.blocks) and not self._has(GRADIENT, group.stop):
            self._curvature(groups[groups.index(group) + 1])
        self._task(
            curvature_task,
            self.context,
            self.state,
            self.calibration,
            group,
            self.label,
            name=f"{self.label}/block-{group.start:02d}/curvature",
        )

    def _boundary(self, group: range) -> None:
        """Makes the hidden states that leave a group, from those that enter it."""
        if self._has(BOUNDARY, group.stop):
            return
        if group.start:
            groups = self.context.groups
            self._boundary(groups[groups.index(group) - 1])
        self._task(
            boundary_task,
            self.context,
            self.state,
            self.calibration,
            group,
            self.label,
            name=f"{self.label}/block-{group.stop:02d}/boundary",
        )

    def _has(self, stage: Stage, block: int) -> bool:
        request = pass_request(self.context, stage, self.state, self.calibration, block, "")
        return self.store.has_payload(request.key(self.context))

    def _task(self, body: Callable[..., Outcome[Any]], *args: Any, name: str) -> Any:
        return self.session.engine.task(body, *args, name=name)
