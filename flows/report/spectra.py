"""Spectra for the report: of a first, a middle and a last block, computed once and then found in the store."""

from collections.abc import Mapping

from flows.cost_samples import block_shapes
from flows.session import Session
from flows.shot import shot_label
from surgeon.curvature.spec import Statistic
from surgeon.store import Reference, Store
from tasks.spectra import SpectrumWork, find_spectra, spectrum_task

References = Mapping[str, Reference]


def spectrum_works(references: References, shots: int) -> list[SpectrumWork]:
    """The first, the middle and the last block of the last shot, as far as their factors were measured.

    Args:
        references: of the manifest.
        shots: number of shots.
    """
    label = shot_label(shots)
    blocks = block_shapes(references, label)
    works = []
    for block in sorted({0, len(blocks) // 2, len(blocks) - 1}):
        place = f"block-{block:02d}"
        names = {statistic: f"{label}/{place}/{statistic.value}" for statistic in Statistic}
        statistics = {statistic: references[name] for statistic, name in names.items() if name in references}
        before = references.get(f"{shot_label(shots - 1)}/{place}/update")
        work = SpectrumWork(block, blocks[block], statistics, before, label)
        if work.factors:
            works.append(work)
    return works


def make_spectra(session: Session, references: References, shots: int) -> dict[str, Reference]:
    """Spectra by readable name: those that are there, and those whose factors are."""
    path = session.workspace.store
    store = Store(path)
    found: dict[str, Reference] = {}
    for work in spectrum_works(references, shots):
        known = find_spectra(path, work)
        factors_are_there = all(store.has_payload(reference.key) for reference in work.factors.values())
        if factors_are_there or (known is not None and store.has_payload(known.key)):
            name = f"{work.label}/block-{work.block:02d}/spectra"
            found[name] = session.engine.task(spectrum_task, path, work, name=name)
    return found


def why_no_spectra(references: References, shots: int) -> str:
    """Why there are none, in a sentence for the page."""
    if spectrum_works(references, shots):
        return (
            "The factors of the last shot are not in the store any more (run.keep drops them), so their spectra are "
            "not known. With run.keep=last they stay."
        )
    return "This curvature is not made of factors, so there are no spectra."
