"""Spectra for the report: of a first, a middle and a last block, computed once and then found in the store."""

from collections.abc import Mapping, Sequence

from flows.cost_samples import block_shapes
from flows.session import Session
from flows.shot import shot_label
from flows.spectra import can_be_had, spectrum_work
from surgeon.store import Reference
from tasks.context import LinearShape
from tasks.spectra import SpectrumWork, spectrum_task

References = Mapping[str, Reference]


def spectrum_works(
    references: References, shots: int, blocks: Sequence[tuple[LinearShape, ...]] | None = None
) -> list[SpectrumWork]:
    """The first, the middle and the last block of the last shot, as far as their curvature has factors.

    Args:
        references: of the manifest.
        shots: number of shots.
        blocks: linears of all blocks; None takes them from the updates.
    """
    shapes = block_shapes(references, shot_label(shots)) if blocks is None else blocks
    looked_at = sorted({0, len(shapes) // 2, len(shapes) - 1})
    works = [spectrum_work(references, shots, block, shapes[block]) for block in looked_at]
    return [work for work in works if work is not None]


def make_spectra(session: Session, references: References, shots: int) -> dict[str, Reference]:
    """Spectra by readable name: those that are there, and those whose factors are."""
    store = session.store
    return {
        (name := f"{work.label}/block-{work.block:02d}/spectra"): session.engine.task(
            spectrum_task, store.root, work, name=name
        )
        for work in spectrum_works(references, shots, session.model.blocks)
        if can_be_had(store, work)
    }


def why_no_spectra(references: References, shots: int) -> str:
    """Why there are none, in a sentence for the page."""
    if spectrum_works(references, shots):
        return (
            "The factors of the last shot are not in the store any more (run.keep drops them), so their spectra are "
            "not known. With run.keep=last they stay."
        )
    return "This curvature is not made of factors, so there are no spectra."
