"""Writes the page of a finished run."""

from collections.abc import Mapping
from typing import Any

from flows.anatomy import read_anatomy
from flows.report.inputs import ReportInputs
from flows.report.spectra import spectrum_works, why_no_spectra
from flows.session import Session
from flows.workspace import write_bytes
from surgeon.store import Reference, Store
from tasks.spectra import find_spectra, read_spectra


def write_report(
    session: Session,
    results: Mapping[str, Any],
    references: Mapping[str, Reference],
    timings: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes `data/report/index.html`.

    Args:
        session: of the run.
        results: as in `run.json`.
        references: of the manifest, by readable name.
        timings: how each stage last went, by stage.
    """
    # Half a second of imports, which no other command needs.
    from flows.report.page import render_page

    write_bytes(session.workspace.report, render_page(read_inputs(session, results, references, timings)).encode())


def read_inputs(
    session: Session,
    results: Mapping[str, Any],
    references: Mapping[str, Reference],
    timings: Mapping[str, Mapping[str, Any]],
) -> ReportInputs:
    """What the page is made from, read from the store; computes nothing."""
    store = Store(session.workspace.store)
    shots = len(results["shots"])
    found = {work.block: find_spectra(store, work) for work in spectrum_works(references, shots)}
    return ReportInputs(
        results=results,
        anatomy=read_anatomy(store, references, shots),
        params=session.params,
        spectra={
            block: read_spectra(store, reference)
            for block, reference in found.items()
            if reference is not None and store.has_payload(reference.key)
        },
        no_spectra=why_no_spectra(references, shots),
        timings=timings,
    )
