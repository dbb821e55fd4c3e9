"""The view of a block or of one of its linears: factors, damping, costs, what lives."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from flows.anatomy import block_costs, damping_facts, linear_facts, state_after, summarise
from flows.anatomy_facts import CostSummary, DampingFacts, LinearFacts
from flows.cost_samples import UNITS, Sample, block_shapes
from flows.engine import Engine
from flows.inspection.opening import choose_shot, open_store, read_manifest
from flows.shot import shot_label
from flows.spectra import can_be_had, spectrum_work
from flows.workspace import Workspace
from surgeon.curvature.spectrum import Spectrum
from surgeon.errors import InputError
from surgeon.store import Reference, Store
from tasks.context import LinearShape
from tasks.spectra import SpectrumWork, read_spectra, spectrum_task

SIDE_NAMES = {"A": "activations", "G": "gradients"}
_MOST_VALUES = 100_000
"""Costs in the JSON of one linear: those of rows, columns and units, but not of all single weights."""


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a linear, over what lived before the shot.

    Attributes:
        spectrum: without damping.
        damping: relative, in force; 0 where it was not inverted.
    """

    spectrum: Spectrum
    damping: float

    def to_json(self) -> dict[str, Any]:
        """Size, condition numbers, effective rank, damping and all eigenvalues."""
        spectrum = self.spectrum
        return {
            "n": int(spectrum.values.size),
            "condition": spectrum.condition(),
            "condition_damped": spectrum.condition(self.damping),
            "effective_rank": spectrum.effective_rank(),
            "mean_diagonal": spectrum.mean_diagonal,
            "damping": self.damping,
            "damping_added": spectrum.added(self.damping),
            "eigenvalues": spectrum.values.tolist(),
        }


@dataclass(frozen=True, eq=False)
class LinearView:
    """One linear.

    Attributes:
        facts: after the shot.
        damping: in the shot.
        factors: by side, "A" (activations) and "G" (gradients); those that were measured.
        costs: of its rows and columns, or of its weights; none where whole units go.
    """

    facts: LinearFacts
    damping: DampingFacts
    factors: dict[str, Factor]
    costs: list[Sample]


@dataclass(frozen=True, eq=False)
class BlockView:
    """One block, or one linear of it.

    Attributes:
        shot: from 1.
        block: index.
        linears: in module order.
        units: costs of its units, by sub-layer ("mlp", "attention"); none where no units go.
        n_units: units of the dense block, by sub-layer.
        missing: what cannot be said, as sentences.
        is_removed: whether the block is gone whole.
    """

    shot: int
    block: int
    linears: list[LinearView]
    units: dict[str, Sample] = field(default_factory=dict)
    n_units: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    is_removed: bool = False

    def live_units(self) -> dict[str, int]:
        """Units that live after the shot, by sub-layer."""
        return {kind: int((~sample.gone).sum()) for kind, sample in self.units.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, for scripts (docs/inspecting.md)."""
        live = self.live_units()
        return {
            "shot": self.shot,
            "block": self.block,
            "units": {
                kind: {"n_units": self.n_units[kind], "live": live[kind], **self._costs(sample)}
                for kind, sample in self.units.items()
            },
            "linears": [
                {
                    **asdict(view.facts),
                    "damping": {side: getattr(view.damping, side) for side in ("activations", "gradients")},
                    "escalations": view.damping.escalations,
                    "factors": {side: factor.to_json() for side, factor in view.factors.items()},
                    "costs": [self._costs(sample) for sample in view.costs],
                }
                for view in self.linears
            ],
            "missing": self.missing,
            "removed": self.is_removed,
        }

    def summary(self, sample: Sample) -> CostSummary:
        """What can be said of costs in a line."""
        return summarise(self.shot, self.block, [sample])[0]

    def _costs(self, sample: Sample) -> dict[str, Any]:
        few = sample.values.size <= _MOST_VALUES
        return {
            **asdict(self.summary(sample)),
            "values": sample.values.tolist() if few else None,
            "gone": sample.gone.tolist() if few else None,
        }


def inspect_block(workspace: Workspace, engine: Engine, block: int, linear: str | None, shot: int | None) -> BlockView:
    """Looks into one block; eigenvalues are computed once and then found in the store.

    Args:
        workspace: of the project.
        engine: runs the task.
        block: index.
        linear: its name in the block, or the end of it; None for all.
        shot: None for the last one whose eigenvalues can be had.

    Raises:
        InputError: no run yet, no such block, linear or shot, or the factors were dropped.
    """
    references, store = read_manifest(workspace), open_store(workspace)
    shapes = _require_block(references, choose_shot(references, shot), block)
    names = [shape.name for shape in shapes] if linear is None else [_require_linear(shapes, block, linear)]
    shot, work = _choose_work(store, references, block, shapes, shot)
    spectra: dict[str, dict[str, Spectrum]] = {}
    if work is not None:
        name = f"{work.label}/block-{block:02d}/spectra"
        spectra = read_spectra(store, engine.task(spectrum_task, workspace.store, work, name=name))
    missing: list[str] = []
    samples = block_costs(store, references, shot, block)
    if samples is None and f"{shot_label(shot)}/mask" in references:
        missing.append("costs: dropped from the store by run.keep")
    facts = {f.linear: f for f in linear_facts(store, references, shot, block, shapes, missing)}
    dampings = {d.linear: d for d in damping_facts(store, references, shot, block, shapes)}
    linears = [
        LinearView(
            facts=facts[name],
            damping=dampings[name],
            factors={side: _factor(s, dampings[name], side) for side, s in spectra.get(name, {}).items()},
            costs=[sample for sample in samples or () if sample.linear == name],
        )
        for name in names
    ]
    units = _units(samples or [])
    sizes = {kind: _n_units(references, block, kind) for kind in units}
    return BlockView(shot, block, linears, units, sizes, missing, block in state_after(references, shot).removed)


def _require_block(references: Mapping[str, Reference], shot: int, block: int) -> tuple[LinearShape, ...]:
    blocks = block_shapes(references, shot_label(shot))
    if block >= len(blocks):
        raise InputError(f"--block: got {block}, but the model has blocks 0 to {len(blocks) - 1}")
    return blocks[block]


def _require_linear(shapes: tuple[LinearShape, ...], block: int, linear: str) -> str:
    names = [shape.name for shape in shapes]
    found = [name for name in names if name == linear or name.endswith(f".{linear}")]
    if len(found) == 1:
        return found[0]
    near = get_close_matches(linear, [*names, *(name.rpartition(".")[2] for name in names)], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"--linear: block {block} has no linear {linear!r}; {hint}It has {', '.join(names)}")


def _choose_work(
    store: Store, references: Mapping[str, Reference], block: int, shapes: tuple[LinearShape, ...], shot: int | None
) -> tuple[int, SpectrumWork | None]:
    """The shot to look at, and what its eigenvalues are computed from; None for a curvature without factors."""
    last = choose_shot(references, shot)
    for number in [last] if shot else range(last, 0, -1):
        work = spectrum_work(references, number, block, shapes)
        if work is None or can_be_had(store, work):
            return number, work
    which = f"shot {shot}" if shot else "any shot"
    raise InputError(
        f"the factors of block {block} of {which} were dropped from the store (run.keep drops those of earlier shots); "
        "choose another --shot; a run with -S run.keep=all into another -S run.store keeps those of all shots"
    )


def _factor(spectrum: Spectrum, facts: DampingFacts, side: str) -> Factor:
    return Factor(spectrum, getattr(facts, SIDE_NAMES[side]) or 0.0)


def _units(samples: list[Sample]) -> dict[str, Sample]:
    """Samples that are of units, by sub-layer."""
    return {kind.value: sample for kind, of in UNITS.items() for sample in samples if sample.of == of}


def _n_units(references: Mapping[str, Reference], block: int, kind: str) -> int:
    """Units of the dense block: all of them are candidates of the first shot."""
    summary = references[f"{shot_label(1)}/block-{block:02d}/costs"].arrays[f"{kind}/costs"]
    return int(summary.partition("[")[2].rstrip("]"))
