"""Which eigenvalues of a run can be had, what they are computed from, and those that every run makes."""

from collections.abc import Mapping, Sequence

from flows.session import Session
from flows.shot import shot_label
from surgeon.curvature.spec import Statistic
from surgeon.store import Reference, Store
from tasks.context import LinearShape
from tasks.spectra import SpectrumWork, find_spectra, spectrum_task


def spectrum_work(
    references: Mapping[str, Reference], shot: int, block: int, shapes: tuple[LinearShape, ...]
) -> SpectrumWork | None:
    """The work of `tasks.spectra.spectrum_task` for one block; None if its curvature has no factors.

    Args:
        references: of data/manifest.json, by readable name.
        shot: from 1.
        block: index.
        shapes: of the block's linears.
    """
    label = shot_label(shot)
    place = f"{label}/block-{block:02d}"
    found = {s: references[name] for s in Statistic if (name := f"{place}/{s.value}") in references}
    costs = references.get(f"{place}/costs")
    live = costs if costs is not None and "live_rows" in costs.arrays else _after(references, shot - 1, block)
    work = SpectrumWork(block, shapes, found, live, label)
    return work if work.factors else None


def can_be_had(store: Store, work: SpectrumWork) -> bool:
    """Whether the eigenvalues were computed before, or their factors are still in the store."""
    if (spectra := find_spectra(store, work)) is not None and store.has_payload(spectra.key):
        return True
    return all(store.has_payload(reference.key) for reference in work.factors.values())


def spectrum_works(
    references: Mapping[str, Reference], shots: int, blocks: Sequence[tuple[LinearShape, ...]]
) -> list[SpectrumWork]:
    """The first, the middle and the last block of the last shot, as far as their curvature has factors.

    Args:
        references: of data/manifest.json, by readable name.
        shots: number of shots.
        blocks: linears of all blocks.
    """
    looked_at = sorted({0, len(blocks) // 2, len(blocks) - 1})
    works = [spectrum_work(references, shots, block, blocks[block]) for block in looked_at]
    return [work for work in works if work is not None]


def make_spectra(session: Session, references: Mapping[str, Reference], shots: int) -> dict[str, Reference]:
    """Spectra of those blocks by readable name: those that are there, and those whose factors are."""
    store = session.store
    return {
        (name := f"{work.label}/block-{work.block:02d}/spectra"): session.engine.task(
            spectrum_task, session.context.store, work, name=name
        )
        for work in spectrum_works(references, shots, session.model.blocks)
        if can_be_had(store, work)
    }


def _after(references: Mapping[str, Reference], shot: int, block: int) -> Reference | None:
    """The weights of a block after a shot; None for the dense model."""
    place = f"{shot_label(shot)}/block-{block:02d}"
    return references.get(f"{place}/correction") or references.get(f"{place}/update")
