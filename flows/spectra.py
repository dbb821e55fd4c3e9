"""Which eigenvalues of a run can be had, and what they are computed from."""

from collections.abc import Mapping

from flows.cost_samples import block_shapes
from flows.shot import shot_label
from surgeon.curvature.spec import Statistic
from surgeon.store import Reference, Store
from tasks.context import LinearShape
from tasks.spectra import SpectrumWork, find_spectra


def spectrum_work(
    references: Mapping[str, Reference], shot: int, block: int, shapes: tuple[LinearShape, ...] | None = None
) -> SpectrumWork | None:
    """The work of `tasks.spectra.spectrum_task` for one block; None if its curvature has no factors.

    Args:
        references: of data/manifest.json, by readable name.
        shot: from 1.
        block: index.
        shapes: of the block's linears; None takes them from the update.
    """
    label = shot_label(shot)
    place = f"{label}/block-{block:02d}"
    found = {s: references[name] for s in Statistic if (name := f"{place}/{s.value}") in references}
    costs = references.get(f"{place}/costs")
    live = costs if costs is not None and "live_rows" in costs.arrays else _after(references, shot - 1, block)
    work = SpectrumWork(block, shapes or block_shapes(references, label)[block], found, live, label)
    return work if work.factors else None


def can_be_had(store: Store, work: SpectrumWork) -> bool:
    """Whether the eigenvalues were computed before, or their factors are still in the store."""
    if (spectra := find_spectra(store, work)) is not None and store.has_payload(spectra.key):
        return True
    return all(store.has_payload(reference.key) for reference in work.factors.values())


def _after(references: Mapping[str, Reference], shot: int, block: int) -> Reference | None:
    """The weights of a block after a shot; None for the dense model."""
    place = f"{shot_label(shot)}/block-{block:02d}"
    return references.get(f"{place}/correction") or references.get(f"{place}/update")
