"""What a shot is, whatever prunes: a step on a state that is found as a whole, or else made from its tasks.

Every method of pruning is a subclass of `PruningShot`; `flows/prune.py` picks it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.engine import Job
from flows.records import named_results
from flows.session import Session
from surgeon.store import Reference
from tasks.context import Context, LinearShape, ModelState
from tasks.evaluation import evaluation_task
from tasks.stage import Outcome, Product, Request, Stage, produce, readable

SHOT = Stage("shot", 5, ())
"""A finished shot: which state it ended with. It lets a finished shot be found with one look-up."""


@dataclass(frozen=True)
class Shot:
    """A finished shot.

    Attributes:
        number: 1 for the first.
        target: sparsity asked for after this shot.
        state: the model after it.
        references: all its results; the same however blocks were grouped.
        passed_on: hidden states and gradients that groups of blocks handed to each other.
        stored: its record.
        evaluation: perplexity and counts.
    """

    number: int
    target: float
    state: ModelState
    references: dict[str, Reference]
    passed_on: list[Reference]
    stored: Reference
    evaluation: Reference

    @property
    def record(self) -> dict[str, Any]:
        """Facts: sparsity, predicted cost, number of structures or weights removed, convergence."""
        return self.stored.attributes

    @property
    def label(self) -> str:
        """How the shot is called in labels and in the view."""
        return shot_label(self.number)


def shot_label(number: int) -> str:
    """Readable name of a shot."""
    return f"shot-{number:02d}"


@dataclass(frozen=True)
class Made:
    """What the tasks of a shot gave.

    Attributes:
        state: the model after it.
        references: all results by name.
        n_removed: structures, units, weights or blocks that are gone by this shot.
        facts: more of the record: "threshold", "kept", "predicted_cost", "convergence", "correction", or what else a
            method has to say; what is left out is null.
    """

    state: ModelState
    references: dict[str, Reference]
    n_removed: int
    facts: Mapping[str, Any]


_FACTS = ("threshold", "kept", "predicted_cost", "convergence", "correction")
"""Of every record; null where a method has no such thing."""


def blocks_to_json(blocks: Sequence[Sequence[LinearShape]]) -> list[dict[str, Any]]:
    """Linears of all blocks as plain JSON, blocks that are alike together."""
    kinds: dict[tuple[LinearShape, ...], list[int]] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(tuple(block), []).append(index)
    return [
        {"indices": indices, "linears": [[s.name, s.n_out, s.n_in, s.has_bias] for s in shapes]}
        for shapes, indices in kinds.items()
    ]


def blocks_from_json(kinds: Sequence[Mapping[str, Any]]) -> list[tuple[LinearShape, ...]]:
    """Linears of all blocks, as `blocks_to_json` wrote them down."""
    found = {i: tuple(LinearShape(*fields) for fields in kind["linears"]) for kind in kinds for i in kind["indices"]}
    return [found[index] for index in sorted(found)]


class PruningShot(ABC):
    """One shot on one state: holds what its steps share.

    Args:
        session: parameters and engine.
        state: the model before the shot.
        calibration: its sequences.
        number: of the shot, from 1.
        target: sparsity asked for after it.
    """

    def __init__(self, session: Session, state: ModelState, calibration: Reference, number: int, target: float) -> None:
        self.session = session
        self.context: Context = session.context
        self.store = session.store
        self.state = state
        self.calibration = calibration
        self.number = number
        self.target = target
        self.label = shot_label(number)
        self.blocks = range(self.context.model.n_blocks)

    def run(self) -> Shot:
        """Looks the whole shot up, or runs what is missing of it; then evaluates it."""
        finished = self._finished()
        if finished is not None:
            self.session.engine.reuse(self._task_names())
        references, stored = finished or self._make()
        state = self._state_of(stored)
        evaluation = self._task(
            evaluation_task, self.context, state, self.session.windows, self.label, name=f"{self.label}/evaluation"
        )
        references[f"{self.label}/evaluation"] = evaluation
        return Shot(self.number, self.target, state, references, self._passed_on(), stored, evaluation)

    def finished_state(self) -> ModelState | None:
        """The state after the shot if it is finished, without running anything."""
        finished = self._finished()
        return None if finished is None else self._state_of(finished[1])

    @abstractmethod
    def found(self) -> dict[str, tuple[int, int]]:
        """For each kind of task, how many results are there and how many there will be; runs nothing."""

    @abstractmethod
    def _parameters(self) -> dict[str, Any]:
        """All that the shot depends on but its inputs, target and batch size, versions of its stages included."""

    @abstractmethod
    def _run_tasks(self) -> Made:
        """Runs the tasks whose results are missing."""

    @abstractmethod
    def _task_names(self) -> list[str]:
        """Names of all tasks of the shot but its evaluation, as far as they always run."""

    def _passed_on(self) -> list[Reference]:
        """Large results that tasks handed to each other and that no name leads to; dropped once it is finished."""
        return []

    def _make(self) -> tuple[dict[str, Reference], Reference]:
        made = self._run_tasks()
        record = {
            **dict.fromkeys(_FACTS),
            **made.facts,
            "names": {name: ref.key for name, ref in made.references.items()},
            "state": made.state.to_json(),
            "blocks": blocks_to_json(self.context.model.blocks),
            "sparsity": 1.0 - self._n_live(made.state) / self.context.model.n_weights,
            "n_removed": made.n_removed,
        }
        return made.references, produce(self.context, self._request(), lambda: Product({}, record), self.store).value

    def _request(self) -> Request:
        parameters = {**self._parameters(), "target": self.target, "batch_size": self.context.batch_size}
        if (shards := self.session.params.run.shards) > 1:
            parameters["shards"] = shards
        inputs = {"weights": self.state.digest, "calibration": self.calibration.digest}
        return Request(SHOT, parameters, inputs, f"{self.label}/shot")

    def _finished(self) -> tuple[dict[str, Reference], Reference] | None:
        """All results by name and the record of the shot, if nothing is missing and its weights can be read."""
        found = self._lookup(self._request())
        references = None if found is None else named_results(self.store, found, self.state.checkpoint_digest)
        return None if found is None or references is None else (references, found)

    def _state_of(self, stored: Reference) -> ModelState:
        return ModelState.from_json(self.state.checkpoint_digest, stored.attributes["state"])

    def _n_live(self, state: ModelState) -> int:
        """Weights of decoder linears that live in a state."""
        total = 0
        for block in set(self.blocks) - set(state.removed):
            total += self._n_live_of_block(state, block)
        return total

    def _n_live_of_block(self, state: ModelState, block: int) -> int:
        update = state.update_of(block)
        reference = None if update is None else self.store.lookup(update.key)
        if reference is None:  # as in the checkpoint, or only planned
            return sum(shape.n_weights for shape in self.context.model.blocks[block])
        linears = reference.attributes["linears"].values()
        return int(sum(linear["n_live"] for linear in linears))

    def _lookup(self, request: Request) -> Reference | None:
        return self.store.lookup(request.key(self.context))

    def _readable(self, request: Request) -> bool:
        return readable(self.store, request.key(self.context)) is not None

    def _tasks(self, jobs: list[Job]) -> list[Any]:
        return self.session.engine.tasks(jobs)

    def _task(self, body: Callable[..., Outcome[Any]], *args: Any, name: str) -> Any:
        return self.session.engine.task(body, *args, name=name)
