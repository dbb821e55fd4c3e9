"""Runs in this process: pruning on a tiny model with a session, and what was executed for it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import make_tiny

from flows.engine import InlineEngine
from flows.params import Params
from flows.prune import prune
from flows.session import Session
from flows.shot import Shot
from flows.workspace import Workspace
from surgeon.store import Reference, Store
from tasks.context import ModelState
from tasks.weights import read_linears
from tests.flows.project import write_text


class StoppedError(Exception):
    """A run that was made to end early."""


class Recorder(InlineEngine):
    """Notes the tasks that were executed.

    Args:
        stop_after: number of executed tasks after which the run ends with `StoppedError`.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.ran: list[str] = []
        self._stop_after = stop_after

    def task(self, body: Callable[..., Any], *args: Any, name: str) -> Any:
        if len(self.ran) == self._stop_after:
            raise StoppedError(name)
        executed = self.tally.executed
        value = super().task(body, *args, name=name)
        if self.tally.executed > executed:
            self.ran.append(name)
        return value


@dataclass(frozen=True)
class Pruned:
    """What a run gave, and the names of the tasks that were executed for it."""

    session: Session
    shots: list[Shot]
    ran: list[str]

    def kinds(self, shot: str = "shot-") -> Counter[str]:
        """How many tasks of each kind were executed for a shot, or for all."""
        return Counter(name.rpartition("/")[2] for name in self.ran if name.startswith(shot))

    @property
    def references(self) -> dict[str, Reference]:
        return {name: reference for shot in self.shots for name, reference in shot.references.items()}

    @property
    def manifest(self) -> dict[str, Reference]:
        """The same with the records of the shots."""
        return self.references | {f"{shot.label}/shot": shot.stored for shot in self.shots}

    @property
    def digests(self) -> dict[str, str]:
        return {name: reference.digest for name, reference in self.references.items()}

    def linears(self, state: ModelState) -> dict[tuple[int, str], Any]:
        """The pruned linears of a state by block and name."""
        context = self.session.context
        blocks = range(context.model.n_blocks)
        return {(b, name): linear for b in blocks for name, linear in read_linears(context, state, b).items()}


class Runs:
    """Runs that share a store.

    Args:
        params: sections of params.yaml.
        root: of the project.
    """

    def __init__(self, params: dict[str, Any], root: Path) -> None:
        self.params, self.root = params, root
        self.store = Store(root / "data" / "store")

    def session(self, prune: dict[str, Any], stop_after: int | None = None, **run: Any) -> Session:
        prune = {"structure": "rows-and-columns"} | prune
        sections = self.params | {"prune": prune, "run": self.params["run"] | run}
        session = Session(Params.model_validate(sections), Workspace(self.root), Recorder(stop_after))
        session.check()
        return session

    def prune(self, stop_after: int | None = None, run: dict[str, Any] | None = None, **settings: Any) -> Pruned:
        """Runs all shots.

        Args:
            stop_after: see `Recorder`.
            run: changes of the section `run`.
            settings: the section `prune`; the structure is rows-and-columns unless it is given.
        """
        session = self.session(settings, stop_after, **(run or {}))
        assert isinstance(session.engine, Recorder)
        return Pruned(session, prune(session), session.engine.ran)


def small_inputs(folder: Path, n_blocks: int = 2) -> dict[str, Any]:
    """Sections of params.yaml for runs on a model of width 16, with biases, and texts of its own."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": n_blocks}
    make_tiny("gpt_neox", folder / "model", **shape)
    for seed, name in enumerate(("calibration", "evaluation"), start=1):
        write_text(folder / f"{name}.txt", seed)
    return {
        "model": {"source": str(folder / "model")},
        "calibrate": {"text": {"source": str(folder / "calibration.txt")}, "sequences": 6, "length": 32},
        "evaluate": {"text": {"source": str(folder / "evaluation.txt")}, "windows": 4, "length": 32},
        "benchmark": {"rounds": 0},
        "report": {"new_tokens": 4},
        "run": {"engine": "inline", "batch_size": 3, "blocks_per_group": n_blocks, "keep": "all"},
    }
